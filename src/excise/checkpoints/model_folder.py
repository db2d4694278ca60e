"""Check a checkpoint's folder before a library reads it, and read its JSON files.

Files must be regular, readable and inside the folder. JSON is parsed within limits. Settings that our
code or a model class trusts must have the right types, and no size may exceed what the weights hold. An
error that a library raises all the same becomes one line (`library_errors`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from excise.checkpoints.safetensors_headers import StoredTensor, is_pointer, read_header
from excise.errors import ExciseError, ModelError, first_line
from excise.folders import check_inside, list_files
from excise.reading import check_regular, is_file, read_json
from excise.visible import one_line

CONFIG, GENERATION = "config.json", "generation_config.json"
INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"  # all weights in one file
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Weights in other formats: pickles, which can run code, and those of other runtimes.
_OTHER_FORMS = (*_PICKLES, ".bin.index.json", ".gguf", ".onnx", ".h5", ".msgpack")
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_ADAPTER = "adapter_config.json"
_LFS = (".safetensors", ".json", ".model", ".jinja", ".txt")  # what a load may open

# -- what is in the folder -------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Refuse a folder that does not hold exactly one whole model.

    Raises:
        ModelError: a file cannot be read, is a pipe, a link out of the folder or a Git LFS pointer; the
            folder holds an adapter; settings are of the wrong type, or sizes beyond the weights.
    """
    config, tensors = read_config(folder), read_tensors(weight_files(folder))
    files = list_files(folder, ModelError)
    names = {file.name for file in files if file.parent == Path()}
    if _ADAPTER in names:
        raise ModelError(
            f"model folder {folder} holds an adapter beside the model, which Transformers would put on "
            f"top of it unasked: move {_ADAPTER} and its weights elsewhere, or {_MERGE}"
        )
    for name in sorted(names):
        if name.endswith(_LFS) and is_pointer(folder / name):
            raise ModelError(
                f"{folder / name} is a Git LFS pointer: fetch files with `git lfs pull`"
            )
        if _DISTRIBUTED.fullmatch(name):
            raise ModelError(
                f"model folder {folder} holds {name}, a part of a training's checkpoint, which would be "
                "loaded in place of the model: move such files elsewhere"
            )
    _check_sizes(folder, config, tensors)
    read_generation(folder)


_MERGE = "merge it first, PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(to)"


def is_other_form(name: str) -> bool:
    """Return whether a file holds weights in another format than safetensors."""
    return name.lower().endswith(_OTHER_FORMS)


# -- settings --------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """Read the checkpoint's config.json and check the types of its settings.

    Raises:
        ModelError: there is none, it cannot be read, or a setting is of another type.
    """
    path = folder / CONFIG
    if not path.is_symlink() and not path.exists():
        raise ModelError(f"model folder {folder} has no {CONFIG}{_other_contents(folder)}")
    check_inside(path, folder, ModelError)
    config = _read(path, "model configuration")
    _check_types(path, config)
    return config


def read_generation(folder: Path) -> dict[str, Any]:
    """Read the checkpoint's generation_config.json; empty where there is none.

    Raises:
        ModelError: it cannot be read, or a setting is of another type or range than it can have.
    """
    path = folder / GENERATION
    config = read_optional(path)
    _check_types(path, config)
    for name, (low, high) in _RANGES.items():
        value = config.get(name)
        if value is not None and not (_is_number(value) and low <= value <= high):
            raise ModelError(f"{path}: {name} is {_shown(value)}, not a number of {low} to {high}")
    return config


def read_optional(path: Path) -> dict[str, Any]:
    """Read a JSON object that a checkpoint may have; empty where there is none.

    Raises:
        ModelError: there is one that cannot be read.
    """
    if not path.is_symlink() and not path.exists():
        return {}
    check_inside(path, path.parent, ModelError)
    return _read(path, "model file")


def _read(path: Path, what: str) -> dict[str, Any]:
    check_regular(path, what, ModelError)
    _check_fetched(path)
    return read_json(path, what, ModelError)


def _check_fetched(path: Path) -> None:
    if is_pointer(path):
        raise ModelError(f"{path} is a Git LFS pointer: fetch files with `git lfs pull`")


def _other_contents(folder: Path) -> str:
    """Describe what a folder without a configuration holds instead, for a message."""
    found = [path.name for path in list_files(folder, ModelError) if path.parent == Path()]
    if _ADAPTER in found:
        return f": it is an adapter, not a model; {_MERGE}"
    ggufs = [name for name in found if is_gguf(folder / name)]
    if ggufs:
        several = f" (of {', '.join(ggufs)})" if len(ggufs) > 1 else ""
        return f", only GGUF files: give {folder / ggufs[0]}{several}, or --set model.gguf_file={ggufs[0]}"
    return ""


def is_gguf(path: Path) -> bool:
    """Return whether a file is GGUF, by its first bytes and whatever its name."""
    if not is_file(path):
        return False
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


# Types of settings, by their names, wherever in the configuration they stand.
_TEXTS = ("model_type", "dtype", "torch_dtype", "transformers_weights")
_TABLES = (
    "text_config",
    "vision_config",
    "audio_config",
    "rope_scaling",
    "rope_parameters",
    "auto_map",
)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Ranges of generation settings, which cards show and Modelfiles pass on.
_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 1000), "top_p": (0, 1), "top_k": (-1, 1 << 31), "min_p": (0, 1),
    "repetition_penalty": (0, 1000),
}  # fmt: skip


def _check_types(path: Path, config: dict[str, Any]) -> None:
    for where, name, value in _settings(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise ModelError(f"{path}: {where} is {value}, which is no number")
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise ModelError(f"{path}: {where} is a number of more than 64 bits")
        wanted = _wanted(name, value)
        if wanted is not None:
            raise ModelError(f"{path}: {where} is {_shown(value)}, not {wanted}")


def _wanted(name: str, value: Any) -> str | None:
    """Say what a setting of this name should be; None where its value is that."""
    if value is None:
        return None
    if name in _TEXTS and not isinstance(value, str):
        return "a text"
    if name in _TABLES and not isinstance(value, dict):
        return "a table"
    texts = value if isinstance(value, list) else [value]
    if name == "architectures" and not (
        isinstance(value, list) and all(isinstance(one, str) for one in texts)
    ):
        return "a list of texts"
    if name in _TOKENS and not all(type(one) is int and one >= -1 for one in texts):
        return "a token id or a list of such"
    return None


def _settings(config: dict[str, Any], within: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield every setting, nested tables included: its dotted path, name and value."""
    for name, value in config.items():
        where = f"{within}{name}"
        yield where, name, value
        if isinstance(value, dict):
            yield from _settings(value, f"{where}.")


