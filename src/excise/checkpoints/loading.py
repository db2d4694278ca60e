"""Load a causal LM, its tokenizer and its anatomy from a folder, a GGUF file or a Hub id.

Only safetensors and GGUF are read, and no remote code runs unless the configuration allows it. A fault of
a checkpoint is reported in one line before anything is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

import psutil
import torch
from torch import nn

from excise.checkpoints.dequantise import Plain, dequantise
from excise.checkpoints.discovery import discover
from excise.checkpoints.gguf_header import shard_names
from excise.checkpoints.gguf_source import unpack_gguf
from excise.checkpoints.memory_check import check_fits
from excise.checkpoints.model_folder import (
    check_folder,
    check_loaded,
    is_gguf,
    library_errors,
    read_config,
    read_tensors,
    weight_files,
)
from excise.checkpoints.quantisation import find_scheme
from excise.checkpoints.safetensors_headers import count_elements
from excise.checkpoints.tokenizer import load_tokenizer
from excise.config import ModelSection
from excise.errors import ModelError, UnknownArchitecture, first_line
from excise.files import temporary
from excise.folders import commit_of
from excise.model.anatomy import Anatomy, describe, has_row
from excise.model.devices import accelerator, has_bfloat16
from excise.model.forward import Forward
from excise.model.parameters import (
    any_offloaded,
    check_finite,
    device_of,
    free,
    is_packed,
    keep_readable,
    shape_of,
)
from excise.named_models import NAMED, find
from excise.reading import full_path, is_file, is_folder

_NOT_WEIGHTS = [*"*.bin *.pt *.pth *.ckpt *.gguf *.onnx *.h5 *.msgpack".split(), "original/*"]
# A model may have this many times the elements of its weights, and this many more.
_MORE, _SPARE = 2, 1 << 24
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """Model ready to be measured. `folder` holds the checkpoint that it was loaded from."""

    model: Any
    tokenizer: Any
    anatomy: Anatomy
    source: str
    revision: str | None
    folder: Path
    dtype: torch.dtype
    plain: Plain | None = None  # the dequantised copy in `folder`, where the source is quantised
    quantize: str | None = None  # how bitsandbytes packed its matrices on loading
    offload: Any = None  # claimed folder of offloaded weights

    @property
    def is_local(self) -> bool:
        """Whether the source is a file or folder, or a named model, rather than a Hub id."""
        return self.source in NAMED or Path(self.source).exists()

    @property
    def place(self) -> str:
        """Source as others load it: an absolute path, or a Hub id."""
        if self.source in NAMED:
            return str(find(self.source))
        if self.plain is None and self.is_local:
            return str(self.folder)
        return str(full_path(Path(self.source))) if self.is_local else self.source

    @property
    def published(self) -> str | None:
        """Source's Hub id; None for a file or folder, as local paths are not published."""
        return None if self.is_local else self.source

    @property
    def device(self) -> torch.device:
        """Device that token ids go to."""
        return device_of(self.model.get_input_embeddings())

    @cached_property
    def forward(self) -> Forward:
        """The model's forward pass; that its layers can run fused is checked here, once per model."""
        return Forward(self.model, self.anatomy)

    def free_layers(self) -> None:
        """Free the layers' memory. From then on only the head of `forward` can be used."""
        for layer in self.anatomy.layers:
            free(layer)

    @property
    def notes(self) -> list[str]:
        """Sentences on how the loaded weights differ from the source's; empty where they do not."""
        notes = []
        if self.plain is not None:
            notes.append(self.plain.note)
        if self.quantize is not None:
            notes.append(
                f"The search ran on weights packed by {self.quantize}, and so did the export check; an "
                "export holds the edit computed from the source's own weights, unpacked: measure that "
                "with `excise evaluate`."
            )
        return notes


