"""A plain copy of a checkpoint that comes quantised: what is searched, edited and exported.

FP8 with scales per block, row or tensor, and MXFP4 as gpt-oss stores it. Each packed tensor is
unpacked by its format's own formula, rounded once to bfloat16, and stored under the name that the
unquantised model has; every other tensor is copied as it is, also those that no class loads. The copy
lives in a scratch folder and goes when the model does.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from excise.errors import ModelError, StorageError
from excise.folders import list_files
from excise.staging import Claim, temporary

DTYPE = torch.bfloat16
INDEX = "model.safetensors.index.json"
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
_SIZES |= {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_FP8 = ("F8_E4M3", "F8_E5M2")
# Suffixes of the scales of an FP8 weight; an inverse scale is multiplied all the same.
_SCALES = ("_scale_inv", "_scale")
# Of activations: they mean nothing without the kernels that use them.
_DROPPED = ("activation_scale", "input_scale", "k_scale", "v_scale")
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_WORDS = {"fp8": "FP8", "mxfp4": "MXFP4", "compressed-tensors": "FP8 (compressed-tensors)"}


@dataclass(frozen=True)
class Plain:
    """A plain copy: its folder, which goes with `scratch`, and what it is a copy of, in words."""

    folder: Path
    words: str
    scratch: Claim


def quantisation(config: dict[str, Any], source: str) -> str | None:
    """The method by which a checkpoint is quantised; None for a plain one.

    Raises:
        ModelError: one that cannot be taken apart.
    """
    inner = config.get("text_config") or {}
    found = config.get("quantization_config") or inner.get("quantization_config")
    if not found:
        return None
    name = str(found.get("quant_method", "an unnamed method"))
    floats = name == "compressed-tensors" and found.get("format") == "float-quantized"
    if name in ("fp8", "mxfp4") or floats:
        return name
    more = f" ({found['format']})" if found.get("format") else ""
    if name == "bitsandbytes":
        raise ModelError(
            f"model {source} is stored as bitsandbytes packs it: use the checkpoint that it was made "
            "from, with --quantize bnb-4bit or bnb-8bit"
        )
    raise ModelError(
        f"model {source} is quantised with {name}{more}, which cannot be unpacked here: use the "
        "checkpoint that it was made from, or one in FP8, MXFP4 or GGUF"
    )


def unpack(folder: Path, files: Sequence[Path], config: dict[str, Any], method: str) -> Plain:
    """A plain copy of the safetensors checkpoint in `folder`.

    Args:
        folder: the checkpoint.
        files: its weight files.
        config: its config.json.
        method: as `quantisation` gave it.

    Raises:
        ModelError: a packed tensor lacks its scales. StorageError: no room.
    """
    settings = config.get("quantization_config") or config["text_config"]["quantization_config"]
    block = settings.get("weight_block_size")
    with_room = 4 if method == "mxfp4" else 2
    others = [folder / file for file in _rest(folder)]
    room = with_room * sum(file.stat().st_size for file in files)
    scratch = make_room(room + sum(file.stat().st_size for file in others))
    target = scratch.path
    found = _Tensors(files)
    weight_map: dict[str, str] = {}
    total = 0
    for file in files:
        plan = list(_plan(found, file, block))
        weight_map |= {name: file.name for name, *_ in plan}
        total += _write(target / file.name, plan)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    _copy_rest(folder, target, config)
    return Plain(target, f"{_WORDS[method]}, unpacked to bfloat16", scratch)


class _Tensors:
    """All tensors of a checkpoint, by name, wherever they are stored."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.of_file = {file: sorted(_names(file)) for file in files}
        self._where = {name: file for file, names in self.of_file.items() for name in names}

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def read(self, name: str) -> Tensor:
        """The stored tensor.

        Raises:
            ModelError: there is none.
        """
        if name not in self._where:
            raise ModelError(
                f"the checkpoint has no tensor {name}, which another one is packed with"
            )
        with safe_open(self._where[name], framework="pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    def head(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape, and dtype as safetensors writes it."""
        with safe_open(self._where[name], framework="pt") as file:
            part = file.get_slice(name)
            return tuple(part.get_shape()), str(part.get_dtype())


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


# Name, shape and dtype of a tensor of the copy, and how it is made.
_Planned = tuple[str, tuple[int, ...], str, Callable[[], Tensor]]


def _plan(found: _Tensors, file: Path, block: Any) -> Iterator[_Planned]:
    """What goes into the plain copy of one file."""
    for name in found.of_file[file]:
        shape, dtype = found.head(name)
        plain = name.removesuffix("_blocks")
        if name.endswith("_blocks") and f"{plain}_scales" in found:
            rows, groups, half = shape[-3:]
            sides = (*shape[:-3], groups * half * 2, rows)
            yield plain, sides, "BF16", partial(_mxfp4_of, found, plain)
        elif dtype in _FP8:
            yield name, shape, "BF16", partial(_fp8_of, found, name, block)
        elif not _is_aside(name, found):
            yield name, shape, dtype, partial(found.read, name)


def _is_aside(name: str, found: _Tensors) -> bool:
    """Whether a tensor only serves another one that is unpacked."""
    if name.endswith(_DROPPED):
        return True
    if name.endswith("_scales"):
        return name.removesuffix("_scales") + "_blocks" in found
    base = next((name.removesuffix(end) for end in _SCALES if name.endswith(end)), None)
    return base is not None and base in found and found.head(base)[1] in _FP8


def fp8(weight: Tensor, scale: Tensor, block: Sequence[int] | None) -> Tensor:
    """Unpacked weight (..., O, I), from FP8 and its scales.

    Args:
        weight: FP8.
        scale: one number, one a row (..., O, 1), or one a block (..., O / b, I / c), the last of which
            may be cut.
        block: (b, c), where the configuration gives it.
    """
    values, scales = weight.float(), scale.float()
    if scales.numel() > 1 and block is not None and scales.dim() == values.dim():
        for side in (-2, -1):
            length = values.shape[side]
            scales = scales.repeat_interleave(int(block[side]), side).narrow(side, 0, length)
    elif scales.numel() > 1 and scales.dim() < values.dim():
        scales = scales[..., None]
    return (values * scales).to(DTYPE)


def _fp8_of(found: _Tensors, name: str, block: Any) -> Tensor:
    scale = next((name + end for end in _SCALES if name + end in found), f"{name}{_SCALES[0]}")
    return fp8(found.read(name), found.read(scale), block)


def _mxfp4_of(found: _Tensors, plain: str) -> Tensor:
    return mxfp4(found.read(f"{plain}_blocks"), found.read(f"{plain}_scales"))


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Unpacked weight (E, I, O), from blocks (E, O, G, 16) of two values a byte and scales (E, O, G).

    The low half of a byte comes first; a scale is an exponent of two with bias 127 (OCP MX 1.0).
    """
    table = torch.tensor([*_FP4, *(-x for x in _FP4)], dtype=DTYPE)
    values = torch.stack([table[(blocks & 15).int()], table[(blocks >> 4).int()]], dim=-1)
    values = torch.ldexp(values.flatten(-2), scales.int()[..., None] - 127)
    return values.flatten(-2).mT.to(DTYPE).contiguous()


# -- files -----------------------------------------------------------------------------------------


def make_room(room: int) -> Claim:
    """A scratch folder on a disk with room for so many bytes.

    Raises:
        StorageError: there is no such room.
    """
    place = Path(tempfile.gettempdir())
    free = shutil.disk_usage(place).free
    if room > free:
        raise StorageError(
            f"unpacking the checkpoint needs up to {room / 1e9:.1f} GB in {place}, where "
            f"{free / 1e9:.1f} GB are free: set TMPDIR to a larger disk"
        )
    return temporary("plain")


def _write(path: Path, plan: list[_Planned]) -> int:
    """Write a safetensors file tensor by tensor; returns the bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape, dtype, _ in plan:
        size = torch.Size(shape).numel() * _SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, shape, _, make in plan:
                tensor = make().contiguous()
                assert tuple(tensor.shape) == shape, name
                file.write(tensor.view(-1).view(torch.uint8).numpy().data)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from None
    return at


def _rest(folder: Path) -> list[Path]:
    """What of a checkpoint is neither its configuration nor weights beside it."""
    return [
        file
        for file in list_files(folder, ModelError)
        if file.parent != Path() or not _is_made_anew(file.name)
    ]


def _is_made_anew(name: str) -> bool:
    return name.endswith(".safetensors") or name in (INDEX, "config.json")


def _copy_rest(folder: Path, target: Path, config: dict[str, Any]) -> None:
    """Every other file, and the configuration without its quantisation.

    No links: those that lead out of a model's folder are followed nowhere, not even ours.
    """
    for file in _rest(folder):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        try:
            _take(folder / file, target / file)
        except OSError as error:
            raise StorageError(f"cannot write {target / file}: {error.strerror or error}") from None
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(plain.get("text_config"), dict):
        inner = plain["text_config"]
        plain["text_config"] = {k: v for k, v in inner.items() if k != "quantization_config"}
    (target / "config.json").write_text(json.dumps(plain, indent=2), encoding="utf-8")


def _take(file: Path, target: Path) -> None:
    """A second name of the file, or a copy where that cannot be: on another disk, of another user's."""
    try:
        target.hardlink_to(file.resolve())
    except OSError:
        shutil.copyfile(file, target)
