"""Load a causal LM, its tokenizer and its anatomy from a folder or a Hub id.

Only safetensors are read, no remote code runs unless the configuration asks for it, and whatever is
wrong with a checkpoint is said in one line before anything is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

import psutil
import torch
from torch import nn

from excise.checkpoints.dequantise import Plain, unpack
from excise.checkpoints.discovery import discover
from excise.checkpoints.gguf_header import shard_names
from excise.checkpoints.gguf_source import unpack_gguf
from excise.checkpoints.memory_check import check_fits
from excise.checkpoints.model_folder import (
    check_folder,
    check_loaded,
    explained,
    is_gguf,
    read_config,
    read_tensors,
    weight_files,
)
from excise.checkpoints.quantisation import packing
from excise.checkpoints.safetensors_headers import count_elements
from excise.checkpoints.tokenizer import load_tokenizer
from excise.config import ModelSection
from excise.errors import ModelError, UnknownArchitecture, first_line
from excise.files import temporary
from excise.folders import commit_of
from excise.model.anatomy import Anatomy, describe, has_row
from excise.model.parameters import (
    any_offloaded,
    check_finite,
    device_of,
    is_packed,
    keep_readable,
    shape_of,
)
from excise.reading import full_path, is_file, is_folder

DEMO = "demo"  # names the embedded model
_NOT_WEIGHTS = [*"*.bin *.pt *.pth *.ckpt *.gguf *.onnx *.h5 *.msgpack".split(), "original/*"]
# A model of more elements than this, times its weights' and beside them, is not the one that they are of.
_MORE, _SPARE = 2, 1 << 24
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """A model ready to be measured. `folder` holds the checkpoint that it came from."""

    model: Any
    tokenizer: Any
    anatomy: Anatomy
    source: str
    revision: str | None
    folder: Path
    dtype: torch.dtype
    plain: Plain | None = None  # where the source is quantised: the copy that `folder` is
    quantize: str | None = None  # how its matrices were packed as they were loaded
    offload: Any = None  # the folder of weights that are read when they are used

    @property
    def is_local(self) -> bool:
        """Whether the source is a file or folder (or the embedded model) rather than a Hub id."""
        return self.source == DEMO or Path(self.source).exists()

    @property
    def place(self) -> str:
        """The source as others load it: a whole path, or a Hub id."""
        if self.plain is None and self.is_local:
            return str(self.folder)
        return str(full_path(Path(self.source))) if self.is_local else self.source

    @property
    def published(self) -> str | None:
        """The source's Hub id; None for a file or folder, whose path is nobody else's business."""
        return None if self.is_local else self.source

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return device_of(self.model.get_input_embeddings())

    @property
    def notes(self) -> list[str]:
        """What the weights are, where they are not simply those of the source."""
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
    plain = _plain(section, source)
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
    _try(section, model, anatomy)
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


def _try(section: ModelSection, model: Any, anatomy: Anatomy) -> None:
    """Refuse a model that is made, and then cannot be run: settings meet each other in a pass first.

    Not where weights are offloaded: a pass would bring in all of them.
    """
    if not anatomy.layers:
        raise ModelError(
            f"model {section.source} has no layers: is its config.json another model's?"
        )
    if any_offloaded(model):
        return
    ids = torch.tensor([[0, 1] * 4], device=device_of(model.get_input_embeddings()))
    with explained(f"model {section.source}", "cannot be run"), torch.inference_mode():
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


def _plain(section: ModelSection, folder: Path) -> Plain | None:
    """A plain copy of a source that is quantised, or says so; None for one that is plain."""
    if folder.is_file():
        return unpack_gguf(folder)
    check_folder(folder)
    files, config = weight_files(folder), read_config(folder)
    return unpack(folder, files, config, packing(config, read_tensors(files), section.source))


def resolve(section: ModelSection) -> Path:
    """The local folder of a model, or its GGUF file; downloaded when `source` is a Hub id."""
    if section.source == DEMO:
        return Path(str(resources.files("excise"))) / "data" / "demo" / "model"
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
    """The dtype asked for; `auto` takes what the device does well, and never what does not fit."""
    if section.dtype != "auto":
        return _DTYPES[section.dtype]
    stored = read_config(folder)
    name = str(stored.get("dtype") or stored.get("torch_dtype") or "bfloat16")
    if torch.cuda.is_available():
        wanted = _DTYPES.get(name.removeprefix("torch."), torch.bfloat16)
        bf16 = torch.cuda.is_bf16_supported()
        return torch.float16 if wanted is torch.bfloat16 and not bf16 else wanted
    # On a CPU float32 is the exact choice; half precision is the fallback when memory is short.
    factor = 1 if name.endswith("float32") else 2
    size = factor * sum(file.stat().st_size for file in files)
    return torch.float32 if size < 0.4 * psutil.virtual_memory().available else torch.bfloat16


def _check_type(section: ModelSection, folder: Path) -> None:
    """Say before anything is loaded that a model type is unknown.

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
    """The class that loads all of a model: a multimodal one with its towers, whose bytes stay."""
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
    device_map = section.device_map or ("cuda:0" if torch.cuda.is_available() else None)
    quantise = _packing(section, dtype)
    with explained(f"model {section.source}"):
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
    """Refuse a configuration whose model is larger than the weights, before any of it is made.

    What is missing from the weights, or of another shape there, would be made at random first. Where a
    model's own code may run, it may ask for memory all the same.
    """
    if section.trust_remote_code:
        return
    from transformers import AutoConfig

    with explained(f"model {section.source}"), torch.device("meta"):
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


def _packing(section: ModelSection, dtype: torch.dtype) -> Any:
    """How Transformers is to pack the matrices as it loads them; None for not at all."""
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