# Settings that count modules or names which a class makes one by one.
_COUNTS = re.compile(r"(^|_)(layers?|depths?|blocks?|experts|labels)$")
_FEW = 1000  # so many are made in seconds, whatever the weights hold


def _check_sizes(folder: Path, config: dict[str, Any], tensors: Sequence[StoredTensor]) -> None:
    """Refuse module counts far beyond the weights: a class would build modules for hours."""
    fused = [tensor.shape[0] for tensor in tensors if len(tensor.shape) > 2]
    most = max(_FEW, len(tensors), *fused)
    for where, name, value in _settings(config):
        counts = value if isinstance(value, list) else [value]
        high = [count for count in counts if type(count) is int and count > most]
        if high and _COUNTS.search(name):
            raise ModelError(
                f"{folder / CONFIG}: {where} is {high[0]}, where the weights have {len(tensors)} "
                "tensors: it is the configuration of another model"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


# -- weights ---------------------------------------------------------------------------------------


def weight_index(folder: Path) -> Path | None:
    """Find the index that a checkpoint's shards are loaded by; None where one file is loaded.

    In Transformers' order: what the configuration names, one whole file, an index.
    """
    named = _named_weights(folder)
    if named is not None:
        return _inside(folder, named) if named.endswith(".index.json") else None
    index = folder / INDEX
    return index if is_file(index) and not is_file(folder / _WHOLE) else None


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors shards of a checkpoint, each checked to open and to be whole.

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
        files = [whole] if _is_there(whole) else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(_no_weights(folder))
    for file in files:
        check_inside(file, folder, ModelError)
        _check_shard(file)
    return files


def read_tensors(files: Sequence[Path]) -> list[StoredTensor]:
    """Read the headers of a checkpoint's weight files.

    Raises:
        ModelError: a tensor is stored in two of them, or a header is not whole.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in read_header(file):
            other = found.setdefault(tensor.name, tensor)
            if other is not tensor:
                raise ModelError(
                    f"tensor {tensor.name} is in {other.file.name} and in {file.name} of {file.parent}: "
                    "remove the file that is not part of the model"
                )
    return list(found.values())


def _no_weights(folder: Path) -> str:
    names = [path.name for path in list_files(folder, ModelError) if path.parent == Path()]
    if any(name.lower().endswith(_PICKLES) for name in names):
        return (
            f"model folder {folder} has only pickled weights, which can run code when loaded: "
            "convert them to safetensors first"
        )
    return f"model folder {folder} has no .safetensors weights{_other_contents(folder)}"


def _named_weights(folder: Path) -> str | None:
    if not is_file(folder / CONFIG):
        return None
    name = read_config(folder).get("transformers_weights")
    return None if name is None else str(name)


def _weight_map(index: Path) -> dict[str, str]:
    data = _read(index, "checkpoint index").get("weight_map")
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data.values()):
        raise ModelError(f"checkpoint index {index} has no weight_map that names files")
    return data


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ModelError(f"the checkpoint in {folder} names {name!r}, outside the model folder")
    if not is_file(path):
        raise ModelError(f"shard {one_line(name)} of {folder} is missing: download the model again")
    check_inside(path, folder, ModelError)
    return path


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _check_shard(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"weights {path} are truncated or corrupt ({error}): download the file again"
        ) from None


# -- libraries -------------------------------------------------------------------------------------


def check_loaded(info: dict[str, Any], what: str) -> None:
    """Refuse a model in which Transformers has filled in missing tensors at random.

    Args:
        info: what `from_pretrained` gives for `output_loading_info`.
        what: the model, for the message.

    Raises:
        ModelError: tensors are missing from its weights, or of another shape there.
    """
    mismatched = (k[0] if isinstance(k, tuple) else k for k in info["mismatched_keys"])
    wrong = sorted({*info["missing_keys"], *mismatched})
    if wrong:
        raise ModelError(
            f"{what}: {len(wrong)} tensors are missing from its weights or of the wrong shape, first "
            f"{wrong[0]}: it would run with random values"
        )


@contextmanager
def library_errors(what: str, fault: str = "cannot be loaded") -> Iterator[None]:
    """Turn whatever a library raises within this context into a one-line `ModelError`.

    No narrower class would do: model classes raise whatever their code happens to, and the tokenizers
    library raises `Exception` itself. Its panics are not even that, so they are recognised by their name.
    What Transformers logs meanwhile is silenced, because our own checks name the same faults.
    """
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except (ExciseError, MemoryError):
        raise
    except Exception as error:
        raise ModelError(f"{what} {fault}: {first_line(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{what} {fault}: {first_line(error)}") from error
    finally:
        logging.set_verbosity(level)