def load(section: ModelSection) -> Loaded:
    """Load the model that `section` names, in evaluation mode and without gradients.

    Raises:
        ModelError: no such folder or id, no weights, pickled, truncated, incomplete or NaN weights.
        UnknownArchitecture: no data row for its model type, and its writers cannot be proven.
    """
    source = resolve(section)
    plain = _dequantised(section, source)
    folder = source if plain is None else plain.folder
    files = weight_files(folder)
    _check_type(section, folder)
    dtype = _dtype(section, folder, files)
    check_fits(section, files, dtype)
    _check_shapes(section, folder)
    trust = section.trust_remote_code
    tokenizer = load_tokenizer(folder, section.source, trust_remote_code=trust)
    offload = None
    if section.device_map is not None:
        offload = temporary("offload")
    model = _load_model(section, folder, dtype, str(offload.path) if offload else None)
    bad = check_finite(model)
    if bad is not None:
        raise ModelError(f"model {section.source}: tensor {bad} holds NaN or infinite values")
    model.eval().requires_grad_(False)
    anatomy = _anatomy(section, model)
    _check_runs(section, model, anatomy)
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        anatomy=anatomy,
        source=section.source,
        revision=section.revision or (commit_of(source) if plain else None),
        folder=folder,
        dtype=dtype,
        plain=plain,
        quantize=section.quantize,
        offload=offload,
    )


def _check_runs(section: ModelSection, model: Any, anatomy: Anatomy) -> None:
    """Run one short pass: some settings contradict each other only in a forward pass.

    Not where weights are offloaded, as a pass would bring in all of them.

    Raises:
        ModelError: the pass fails, or gives NaN.
    """
    if not anatomy.layers:
        raise ModelError(
            f"model {section.source} has no layers: is its config.json another model's?"
        )
    if any_offloaded(model):
        return
    ids = torch.tensor([[0, 1] * 4], device=device_of(model.get_input_embeddings()))
    with library_errors(f"model {section.source}", "cannot be run"), torch.inference_mode():
        logits = model(input_ids=ids).logits
    if bool(logits.isnan().any()):
        raise ModelError(
            f"model {section.source} gives values that are no numbers in {str(logits.dtype)[6:]}: try "
            "another with --set model.dtype, or download it again"
        )


def _anatomy(section: ModelSection, model: Any) -> Anatomy:
    if has_row(model):
        return describe(model)
    if section.quantize is not None or any_offloaded(model):
        raise UnknownArchitecture(
            f"model type {model.config.model_type!r} has no data row, so its writers must be proven on "
            "weights that are in memory as they are: leave out --quantize and model.device_map"
        )
    return discover(model)


def _dequantised(section: ModelSection, folder: Path) -> Plain | None:
    """Dequantise the source; None where it is plain and its configuration says so."""
    if folder.is_file():
        return unpack_gguf(folder)
    check_folder(folder)
    files, config = weight_files(folder), read_config(folder)
    return dequantise(
        folder, files, config, find_scheme(config, read_tensors(files), section.source)
    )


def resolve(section: ModelSection) -> Path:
    """Return the model's local folder or GGUF file; download it where `source` is a Hub id.

    Raises:
        ModelError: there is none, or it cannot be downloaded.
    """
    if section.source in NAMED:
        return find(section.source)
    path = Path(section.source)
    if section.source and is_folder(path) and section.gguf_file is None:
        return path.resolve()
    file = path if section.gguf_file is None else path / section.gguf_file
    if section.source and is_file(file):
        if not is_gguf(file):
            raise ModelError(
                f"model {file} is a file and no GGUF: give the folder that holds config.json and weights"
            )
        return full_path(file)
    if section.gguf_file is not None and is_folder(path):
        raise ModelError(f"model folder {path} has no file {section.gguf_file!r} (model.gguf_file)")
    if not section.source or path.is_absolute() or section.source.count("/") != 1:
        raise ModelError(_no_source(path, section.source))
    return _download(section)


def _no_source(path: Path, source: str) -> str:
    try:
        path.stat()
    except PermissionError:
        return f"model {source} cannot be read: permission denied"
    except (OSError, ValueError):
        pass
    return f"model {source!r} is neither a folder nor a Hub id such as owner/name"


def _download(section: ModelSection) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if section.gguf_file is not None:
            place = PurePosixPath(section.gguf_file)
            parts = [str(place.parent / name) for name in shard_names(place.name)]
            found = [hf_hub_download(section.source, p, revision=section.revision) for p in parts]
            return Path(found[0])
        return Path(
            snapshot_download(
                section.source, revision=section.revision, ignore_patterns=_NOT_WEIGHTS
            )
        )
    except LocalEntryNotFoundError:
        raise ModelError(
            f"model {section.source} is not in the local cache and the Hub cannot be reached"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"model {section.source} cannot be downloaded: {first_line(error)}"
        ) from None


