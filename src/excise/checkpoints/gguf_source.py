"""Dequantise a GGUF file to a plain bfloat16 checkpoint, with its configuration and tokenizer.

Transformers reads it, after `gguf_header` has checked its header against its tensors. A file that
Transformers would complete at random, or read in part, is refused by name.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from excise.checkpoints.dequantise import DTYPE, UNPACKED, Plain, claim_scratch
from excise.checkpoints.gguf_header import GgufFile, check_sizes, gguf_name, name_map, read_shards
from excise.checkpoints.model_folder import check_loaded, library_errors
from excise.errors import ModelError, StorageError, first_line
from excise.files import CARD

_FILE = "model.gguf"
# RoPE frequencies: the configuration says the same.
_ASIDE = re.compile(r"^(rope_|.*\.(rope_freqs|attn_rot_embd)\.)")
_LICENCE = 200  # characters: of the name of a licence
# RoPE scaling of Llama 3.1 and its derivatives: no key of the file names it, and it is always the same.
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def unpack_gguf(file: Path) -> Plain:
    """Make a plain copy of a GGUF file and, where it is split, of all its parts.

    Raises:
        ModelError: it is not a whole GGUF of a language model, or not one that Transformers reads
            in full.
        StorageError: no room.
    """
    shards = read_shards(file)
    check_sizes(shards)
    stored = sum(shard.size for shard in shards)
    plain = 2 * sum(math.prod(t.shape) for shard in shards for t in shard.tensors.values())
    claim = claim_scratch(plain + (stored if len(shards) > 1 else 0))
    # In a folder of its own, so that nothing beside the file is read.
    source = claim.path / "gguf"
    source.mkdir()
    if len(shards) == 1:
        (source / _FILE).symlink_to(file.resolve())
    else:
        join(shards, source / _FILE)
    tokenizer, model = _read(source, shards, file)
    shutil.rmtree(source)
    _save(claim.path, tokenizer, model, _licence(shards[0]))
    return Plain(claim.path, UNPACKED.format("a GGUF file"), claim, file)


def join(shards: Sequence[GgufFile], target: Path) -> None:
    """Write the parts of a split model as one file, tensor by tensor.

    Raises:
        StorageError: no room.
    """
    readers = [gguf.GGUFReader(shard.path) for shard in shards]
    writer = gguf.GGUFWriter(target, shards[0].architecture)
    for name, field in readers[0].fields.items():
        # The writer puts these itself.
        if not name.startswith(("GGUF.", "split.")) and name != gguf.Keys.General.ARCHITECTURE:
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for tensor in tensors:
        size = tensor.data.nbytes
        writer.add_tensor_info(
            tensor.name, tensor.data.shape, tensor.data.dtype, size, tensor.tensor_type
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.data)
        writer.close()
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from None


def _read(source: Path, shards: Sequence[GgufFile], file: Path) -> tuple[Any, Any]:
    """Load tokenizer and model with Transformers; refuse a file that it does not read in full."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    given = {"gguf_file": _FILE}
    # One progress bar does not heed that switch.
    with library_errors(file.name, "cannot be read"), redirect_stderr(StringIO()):
        config = AutoConfig.from_pretrained(source, **given)
        with torch.device("meta"):
            _check_elements(file, shards, AutoModelForCausalLM.from_config(config))
        tokenizer = AutoTokenizer.from_pretrained(source, **given)
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=DTYPE,
            quantization_config=GgufConfig(dequantize=True),
            ignore_mismatched_sizes=True,  # so that we can name them ourselves, below
            output_loading_info=True,
            **given,
        )
    check_loaded(info, file.name)
    _check_all_read(file, shards, model)
    _restore_llama3_rope(file, shards, model)
    return tokenizer, model


def _check_elements(file: Path, shards: Sequence[GgufFile], model: nn.Module) -> None:
    """Refuse a header whose model is far larger than the file, before the model is allocated."""
    held = sum(math.prod(t.shape) for shard in shards for t in shard.tensors.values())
    needed = sum(parameter.numel() for parameter in model.parameters())
    if needed > 2 * held:
        raise ModelError(
            f"{file.name} describes a model of {needed:,} parameters and holds {held:,}: download it again"
        )


def _check_all_read(file: Path, shards: Sequence[GgufFile], model: Any) -> None:
    """Refuse a file with tensors, such as biases, that the loaded model has no place for.

    The number of elements decides. Names, which do not map one to one in every family, only say which.
    """
    tied = set(model.all_tied_weights_keys)
    ours = {name: t for name, t in model.state_dict().items() if name not in tied}
    layers = model.config.get_text_config().num_hidden_layers
    spare: dict[str, int] = {}
    for name, tensor in ((t.name, t) for shard in shards for t in shard.tensors.values()):
        beyond = re.match(r"blk\.(\d+)\.", name)  # multi-token prediction layers come last
        guesses = beyond and int(beyond[1]) >= layers and shards[0].hyper("nextn_predict_layers")
        aside = _ASIDE.match(name) or (tied and name == "output.weight")
        if not aside and not guesses:
            spare[name] = math.prod(tensor.shape)
    if sum(spare.values()) <= sum(tensor.numel() for tensor in ours.values()):
        return
    names = name_map(shards[0])
    known = {gguf_name(names, name) for name in ours}
    left = sorted(name for name in spare if name not in known)
    if left:
        raise ModelError(
            f"{file.name}: {len(left)} tensors have no place in the model that Transformers makes of it, "
            f"first {left[0]}: use the checkpoint that the file was made from"
        )


def _restore_llama3_rope(file: Path, shards: Sequence[GgufFile], model: Any) -> None:
    """Put the RoPE scaling of Llama 3.1 into the configuration: Transformers leaves it out.

    Raises:
        ModelError: the file's frequencies are of another kind.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found = next((s for s in shards if "rope_freqs.weight" in s.tensors), None)
    if found is None or model.config.model_type != "llama":
        return
    place = found.tensors["rope_freqs.weight"]
    if place.type.name != "F32":
        raise ModelError(
            f"{file.name} stores its angles (rope_freqs) as {place.type.name}, not F32"
        )
    with found.path.open("rb") as opened:
        opened.seek(place.start)
        stored = opened.read(place.stop - place.start)
    stretched = torch.frombuffer(bytearray(stored), dtype=torch.float32)
    plain = model.model.rotary_emb.inv_freq.float()
    if bool((stretched == 1).all()):
        return
    old = model.config.rope_parameters
    model.config.rope_parameters = old | _LLAMA3 | {"factor": float(stretched.max())}
    ours, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, plain.device)
    if stretched.shape != plain.shape or not torch.allclose(plain / ours, stretched, rtol=1e-3):
        raise ModelError(
            f"{file.name} turns its positions by angles of its own (rope_freqs), which cannot be read "
            "here: use the checkpoint that it was made from"
        )


def _licence(head: GgufFile) -> str | None:
    """Return the licence that a file names in one line."""
    name = head.keys.get("general.license")
    known = isinstance(name, str) and name.isprintable() and 0 < len(name) <= _LICENCE
    return str(name) if known else None


def _save(target: Path, tokenizer: Any, model: Any, licence: str | None) -> None:
    from huggingface_hub import ModelCardData

    tied = set(model.all_tied_weights_keys)
    weights = {n: t.contiguous() for n, t in model.state_dict().items() if n not in tied}
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(target)
        model.config.save_pretrained(target)
        model.generation_config.save_pretrained(target)
        if licence is not None:
            card = ModelCardData(license=licence).to_yaml()
            (target / CARD).write_text(f"---\n{card}\n---\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write {target}: {first_line(error)}") from None
