"""Read the header of a GGUF file: its keys, and where its tensors are. No tensor is read here.

gguf-py's own reader makes an object of every token of the vocabulary; this one steps over long arrays
and keeps their length only, so that its memory does not grow with the vocabulary.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from excise.errors import ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SHARD = re.compile(r"^(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
# Value types of the format: struct codes of the scalar ones; 8 is a string, 9 an array.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_KEPT = 1024  # arrays of scalars up to this length are kept
_DIMENSIONS = 4


@dataclass(frozen=True)
class LongArray:
    """An array that was stepped over."""

    count: int


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: `shape` is row-major, as torch has it; `start` and `stop` are its bytes."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, the last dimension."""
        block, size = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * size


@dataclass(frozen=True)
class GgufFile:
    """The header of one file."""

    path: Path
    keys: dict[str, Any]
    tensors: dict[str, GgufTensor]
    size: int

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, such as "qwen3"."""
        return str(self.keys.get("general.architecture", ""))

    def hyper(self, name: str) -> Any:
        """A key of the architecture's own, such as "block_count"; None where it is not there."""
        return self.keys.get(f"{self.architecture}.{name}")


class _Cursor:
    """Reads forward through the mapped bytes of a header."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.at = 0

    def scalar(self, code: str) -> Any:
        value = struct.unpack_from(f"<{code}", self._data, self.at)[0]
        self.at += struct.calcsize(code)
        return value

    def string(self) -> str:
        size = self.scalar("Q")
        end = self.at + size
        if end > len(self._data):
            raise struct.error("a string runs past the end")
        text = self._data[self.at : end].decode("utf-8", errors="replace")
        self.at = end
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise struct.error(f"value type {kind} is not known")
        return self.scalar(_SCALARS[kind])

    def _array(self) -> Any:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind in _SCALARS and count > _KEPT:
            self.at += count * struct.calcsize(_SCALARS[kind])
            return LongArray(count)
        if kind == _STRING and count > _KEPT:
            for _ in range(count):
                self.at += 8 + struct.unpack_from("<Q", self._data, self.at)[0]
            return LongArray(count)
        if count > len(self._data):
            raise struct.error("an array runs past the end")
        return [self.value(kind) for _ in range(count)]


def read_gguf(path: Path) -> GgufFile:
    """The header of a GGUF file, checked to be whole.

    Raises:
        ModelError: no such file, not a GGUF, of a version or type that is not known, or truncated.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != _MAGIC:
                raise ModelError(f"{path} is not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data)
    except FileNotFoundError:
        raise ModelError(f"GGUF file {path} does not exist") from None
    except OSError as error:
        raise ModelError(f"GGUF file {path} cannot be read: {error.strerror}") from None
    except (struct.error, ValueError, MemoryError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"GGUF file {path} is truncated or corrupt ({error}): download it again"
        ) from None


def _parse(path: Path, data: mmap.mmap) -> GgufFile:
    cursor = _Cursor(data)
    cursor.at = len(_MAGIC)
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        raise ModelError(f"GGUF file {path} has version {version}; only 2 and 3 can be read here")
    tensor_count, key_count = cursor.scalar("Q"), cursor.scalar("Q")
    keys: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string()
        keys[key] = cursor.value(cursor.scalar("I"))
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = int(keys.get("general.alignment", 32))
    start = -(-cursor.at // alignment) * alignment
    tensors = {name: _place(name, kind, shape, start + at) for name, kind, shape, at in infos}
    end = max((tensor.stop for tensor in tensors.values()), default=start)
    if end > len(data):
        raise ValueError(f"it has {len(data):,} bytes and its tensors end at {end:,}")
    return GgufFile(path, keys, tensors, len(data))


def _tensor_info(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name = cursor.string()
    dimensions = cursor.scalar("I")
    if dimensions > _DIMENSIONS:
        raise ValueError(f"tensor {name} has {dimensions} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(dimensions))
    kind, offset = cursor.scalar("I"), cursor.scalar("Q")
    return name, kind, tuple(reversed(shape)), offset


def _place(name: str, kind: int, shape: tuple[int, ...], start: int) -> GgufTensor:
    qtype = GGMLQuantizationType(kind)  # a ValueError for a type that is not known
    block, size = GGML_QUANT_SIZES[qtype]
    count = 1
    for length in shape:
        count *= length
    return GgufTensor(name, qtype, shape, start, start + count // block * size)


def read_shards(path: Path) -> list[GgufFile]:
    """The header of `path`, or of all the files that it is one of, where it was split.

    Raises:
        ModelError: as `read_gguf`, or a file of a split is missing.
    """
    match = _SHARD.match(path.name)
    if match is None:
        return [read_gguf(path)]
    count = int(match["count"])
    names = [f"{match['name']}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]
    for name in names:
        if not path.with_name(name).is_file():
            raise ModelError(f"{path} is one of {count} files, and {name} is missing beside it")
    return [read_gguf(path.with_name(name)) for name in names]
