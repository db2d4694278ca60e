"""Read the header of a GGUF file: its keys, and where its tensors are. No tensor is read here.

gguf-py's own reader makes an object of every token of the vocabulary. This one skips long arrays and
keeps only their length, so its memory does not grow with the vocabulary. It runs before every library
that reads such a file: the header is checked against limits that real files keep, and against the
file's own length.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    TensorNameMap,
    get_tensor_name_map,
)

from excise.errors import ModelError
from excise.reading import check_regular, is_file

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
# Real files stay far below these; libraries take minutes or gigabytes for headers that do not.
_MOST = 1 << 16  # keys, tensors
_LONGEST_ARRAY = 700_000  # the longest known, the merges of Gemma 3, has 515,000
_LONGEST_TEXT = 1 << 23  # bytes: of one string
_LONGEST_ITEM = 1 << 12  # bytes: of a string in an array, such as a token
_LARGEST_HEADER = 1 << 27  # bytes
_MOST_LAYERS = 1 << 10
_LARGEST_SIZE = 1 << 24
_LONGEST_TEXTS = 1 << 31  # tokens: of a text that a model reads
_LAYER = re.compile(r"\bblk\.(\d{1,4})\.")


@dataclass(frozen=True)
class LongArray:
    """Array that was skipped, with its length."""

    count: int


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: `shape` is row-major, as in torch; its bytes are start <= byte < stop."""

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
    """Header of one file."""

    path: Path
    keys: dict[str, Any]
    tensors: dict[str, GgufTensor]
    size: int
    keys_start: int = 0  # the bytes of the keys in the file, and where they end
    keys_stop: int = 0

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, such as "qwen3"."""
        return str(self.keys.get("general.architecture", ""))[:64]

    def hyper(self, name: str) -> Any:
        """Return a key of the architecture's own, such as "block_count"; None where it is missing."""
        return self.keys.get(f"{self.architecture}.{name}")

    @property
    def parts(self) -> int:
        """Number of files that the model is split into; 1 where it is not."""
        count = self.keys.get("split.count", 1)
        return count if type(count) is int and count > 1 else 1


