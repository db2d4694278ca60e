"""Dequantise a checkpoint to a plain bfloat16 copy, which is then searched, edited and exported.

Reads FP8 with scales per block, row or tensor, and MXFP4 as gpt-oss stores it. Each quantised tensor is
decoded by its format's own formula, rounded once to bfloat16, and stored under the name that the
unquantised model has. Every other tensor is copied as it is, also those that no class loads. The copy
lies in a scratch folder and is removed with the model.

Where only the configuration claims a quantisation, the copy differs in that configuration alone.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from excise.checkpoints.model_folder import CONFIG, INDEX, is_other_form, read_tensors
from excise.checkpoints.quantisation import (
    SCALES,
    Scheme,
    check_mxfp4,
    check_scale,
    is_pair,
    scale_layout,
)
from excise.checkpoints.safetensors_headers import BITS, FP8, StoredTensor
from excise.errors import ModelError, StorageError
from excise.files import Claim, temporary
from excise.folders import list_files

DTYPE = torch.bfloat16
# Scales of activations: no use without the kernels that read them.
_DROPPED = ("activation_scale", "input_scale", "k_scale", "v_scale")
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_WORDS = {"fp8": "FP8", "mxfp4": "MXFP4", "compressed-tensors": "FP8 (compressed-tensors)"}
UNPACKED = "The source is {}, unpacked to bfloat16: the search and its figures are of that."
_LEFT_OVER = (
    "The source's configuration says that it is quantised with {}, and its weights are plain: they are "
    "what was measured, and an export's configuration says nothing of it."
)


_NONE = Scheme(None, None)


@dataclass(frozen=True)
class Plain:
    """Plain copy.

    Attributes:
        folder: of the copy; `scratch` removes it.
        note: a sentence on what it was made from.
        source: the checkpoint's folder, or the GGUF file.
        scheme: how the checkpoint is quantised; of a GGUF file or a plain one, none.
    """

    folder: Path
    note: str
    scratch: Claim
    source: Path
    scheme: Scheme = _NONE

    @property
    def packed(self) -> str | None:
        """What the source's own scheme is called; None where its tensors are plain, or in a GGUF."""
        return _WORDS[self.scheme.method] if self.scheme.method is not None else None


def dequantise(
    folder: Path, files: Sequence[Path], config: dict[str, Any], found: Scheme
) -> Plain | None:
    """Make a plain copy of the safetensors checkpoint in `folder`; None where it is plain and says so.

    Args:
        folder: the checkpoint.
        files: its weight files.
        config: its config.json.
        found: from `find_scheme`.

    Raises:
        ModelError: a quantised tensor lacks its scales, or they do not fit.
        StorageError: no room.
    """
    if found.method is None and found.claim is None:
        return None
    packed = _Tensors(files)
    plans = {} if found.method is None else {f: list(_plan(packed, f, found.block)) for f in files}
    rest = [
        folder / file for file in list_files(folder, ModelError) if not _is_rewritten(file, plans)
    ]
    need = (4 if found.method == "mxfp4" else 2) * sum(file.stat().st_size for file in plans)
    scratch = claim_scratch(need + sum(file.stat().st_size for file in rest))
    target = scratch.path
    for file in rest:
        _link_or_copy(file, target / file.relative_to(folder))
    total = sum(_write(target / file.name, plan) for file, plan in plans.items())
    if plans:
        weight_map = {name: file.name for file, plan in plans.items() for name, *_ in plan}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(target / INDEX, index)
    _write_json(target / CONFIG, _without_quantisation(config))
    note = _LEFT_OVER.format(found.claim)
    if found.method is not None:
        note = UNPACKED.format(_WORDS[found.method])
    return Plain(target, note, scratch, folder, found)