def _dtype(section: ModelSection, folder: Path, files: list[Path]) -> torch.dtype:
    """Return the dtype asked for; `auto` takes one that the device supports well and that fits."""
    if section.dtype != "auto":
        return _DTYPES[section.dtype]
    stored = read_config(folder)
    name = str(stored.get("dtype") or stored.get("torch_dtype") or "bfloat16")
    device = accelerator()
    if device is not None:
        wanted = _DTYPES.get(name.removeprefix("torch."), torch.bfloat16)
        exact = wanted is not torch.bfloat16 or has_bfloat16(device)
        return wanted if exact else torch.float16
    # On a CPU float32 is the exact choice; half precision is the fallback when memory is short.
    factor = 1 if name.endswith("float32") else 2
    size = factor * sum(file.stat().st_size for file in files)
    return torch.float32 if size < 0.4 * psutil.virtual_memory().available else torch.bfloat16


def _check_type(section: ModelSection, folder: Path) -> None:
    """Refuse an unknown model type before anything is loaded.

    Raises:
        UnknownArchitecture: Transformers has no class for it.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    name = read_config(folder).get("model_type")
    if name not in CONFIG_MAPPING_NAMES and not section.trust_remote_code:
        raise UnknownArchitecture(
            f"model type {name!r} of {section.source} is not known to the installed Transformers: "
            "update it, or allow the model's own code with --set model.trust_remote_code=true"
        )


def _auto_class(folder: Path) -> Any:
    """Return the class that loads all of a model: a multimodal one with its towers."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MULTIMODAL,
    )

    config = read_config(folder)
    own = next(iter(config.get("architectures") or [""]), "")
    multimodal = config.get("model_type") in MULTIMODAL and not str(own).endswith("ForCausalLM")
    return AutoModelForImageTextToText if multimodal else AutoModelForCausalLM


def _load_model(
    section: ModelSection, folder: Path, dtype: torch.dtype, offload: str | None
) -> nn.Module:
    from transformers.utils import logging

    logging.disable_progress_bar()
    device_map = section.device_map or accelerator()
    quantise = _quantisation_config(section, dtype)
    with library_errors(f"model {section.source}"):
        model, info = _auto_class(folder).from_pretrained(
            folder,
            dtype=dtype,
            device_map=device_map,
            offload_folder=offload,
            use_safetensors=True,
            trust_remote_code=section.trust_remote_code,
            quantization_config=quantise,
            ignore_mismatched_sizes=True,  # so that we can name them ourselves, below
            output_loading_info=True,
        )
    check_loaded(info, f"model {section.source}")
    assert isinstance(model, nn.Module)
    _check_packed(section, model)
    return model


def _check_shapes(section: ModelSection, folder: Path) -> None:
    """Refuse a configuration whose model is larger than the weights, before any of it is allocated.

    Transformers would fill in at random what is missing from the weights, or of another shape there.
    Where a model's own code may run, it may ask for memory all the same.

    Raises:
        ModelError: config.json describes a larger model than the weights hold.
    """
    if section.trust_remote_code:
        return
    from transformers import AutoConfig

    with library_errors(f"model {section.source}"), torch.device("meta"):
        model = _auto_class(folder).from_config(AutoConfig.from_pretrained(folder))
    count = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    stored = count_elements(read_tensors(weight_files(folder)))
    if count > _MORE * stored + _SPARE:
        raise ModelError(
            f"model {section.source}: config.json describes {count:.2g} numbers, and its weights hold "
            f"{stored:.2g}: it is the configuration of another model"
        )


def _check_packed(section: ModelSection, model: nn.Module) -> None:
    keep_readable(model)
    if section.quantize != "bnb-4bit":
        return
    for name, module in model.named_modules():
        if is_packed(module) and module.weight.device.type == "cpu" and shape_of(module)[-1] % 64:
            raise ModelError(
                f"model {section.source}: bitsandbytes packs rows in blocks of 64, and on a CPU reads "
                f"others back wrongly, such as {name} with {shape_of(module)[-1]} columns: use bnb-8bit"
            )


def _quantisation_config(section: ModelSection, dtype: torch.dtype) -> Any:
    """Return Transformers' settings for quantising the matrices on loading; None for not at all."""
    if section.quantize is None:
        return None
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            f"--quantize {section.quantize} needs the package bitsandbytes: "
            "pip install 'excise[quantize]'"
        )
    from transformers import BitsAndBytesConfig

    if section.quantize == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