class _Cursor:
    """Reader that moves forward through the mapped bytes of a header."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self._data = data
        self._end = min(len(data), _LARGEST_HEADER)
        self.at = at

    def scalar(self, code: str) -> Any:
        size = struct.calcsize(code)
        self._check(size)
        value = struct.unpack_from(f"<{code}", self._data, self.at)[0]
        self.at += size
        return value

    def string(self) -> str:
        size = self.scalar("Q")
        if size > _LONGEST_TEXT:
            raise ValueError(f"a text of {size:,} bytes")
        self._check(size)
        raw = self._data[self.at : self.at + size]
        self.at += size
        return _text(raw)

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise ValueError(f"value type {kind} is not known")
        return self.scalar(_SCALARS[kind])

    def _array(self) -> Any:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _ARRAY:
            raise ValueError("an array of arrays")
        if count > _LONGEST_ARRAY:
            raise ValueError(f"an array of {count:,} values")
        if kind in _SCALARS and count > _KEPT:
            size = count * struct.calcsize(_SCALARS[kind])
            self._check(size)
            self.at += size
            return LongArray(count)
        if kind == _STRING:
            return self._strings(count)
        return [self.value(kind) for _ in range(count)]

    def _strings(self, count: int) -> Any:
        data, end, size_of = self._data, self._end, struct.Struct("<Q").unpack_from
        kept, at = [], self.at
        for _ in range(count):
            start = at + 8
            at = start + (size_of(data, at)[0] if start <= end else 0)
            if start > end or at > end or at - start > _LONGEST_ITEM:
                raise ValueError("a list of texts that runs past the end, or holds very long ones")
            if count <= _KEPT:
                kept.append(_text(data[start:at]))
        self.at = at
        return kept if count <= _KEPT else LongArray(count)

    def _check(self, size: int) -> None:
        if self.at + size > self._end:
            raise ValueError(
                "its header runs past the end"
                if self._end == len(self._data)
                else f"its header is longer than {_LARGEST_HEADER / 1e6:.0f} MB"
            )


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("a text that is not UTF-8") from None


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file and check that the file is whole.

    Raises:
        ModelError: no such file, not a GGUF, of a version or type that is not known, truncated, or of
            sizes that no model has.
    """
    check_regular(path, "GGUF file", ModelError)
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ModelError(f"{path} is not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data)
    except OSError as error:
        raise ModelError(f"GGUF file {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"GGUF file {path} is truncated or corrupt ({error}): download it again"
        ) from None


def _parse(path: Path, data: mmap.mmap) -> GgufFile:
    cursor = _Cursor(data, len(_MAGIC))
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        raise ModelError(f"GGUF file {path} has version {version}; only 2 and 3 can be read here")
    tensor_count, key_count = cursor.scalar("Q"), cursor.scalar("Q")
    if max(tensor_count, key_count) > _MOST:
        raise ValueError(f"{tensor_count:,} tensors and {key_count:,} keys")
    keys: dict[str, Any] = {}
    keys_start = cursor.at
    for _ in range(key_count):
        key = cursor.string()
        if key in keys:
            raise ValueError(f"two values of {key[:80]!r}")
        keys[key] = cursor.value(cursor.scalar("I"))
    keys_stop = cursor.at
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = keys.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= _MOST or alignment & (alignment - 1):
        raise ValueError(f"an alignment of {alignment!r:.20}")
    start = -(-cursor.at // alignment) * alignment
    tensors = {name: _place(name, kind, shape, start + at) for name, kind, shape, at in infos}
    if len(tensors) < len(infos):
        raise ValueError("two tensors of one name")
    _check_places(tensors.values(), len(data))
    return GgufFile(path, keys, tensors, len(data), keys_start, keys_stop)


def _tensor_info(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name = cursor.string()
    dimensions = cursor.scalar("I")
    if not 0 < dimensions <= _DIMENSIONS:
        raise ValueError(f"tensor {name[:80]!r} has {dimensions} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(dimensions))
    kind, offset = cursor.scalar("I"), cursor.scalar("Q")
    return name, kind, tuple(reversed(shape)), offset


def _place(name: str, kind: int, shape: tuple[int, ...], start: int) -> GgufTensor:
    try:
        qtype = GGMLQuantizationType(kind)
        block, size = GGML_QUANT_SIZES[qtype]
    except (ValueError, KeyError):
        raise ValueError(f"tensor {name[:80]!r} is of type {kind}, which is not known") from None
    if min(shape) < 1 or shape[-1] % block:
        raise ValueError(f"tensor {name[:80]!r} has the shape {shape} in {qtype.name}")
    return GgufTensor(name, qtype, shape, start, start + math.prod(shape) // block * size)


def _check_places(tensors: Iterable[GgufTensor], size: int) -> None:
    """Refuse tensors that lie outside the file or overlap."""
    last = None
    for tensor in sorted(tensors, key=lambda t: (t.start, t.stop)):
        if tensor.stop > size:
            raise ValueError(f"it has {size:,} bytes and its tensors end at {tensor.stop:,}")
        if last is not None and tensor.start < last.stop:
            raise ValueError(
                f"tensors {last.name[:80]!r} and {tensor.name[:80]!r} lie upon each other"
            )
        last = tensor


def shard_names(name: str) -> list[str]:
    """List the file names of a split model, one of which is `name`; `name` alone where it is not split."""
    match = _SHARD.match(name)
    if match is None:
        return [name]
    count = int(match["count"])
    return [f"{match['name']}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]


def read_shards(path: Path) -> list[GgufFile]:
    """Read the header of `path` and, where it is one file of a split model, those of all the others.

    Raises:
        ModelError: as `read_gguf`; a file of a split is missing, or they do not belong together.
    """
    head = read_gguf(path)
    names = shard_names(path.name)
    if head.parts == 1 and len(names) == 1:
        return [head]
    if head.parts != len(names) or path.name not in names:
        raise ModelError(
            f"{path} says itself that its model is in {head.parts} file(s), and its name says "
            f"{len(names)}: call it as it was (NAME-00001-of-0000N.gguf where it was split), or join the "
            "parts with llama-gguf-split --merge"
        )
    for name in names:
        if not is_file(path.with_name(name)):
            raise ModelError(
                f"{path} is one of {len(names)} files, and {name} is missing beside it"
            )
    shards = [read_gguf(path.with_name(name)) for name in names]
    for number, shard in enumerate(shards):
        if shard.parts != len(names) or shard.keys.get("split.no") != number:
            raise ModelError(
                f"{shard.path} is not part {number + 1} of {len(names)}, as it is called"
            )
    total = sum(len(shard.tensors) for shard in shards)
    if shards[0].keys.get("split.tensors.count", total) != total:
        raise ModelError(
            f"{shards[0].path} says that its parts hold {shards[0].keys['split.tensors.count']} tensors "
            f"in all, and they hold {total}: take all parts from one download"
        )
    if len({name for shard in shards for name in shard.tensors}) < total:
        raise ModelError(f"the parts of {path} hold some tensors twice: are they of one model?")
    return shards


def check_sizes(shards: Sequence[GgufFile]) -> None:
    """Refuse a language model whose header does not agree with its tensors.

    Raises:
        ModelError: a layer has no tensor, or a size is not that of any tensor or of any real model.
    """
    head = shards[0]
    if head.architecture == "clip" or head.keys.get("general.type", "model") != "model":
        raise ModelError(f"{head.path} is no language model, but a projector, adapter or the like")
    tensors = {name: tensor for shard in shards for name, tensor in shard.tensors.items()}
    for key, value in head.keys.items():
        numbers = value if isinstance(value, list) else [value]
        if key.startswith("split.") or not key.startswith(f"{head.architecture}."):
            continue
        most = _LONGEST_TEXTS if key.endswith(("context_length", "context")) else _LARGEST_SIZE
        wrong = next((n for n in numbers if type(n) is int and not -1 <= n <= most), None)
        if wrong is not None:
            raise ModelError(
                f"{head.path} says {key[:80]!r} = {wrong:,}, which is the size of no model"
            )
    needed = ["context_length", "embedding_length"]
    if any("attn_q" in name for name in tensors):
        needed.append("attention.head_count")
    epsilons = [head.hyper(f"attention.layer_norm{rms}_epsilon") for rms in ("", "_rms")]
    lacking = [key for key in needed if head.hyper(key) is None]
    if lacking or not any(type(value) is float for value in epsilons):
        key = [*lacking, "attention.layer_norm_epsilon"][0]
        raise ModelError(
            f"{head.path} does not say {f'{head.architecture}.{key}'!r}: it is incomplete"
        )
    layers = head.hyper("block_count")
    if type(layers) is not int or not 0 < layers <= _MOST_LAYERS:
        raise ModelError(f"{head.path} says that it has {layers!r:.40} layers (block_count)")
    held = {int(found[1]) for name in tensors if (found := _LAYER.search(name))}
    missing = next((n for n in range(layers) if n not in held), None)
    if missing is not None:
        raise ModelError(
            f"{head.path} says that it has {layers} layers, and no tensor of layer {missing} is in it: "
            "download it again, with all its parts"
        )
    if max(held) >= layers:
        raise ModelError(
            f"{head.path} says that it has {layers} layers, and holds layer {max(held)}"
        )
    experts = head.hyper("expert_count") or 0
    fused = {t.shape[0] for t in tensors.values() if len(t.shape) == 3}
    last = f"blk.0.ffn_down.{experts - 1}.weight" if type(experts) is int else ""
    if experts and not (last in tensors or (last and experts in fused)):
        raise ModelError(f"{head.path} says that it has {experts!r:.40} experts, and holds others")


def name_map(head: GgufFile) -> TensorNameMap:
    """Return gguf-py's map from parameter names of a Transformers checkpoint to tensor names of this GGUF.

    Raises:
        ModelError: gguf-py does not know its architecture.
    """
    by_name = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    arch: MODEL_ARCH | None = by_name.get(head.architecture)
    blocks = head.hyper("block_count")
    if arch is None or not isinstance(blocks, int):
        raise ModelError(
            f"{head.path} is of the architecture {head.architecture!r}, which the installed gguf "
            "package does not know: update it, or take a GGUF of the language model itself"
        )
    return get_tensor_name_map(arch, blocks)


def gguf_name(names: TensorNameMap, name: str) -> str | None:
    """Return the GGUF's name of a parameter, or None."""
    plain = re.sub(r"\blanguage_model\.(model\.)?", "", name)
    return names.get_name(plain, try_suffixes=(".weight", ".bias"))