class _Tensors:
    """All tensors of a checkpoint, by name, whatever shard they are stored in."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.by_name = {tensor.name: tensor for tensor in read_tensors(files)}
        self.names = set(self.by_name)

    def of_file(self, file: Path) -> list[StoredTensor]:
        """List the tensors of one file, sorted by name."""
        return sorted((t for t in self.by_name.values() if t.file == file), key=lambda t: t.name)

    def get(self, name: str) -> StoredTensor:
        """Return where a tensor is stored.

        Raises:
            ModelError: there is none.
        """
        if name not in self.by_name:
            raise ModelError(
                f"the checkpoint has no tensor {name}, which another one is packed with"
            )
        return self.by_name[name]

    def read(self, name: str) -> Tensor:
        """Read a tensor as it is stored."""
        return tensor_of(self.get(name))


def tensor_of(stored: StoredTensor, part: int | None = None) -> Tensor:
    """Read a tensor as it is stored, or one part of it along its first dimension."""
    with safe_open(stored.file, framework="pt") as file:
        if part is not None:
            return file.get_slice(stored.name)[part]  # type: ignore[no-any-return]
        return file.get_tensor(stored.name)  # type: ignore[no-any-return]


# Name, shape and dtype of a tensor of the copy, and how it is made.
_Planned = tuple[str, tuple[int, ...], str, Callable[[], Tensor]]


def _plan(found: _Tensors, file: Path, block: tuple[int, int] | None) -> Iterator[_Planned]:
    """Yield every tensor of the plain copy of one file, and how it is made."""
    for tensor in found.of_file(file):
        name, shape = tensor.name, tensor.shape
        plain = name.removesuffix("_blocks")
        if is_pair(name, found.names):
            check_mxfp4(tensor, found.get(f"{plain}_scales"))
            rows, groups, half = shape[-3:]
            sides = (*shape[:-3], groups * half * 2, rows)
            yield plain, sides, "BF16", partial(_mxfp4_of, found, plain)
        elif tensor.dtype in FP8:
            ends = (name + end for end in SCALES if name + end in found.names)
            scale = found.get(next(ends, f"{name}{SCALES[0]}"))
            check_scale(tensor, scale, block)
            yield name, shape, "BF16", partial(_fp8_of, found, name, scale.name, block)
        elif not _is_auxiliary(name, found):
            yield name, shape, tensor.dtype, partial(_as_stored, tensor)


def _as_stored(tensor: StoredTensor) -> Tensor:
    return torch.frombuffer(tensor.read_bytes(), dtype=torch.uint8) if tensor.elements else _EMPTY


_EMPTY = torch.empty(0, dtype=torch.uint8)


def _is_auxiliary(name: str, found: _Tensors) -> bool:
    """Return whether a tensor only serves to decode another one."""
    if name.endswith(_DROPPED):
        return True
    if name.endswith("_scales"):
        return name.removesuffix("_scales") + "_blocks" in found.names
    base = next((name.removesuffix(end) for end in SCALES if name.endswith(end)), None)
    return base is not None and base in found.names and found.get(base).dtype in FP8


def fp8(weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """Decode an FP8 weight (..., O, I), rounded to bfloat16.

    Args:
        weight: FP8.
        scale: one number, one per row (..., O, 1), or one per block (..., O / b, I / c), the last of which
            may be cut.
        block: (b, c), where the configuration gives it.
    """
    return wide_fp8(weight, scale, block).to(DTYPE)


def wide_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """Decode as `fp8`, to float32."""
    values, scales = weight.float(), scale.float()
    spread = scale_layout(weight.shape, scale.shape, block)
    if spread == "blocks" and block is not None:
        for side, length in zip((-2, -1), block, strict=True):
            scales = scales.repeat_interleave(length, side).narrow(side, 0, values.shape[side])
    elif spread == "rows" and scales.dim() < values.dim():
        scales = scales[..., None]
    return values * scales


def _fp8_of(found: _Tensors, name: str, scale: str, block: tuple[int, int] | None) -> Tensor:
    return fp8(found.read(name), found.read(scale), block)


def _mxfp4_of(found: _Tensors, plain: str) -> Tensor:
    return mxfp4(found.read(f"{plain}_blocks"), found.read(f"{plain}_scales"))


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Decode an MXFP4 weight to (E, I, O).

    Args:
        blocks: (E, O, G, 16) bytes of two values each, the low half first.
        scales: (E, O, G) exponents of two with bias 127 (OCP Microscaling Formats 1.0).
    """
    table = torch.tensor([*_FP4, *(-x for x in _FP4)], dtype=DTYPE)
    values = torch.stack([table[(blocks & 15).int()], table[(blocks >> 4).int()]], dim=-1)
    values = torch.ldexp(values.flatten(-2), scales.int()[..., None] - 127)
    return values.flatten(-2).mT.to(DTYPE).contiguous()


# -- files -----------------------------------------------------------------------------------------


def claim_scratch(room: int) -> Claim:
    """Claim a scratch folder on a disk with room for so many bytes.

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
    """Write a safetensors file tensor by tensor; return the bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape, dtype, _ in plan:
        size = math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, shape, dtype, make in plan:
                data = make().contiguous().view(-1).view(torch.uint8)
                assert 8 * data.numel() == math.prod(shape) * BITS[dtype], name
                file.write(data.numpy().data)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from None
    return at


def _is_rewritten(file: Path, plans: Mapping[Path, Any]) -> bool:
    """Return whether the copy has its own version of a source's file, or does without it."""
    name = file.name
    if is_other_form(name):
        return True
    beside = file.parent == Path()
    return beside and (
        name == CONFIG or (bool(plans) and (name.endswith(".safetensors") or name == INDEX))
    )


def _without_quantisation(config: dict[str, Any]) -> dict[str, Any]:
    """Drop the quantisation settings from a configuration."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(plain.get("text_config"), dict):
        inner = plain["text_config"]
        plain["text_config"] = {k: v for k, v in inner.items() if k != "quantization_config"}
    return plain


def _write_json(path: Path, data: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(data, indent=1), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from None


def _link_or_copy(file: Path, target: Path) -> None:
    """Hard-link a file, or copy it where that cannot be: on another disk, of another user's.

    Not a symbolic link: one that leads out of a model's folder is refused, even ours.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.hardlink_to(file.resolve())
        except OSError:
            shutil.copyfile(file, target)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from None
