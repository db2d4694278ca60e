"""Load a causal LM, its tokenizer and its anatomy from a folder or a Hub id.

Only safetensors are read, no remote code runs unless the configuration asks for it, and whatever is
wrong with a checkpoint is said in one line before anything is computed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from excise.anatomy import Anatomy, describe, has_row
from excise.config import ModelSection
from excise.discovering import discover
from excise.errors import ModelError, UnknownArchitecture, first_line
from excise.fitting import check_fits
from excise.folders import check_inside, list_files
from excise.ggufsource import unpack_gguf
from excise.plain import Plain, quantisation, unpack
from excise.reading import is_file
from excise.staging import temporary
from excise.weights import (
    any_offloaded,
    check_finite,
    device_of,
    is_packed,
    keep_readable,
    shape_of,
)

DEMO = "demo"  # names the embedded model
_WHOLE = "model.safetensors"  # all weights in one file
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What Transformers raises of a configuration that contradicts itself, or a device that is not there.
UNLOADABLE = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError,
               OSError, RuntimeError, ImportError, StrictDataclassError)  # fmt: skip
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
        return str(Path(self.source).resolve()) if self.is_local else self.source

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
            notes.append(f"The source is {self.plain.words}; all figures and exports are of that.")
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
    folder = resolve(section)
    plain = _plain(section, folder)
    folder = folder if plain is None else plain.folder
    files = weight_files(folder)
    _check_type(section, folder)
    dtype = _dtype(section, folder, files)
    check_fits(section, files, dtype)
    offload = None
    if section.device_map is not None:
        offload = temporary("offload")
    model = _load_model(section, folder, dtype, str(offload.path) if offload else None)
    bad = check_finite(model)
    if bad is not None:
        raise ModelError(f"model {section.source}: tensor {bad} holds NaN or infinite values")
    model.eval().requires_grad_(False)
    return Loaded(
        model=model,
        tokenizer=_load_tokenizer(section, folder),
        anatomy=_anatomy(section, model),
        source=section.source,
        revision=section.revision,
        folder=folder,
        dtype=dtype,
        plain=plain,
        quantize=section.quantize,
        offload=offload,
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
    """A plain copy of a source that is quantised; None for one that is plain."""
    if folder.is_file():
        return unpack_gguf(folder)
    files, config = weight_files(folder), read_config(folder)
    list_files(folder, ModelError)  # any of which Transformers might open
    method = quantisation(config, section.source)
    if method is None:
        return None
    return unpack(folder, files, config, method)


def resolve(section: ModelSection) -> Path:
    """The local folder of a model, or its GGUF file; downloaded when `source` is a Hub id."""
    if section.source == DEMO:
        return Path(str(resources.files("excise"))) / "data" / "demo" / "model"
    path = Path(section.source)
    if section.source and path.is_dir() and section.gguf_file is None:
        return path.resolve()
    file = path if section.gguf_file is None else path / section.gguf_file
    if file.suffix == ".gguf" and file.is_file():
        return file.resolve()
    if not section.source or path.is_absolute() or section.source.count("/") != 1:
        raise ModelError(
            f"model {section.source!r} is neither a folder nor a Hub id such as owner/name"
        )
    return _download(section)


def _download(section: ModelSection) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*_PICKLES, "*.gguf", "*.onnx", "*.h5", "*.msgpack", "original/*"]
    try:
        if section.gguf_file is not None:
            name, revision = section.gguf_file, section.revision
            return Path(hf_hub_download(section.source, name, revision=revision))
        return Path(
            snapshot_download(section.source, revision=section.revision, ignore_patterns=patterns)
        )
    except LocalEntryNotFoundError:
        raise ModelError(
            f"model {section.source} is not in the local cache and the Hub cannot be reached"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"model {section.source} cannot be downloaded: {first_line(error)}"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json."""
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"model folder {folder} has no config.json") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ModelError(f"{folder / 'config.json'} is not a JSON object")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """A checkpoint's optional JSON file; empty where there is none to read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def weight_index(folder: Path) -> Path | None:
    """The index that a checkpoint's shards are loaded by; None where one file is loaded.

    In Transformers' order: what the configuration names, one whole file, an index.
    """
    named = _named_weights(folder)
    if named is not None:
        return _inside(folder, named) if named.endswith(".index.json") else None
    index = folder / "model.safetensors.index.json"
    return index if index.is_file() and not (folder / _WHOLE).is_file() else None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors shards of a checkpoint, each checked to open and to be whole.

    Raises:
        ModelError: none, only pickles, a shard that the index names is missing, outside the folder,
            truncated or corrupt.
    """
    index, named = weight_index(folder), _named_weights(folder)
    if index is not None:
        files = [_inside(folder, name) for name in sorted(set(_weight_map(index).values()))]
    elif named is not None:
        files = [_inside(folder, named)]
    else:
        whole = folder / _WHOLE
        files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
            raise ModelError(
                f"model folder {folder} has only pickled weights, which can run code when loaded: "
                "convert them to safetensors first"
            )
        raise ModelError(f"model folder {folder} has no .safetensors weights")
    for file in files:
        _check_shard(file)
    return files


def _named_weights(folder: Path) -> str | None:
    name = read_json(folder / "config.json").get("transformers_weights")
    return name if isinstance(name, str) else None


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("a shard is not named by a string")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not a readable checkpoint index: {error}") from None
    return dict(weight_map)


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ModelError(f"the checkpoint in {folder} names {name!r}, outside the model folder")
    if not is_file(path):
        raise ModelError(f"shard {name} of {folder} is missing: download the model again")
    check_inside(path, folder, ModelError)
    return path


def _check_shard(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"weights {path} are truncated or corrupt ({error}): download the file again"
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
    own = (config.get("architectures") or [""])[0]
    multimodal = config.get("model_type") in MULTIMODAL and not str(own).endswith("ForCausalLM")
    return AutoModelForImageTextToText if multimodal else AutoModelForCausalLM


def _load_model(
    section: ModelSection, folder: Path, dtype: torch.dtype, offload: str | None
) -> nn.Module:
    from transformers.utils import logging

    logging.disable_progress_bar()
    device_map = section.device_map or ("cuda:0" if torch.cuda.is_available() else None)
    try:
        model, info = _auto_class(folder).from_pretrained(
            folder,
            dtype=dtype,
            device_map=device_map,
            offload_folder=offload,
            use_safetensors=True,
            trust_remote_code=section.trust_remote_code,
            quantization_config=_packing(section, dtype),
            ignore_mismatched_sizes=True,  # so that we can name them ourselves, below
            output_loading_info=True,
        )
    except UNLOADABLE as error:
        raise ModelError(f"model {section.source} cannot be loaded: {first_line(error)}") from error
    mismatched = (k[0] if isinstance(k, tuple) else k for k in info["mismatched_keys"])
    wrong = sorted({*info["missing_keys"], *mismatched})
    if wrong:
        raise ModelError(
            f"model {section.source}: {len(wrong)} tensors are missing from its weights or of the "
            f"wrong shape, first {wrong[0]}: it would run with random values"
        )
    assert isinstance(model, nn.Module)
    _check_packed(section, model)
    return model


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


def _load_tokenizer(section: ModelSection, folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(
            f"tokenizer of {section.source} cannot be loaded: {first_line(error)}"
        ) from error
