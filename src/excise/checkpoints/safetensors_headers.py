"""Read the headers of safetensors files within limits, and check them against the file.

After `read_header` every name is unique, every shape fits its bytes, and the tensors' bytes fill the
file without a gap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from excise.errors import InputError, ModelError
from excise.reading import check_regular, parse_json
from excise.visible import one_line

# Bits of an element, by the name of its dtype in a header.
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64, "BOOL": 8, "F4": 4, "F8_E8M0": 8}
BITS |= {f"{sign}{bits}": bits for sign in "IU" for bits in (8, 16, 32, 64)}
BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6}
FP8 = ("F8_E4M3", "F8_E5M2")
_LONGEST = 100_000_000  # bytes of a header, the limit of the safetensors library
_NAME = 500  # characters of the name of a tensor
_WHY = 300  # characters of the fault that a message shows
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its dtype as the header writes it, its shape, and the range of its bytes."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)

    def read_bytes(self) -> bytearray:
        """Read its bytes as they are stored.

        Raises:
            ModelError: the file is no longer as it was.
        """
        data = bytearray(self.stop - self.start)
        try:
            with self.file.open("rb") as file:
                file.seek(self.start)
                got = file.readinto(data)
        except OSError as problem:
            raise ModelError(f"weights {self.file} cannot be read: {problem.strerror}") from None
        if got != len(data):
            raise _corrupt(self.file, f"it ends inside tensor {self.name}")
        return data


class _BadHeader(InputError):
    """Fault of a header, without the file's name."""


def is_pointer(file: Path) -> bool:
    """Return whether a file is a Git LFS pointer, left in place of one that was not fetched."""
    with file.open("rb") as stream:
        return stream.read(len(_POINTER)) == _POINTER


def read_header(file: Path) -> list[StoredTensor]:
    """List the tensors of a safetensors file, in the order of its header.

    Raises:
        ModelError: it cannot be read, is cut, or its header contradicts itself or the file.
    """
    size = check_regular(file, "weights", ModelError)
    try:
        with file.open("rb") as stream:
            begin = stream.read(8)
            length = int.from_bytes(begin, "little")
            if length <= min(_LONGEST, size - 8):
                text = stream.read(length)
    except OSError as problem:
        raise ModelError(f"weights {file} cannot be read: {problem.strerror}") from None
    if is_pointer(file):
        raise ModelError(
            f"weights {file} are a Git LFS pointer: fetch the file with `git lfs pull`"
        )
    if len(begin) < 8 or length > min(_LONGEST, size - 8):
        raise _corrupt(file, "its header is longer than the file or than a header may be")
    try:
        return _parse(file, text, size - 8 - length)
    except _BadHeader as problem:
        raise _corrupt(file, str(problem)) from None


def count_elements(tensors: Sequence[StoredTensor]) -> int:
    """Count the elements of all these tensors."""
    return sum(tensor.elements for tensor in tensors)


def _parse(file: Path, text: bytes, size: int) -> list[StoredTensor]:
    header = parse_json(text, "its header", _BadHeader, pairs=_unique_keys)
    if not isinstance(header, dict):
        raise _BadHeader("its header is not a JSON object")
    header.pop("__metadata__", None)
    begin = 8 + len(text)
    found = [_stored(file, name, entry, begin) for name, entry in header.items()]
    end = begin
    for tensor in sorted(found, key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start != end:
            raise _BadHeader(f"the bytes of tensor {tensor.name} do not follow those before them")
        end = tensor.stop
    if end != begin + size:
        raise _BadHeader("its tensors are not as large as the file")
    return found


def _stored(file: Path, name: str, entry: Any, begin: int) -> StoredTensor:
    if len(name) > _NAME or not name.isprintable():
        raise _BadHeader(f"a tensor is named {name[:40]!a}")
    if not isinstance(entry, dict):
        raise _BadHeader(f"tensor {name} is not described")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _BadHeader(f"tensor {name} is of dtype {json.dumps(dtype)[:40]}, which is unknown")
    shape, offsets = _counts(entry.get("shape")), _counts(entry.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise _BadHeader(f"the shape or place of tensor {name} is not of whole numbers")
    start, stop = offsets
    if math.prod(shape) * BITS[dtype] != 8 * (stop - start):
        raise _BadHeader(f"the shape of tensor {name} does not fit its bytes")
    return StoredTensor(file, name, dtype, shape, begin + start, begin + stop)


def _counts(values: Any) -> tuple[int, ...] | None:
    if not isinstance(values, list) or len(values) > 16:
        return None
    fit = all(type(value) is int and 0 <= value < 1 << 62 for value in values)
    return tuple(values) if fit else None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a table; refuse a key that is written twice."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _BadHeader(f"{twice} stands there twice")
    return table


def _corrupt(file: Path, why: str) -> ModelError:
    return ModelError(
        f"weights {file} are truncated or corrupt ({one_line(why, _WHY)}): download the file again"
    )
