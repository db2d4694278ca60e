"""Headers of safetensors and GGUF files, taken apart, changed in one place, and put together again."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from fuzz.mutations import change_bytes
from fuzz.values import Pairs, change_tree, odd, shown, to_json

_DTYPES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
}
_WAYS = (
    "length json json tensor tensor tensor lost renamed twice body body bits bits bits nan bytes "
    "swapped metadata"
).split()
_EDGES = (0, 1, 7, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def change_safetensors(data: bytes, draw: Random) -> tuple[bytes, str]:
    """One change of a safetensors file: length, header, offsets, names, or bits of its tensors."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    how = draw.choice(_WAYS)
    if how == "length":
        value = draw.choice([*_EDGES, size - 1, size + 1, len(data), len(data) - 8])
        return value.to_bytes(8, "little") + data[8:], f"header length {value}"
    if how == "json":
        header, what = change_tree(header, draw)
        return _joined(to_json(header), body), what
    if how == "body":
        less = draw.choice([1, 4, 4096, len(body) // 2, len(body)])
        more = draw.random() < 0.3
        return _joined(json.dumps(header), body + b"\0" * less if more else body[:-less]), (
            f"{less} bytes {'more' if more else 'less'}"
        )
    if how in ("bits", "nan"):
        start, stop = header[name]["data_offsets"]
        return _bits(
            data[: 8 + size], body, draw.randrange(start, max(stop, start + 1)), how, draw, name
        )
    if how == "bytes":
        return change_bytes(data, draw)
    changed, body, what = _changed_entry(header, body, name, names, how, draw)
    return _joined(changed, body), what


def _joined(header: str, body: bytes) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + body


def _changed_entry(
    header: dict[str, Any], body: bytes, name: str, names: list[str], how: str, draw: Random
) -> tuple[str, bytes, str]:
    entry, other = header[name], draw.choice(names)
    if how == "lost":
        del header[name]
    elif how == "renamed":
        header[draw.choice([name + "x", name.replace(".0.", ".7."), "\x1b[2J", other])] = (
            header.pop(name)
        )
    elif how == "twice":
        return to_json(Pairs([*header.items(), (name, header[other])])), body, f"{name} twice"
    elif how == "swapped":
        header[name], header[other] = header[other], header[name]
    elif how == "metadata":
        header["__metadata__"] = odd(draw)
    else:
        field_, value = _other(entry, draw)
        header[name] = {**entry, field_: value}
        return to_json(header), body, f"{name}.{field_} = {shown(value)}"
    return to_json(header), body, f"{how} {name}"


def _other(entry: dict[str, Any], draw: Random) -> tuple[str, Any]:
    start, stop = entry["data_offsets"]
    shape = list(entry["shape"])
    changed: list[tuple[str, Any]] = [
        ("dtype", draw.choice([*_DTYPES, "F4", "f32", "", None, 7])),
        ("shape", shape[::-1]),
        ("shape", [math.prod(shape)]),
        ("shape", [*shape, 1]),
        ("shape", [draw.choice([*_EDGES, -1]), *shape[1:]]),
        ("shape", []),
        ("data_offsets", [start + 4, stop + 4]),
        ("data_offsets", [stop, start]),
        ("data_offsets", [start, draw.choice(_EDGES)]),
        ("data_offsets", [0, stop - start]),
        ("data_offsets", [start]),
    ]
    return draw.choice(changed)


def _bits(
    head: bytes, body: bytes, at: int, how: str, draw: Random, name: str
) -> tuple[bytes, str]:
    changed = bytearray(body)
    if how == "nan":
        at -= at % 4
        changed[at : at + 4] = struct.pack("<f", draw.choice([math.nan, math.inf, 1e38, -1e30]))
        return head + bytes(changed), f"an odd number at byte {at} of {name}"
    for place in {at, draw.randrange(len(body))} if draw.random() < 0.5 else {at}:
        changed[place] ^= 1 << draw.randrange(8)
    return head + bytes(changed), f"bits near byte {at} of {name}"


# -- GGUF ------------------------------------------------------------------------------------------

_STRING, _ARRAY = 8, 9
_KEYS = (
    ("general.alignment", 4), ("split.count", 2), ("split.no", 2), ("split.tensors.count", 5),
    ("tokenizer.ggml.add_bos_token", 7), ("general.quantization_version", 4),
    ("qwen3.expert_count", 4), ("qwen3.rope.scaling.factor", 6), ("general.license", 8),
)  # fmt: skip
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class Info:
    """What the header says of one tensor."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class Gguf:
    """A GGUF file: its keys with their types, and what follows its header."""

    keys: list[tuple[str, int, Any]]
    infos: list[Info]
    body: bytes
    magic: bytes = b"GGUF"
    version: int = 3
    counts: tuple[int, int] | None = None
    extra: dict[str, int] = field(
        default_factory=dict
    )  # string -> the length that is written for it

    def encode(self) -> bytes:
        """Its bytes."""
        tensors, keys = self.counts or (len(self.infos), len(self.keys))
        out = [self.magic, struct.pack("<IQQ", self.version % 2**32, tensors % 2**64, keys % 2**64)]
        for key, kind, value in self.keys:
            out += [self._text(key), struct.pack("<I", kind), self._value(kind, value)]
        for info in self.infos:
            out += [self._text(info.name), struct.pack("<I", len(info.shape))]
            out += [struct.pack("<Q", n % 2**64) for n in info.shape]
            out.append(struct.pack("<IQ", info.type, info.offset % 2**64))
        head = b"".join(out)
        return head + b"\0" * (-len(head) % 32) + self.body

    def _text(self, text: str) -> bytes:
        data = text.encode("utf-8", "surrogatepass")
        return struct.pack("<Q", self.extra.get(text, len(data))) + data

    def _value(self, kind: int, value: Any) -> bytes:
        if kind == _STRING:
            return self._text(value)
        if kind == _ARRAY:
            inner, count, items = value
            parts = [self._value(inner, one) for one in items]
            return struct.pack("<IQ", inner, count % 2**64) + b"".join(parts)
        return struct.pack(f"<{_CODES[kind]}", value)


def parse(data: bytes) -> Gguf:
    """A sound GGUF file, taken apart."""
    at = 4

    def read(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from(f"<{code}", data, at)
        at += struct.calcsize(f"<{code}")
        return value

    def text() -> str:
        nonlocal at
        size = read("Q")
        at += size
        return data[at - size : at].decode()

    def value(kind: int) -> Any:
        if kind == _ARRAY:
            inner, count = read("I"), read("Q")
            return inner, count, [value(inner) for _ in range(count)]
        return text() if kind == _STRING else read(_CODES[kind])

    version, tensors, keys = read("I"), read("Q"), read("Q")
    pairs = []
    for _ in range(keys):
        name, kind = text(), read("I")
        pairs.append((name, kind, value(kind)))
    infos = []
    for _ in range(tensors):
        name, sides = text(), read("I")
        infos.append(Info(name, tuple(read("Q") for _ in range(sides)), read("I"), read("Q")))
    at += -at % 32
    return Gguf(pairs, infos, data[at:], version=version)


def change_gguf(data: bytes, draw: Random) -> tuple[bytes, str]:
    """One change of a GGUF file: counts, keys and their types, tensors, or bytes."""
    if draw.random() < 0.15:
        cut = draw.random() < 0.7  # what is of the header is met by the parser
        changed, what = change_bytes(data[:9000] if cut else data, draw)
        return (changed + data[9000:] if cut else changed), what
    file = parse(data)
    how = draw.choice(["frame"] * 2 + ["key"] * 5 + ["tensor"] * 5 + ["added"] * 2)
    change = {"frame": _frame, "key": _key, "tensor": _tensor, "added": _added}[how]
    changed_file, what = change(file, draw)
    return changed_file.encode(), what


def _frame(file: Gguf, draw: Random) -> tuple[Gguf, str]:
    tensors, keys = len(file.infos), len(file.keys)
    value = draw.choice([*_EDGES, tensors - 1, tensors + 1, keys - 1, keys + 1])
    version = draw.choice([0, 1, 2, 4, 2**32 - 1, 3 << 24])
    text = draw.choice([*(k for k, _, _ in file.keys), *(i.name for i in file.infos)])
    return draw.choice(
        [
            (replace(file, counts=(value, keys)), f"{value} tensors"),
            (replace(file, counts=(tensors, value)), f"{value} keys"),
            (replace(file, version=version), f"version {version}"),
            (replace(file, magic=b"GGML"), "another magic"),
            (replace(file, extra={text: value}), f"{text} is said to have {value} bytes"),
            (replace(file, body=file.body[: len(file.body) // 2]), "half of the tensors' bytes"),
            (replace(file, body=file.body[:-1]), "one byte less"),
        ]
    )


def _key(file: Gguf, draw: Random) -> tuple[Gguf, str]:
    at = draw.randrange(len(file.keys))
    name, kind, value = file.keys[at]
    how = draw.choice(["drop", "rename", "twice", "type", "value", "value", "value"])
    keys = list(file.keys)
    if how == "drop":
        del keys[at]
    elif how == "rename":
        keys[at] = (draw.choice([name + "x", name.upper(), "", "\x1b[2J"]), kind, value)
    elif how == "twice":
        keys.append(keys[draw.randrange(len(keys))])
    elif how == "type":
        keys[at] = (name, *_typed(draw))
    else:
        keys[at] = (name, kind, _renewed(kind, value, draw))
    said = shown(keys[at][2]) if how in ("type", "value") else ""
    return replace(file, keys=keys), f"key {name!a}: {how} {said}"


def _typed(draw: Random) -> tuple[int, Any]:
    """A value of any type."""
    nested: Any = (4, 1, [7])
    for _ in range(draw.choice([1, 3, 300])):
        nested = (_ARRAY, 1, [nested])
    values: list[tuple[int, Any]] = [
        (4, 7), (5, -1), (6, 0.5), (7, True), (8, "x"), (8, "\x1b[2J\x00"), (10, 2**64 - 1),
        (11, -(2**63)), (12, math.nan), (9, (4, 0, [])), (9, (8, 2**64 - 1, [])), (9, (0, 2**40, [])),
        (9, nested), (9, (77, 1, [])),
    ]  # fmt: skip
    return draw.choice(values)


def _renewed(kind: int, value: Any, draw: Random) -> Any:
    if kind == _STRING:
        return draw.choice(
            ["", "x", value + "x", "qwen2", "llama", "gpt2", "{{", "\x1b[2J", "\x00", "x" * 9999]
        )
    if kind == _ARRAY:
        inner, count, items = value
        changed = [
            items[:-1],
            items[1:],
            items[::-1],
            [*items, *items[:1]],
            [],
            items[:1] * len(items),
        ]
        kept = draw.choice(changed)
        return inner, draw.choice([len(kept), len(kept), count, 2**63]), kept
    if kind == 7:
        return not value
    if kind in (6, 12):
        return draw.choice([0.0, -value, math.nan, math.inf, value * 2, 1e30])
    top = 2 ** (8 * struct.calcsize(_CODES[kind]))
    return (
        draw.choice(
            [0, 1, value + 1, max(0, value - 1), value * 2, 3, 10**6, top // 2 - 1, top - 1]
        )
        % top
    )


def _tensor(file: Gguf, draw: Random) -> tuple[Gguf, str]:
    at = draw.randrange(len(file.infos))
    info, other = file.infos[at], draw.choice(file.infos)
    infos = list(file.infos)
    if draw.random() < 0.2:
        del infos[at]
        return replace(file, infos=infos), f"{info.name} lost"
    edge = draw.choice(_EDGES)
    changed = draw.choice(
        [
            replace(
                info, name=draw.choice([info.name + "x", other.name, "", "blk.9." + info.name[6:]])
            ),
            replace(info, shape=info.shape[::-1]),
            replace(info, shape=(edge, *info.shape[1:])),
            replace(info, shape=(*info.shape, 1)),
            replace(info, shape=(*info.shape, 1, 1, 1, 1)),
            replace(info, shape=()),
            replace(info, type=draw.choice([1, 2, 8, 12, 24, 30, 31, 99, 2**32 - 1])),
            replace(info, offset=draw.choice([*_EDGES, info.offset + 1, info.offset + 32])),
            replace(info, offset=other.offset),
        ]
    )
    infos[at] = changed
    return replace(file, infos=infos), f"tensor {info.name} -> {shown(changed)}"


def _added(file: Gguf, draw: Random) -> tuple[Gguf, str]:
    """A key that the format knows and the file did not have."""
    value = draw.choice([0, 1, 3, 7, 32, 2**31, 2**32 - 1])
    name, kind = draw.choice(_KEYS)
    top = 2 ** (8 * struct.calcsize(_CODES.get(kind, "Q")) - 1)
    held: Any = {8: "mit", 6: float(value), 7: bool(value)}.get(kind, value % top)
    return replace(file, keys=[*file.keys, (name, kind, held)]), f"{name} = {held}"
