"""Changes that mean nothing: whoever refuses such input, or makes something else of it, is wrong."""

from __future__ import annotations

import json
from random import Random

from fuzz.formats import parse


def respaced(data: bytes, draw: Random) -> tuple[bytes, str]:
    """A JSON document in another order and with other white space."""
    tree = json.loads(data)
    keys = list(tree)
    draw.shuffle(keys)
    ascii_only, indent = draw.random() < 0.5, draw.choice([None, 1, 4, "\t"])
    text = json.dumps({key: tree[key] for key in keys}, ensure_ascii=ascii_only, indent=indent)
    return (text + draw.choice(["", "\n", " \n\n"])).encode(), "other white space"


def extended(data: bytes, draw: Random) -> tuple[bytes, str]:
    """A JSON object with a key that nobody knows."""
    tree = {**json.loads(data), "note_of_mine": draw.choice(["hello", 7, [1, 2], {"a": None}])}
    return json.dumps(tree).encode(), "a key of its own"


def reedited(data: bytes, draw: Random) -> tuple[bytes, str]:
    """A text as other editors write it."""
    lines = data.rstrip(b"\n").split(b"\n")
    how = draw.choice(["mark", "returns", "open end", "blank lines"])
    if how == "mark":
        return b"\xef\xbb\xbf" + data, "a byte order mark"
    if how == "returns":
        return b"\r\n".join([*lines, b""]), "carriage returns"
    if how == "open end":
        return b"\n".join(lines), "no end of line at the end"
    return b"\n".join(lines) + b"\n\n\n", "blank lines at the end"


def commented(data: bytes, draw: Random) -> tuple[bytes, str]:
    """A text with a line of comment, as TOML and markers have it."""
    lines = data.split(b"\n")
    lines.insert(draw.choice([0, len(lines) - 1]), b"# a comment \xc3\xa9")
    return b"\n".join(lines), "a comment"


def torn(data: bytes, draw: Random) -> tuple[bytes, str]:
    """A journal as a power cut leaves it: it ends anywhere after its first few lines."""
    first = len(b"".join(data.splitlines(keepends=True)[:4]))
    at = draw.randrange(first, len(data) + 1)
    return data[:at], f"torn at byte {at} of {len(data)}"


def padded(data: bytes, draw: Random) -> tuple[bytes, str]:
    """A safetensors file with its header's names in another order, and spaces after it."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    names = list(header)
    draw.shuffle(names)
    text = json.dumps({name: header[name] for name in names}).encode()
    text += b" " * (-len(text) % 8 + draw.choice([0, 8, 4096]))
    return len(text).to_bytes(8, "little") + text + data[8 + size :], "a header in another order"


def named(data: bytes, draw: Random) -> tuple[bytes, str]:
    """A GGUF file with another name, and a key that nobody knows."""
    file = parse(data)
    keys = [(k, t, "another" if k == "general.name" else v) for k, t, v in file.keys]
    keys.insert(draw.randrange(1, len(keys)), ("mine.note", 8, "hello"))
    return type(file)(keys, file.infos, file.body).encode(), "another name"
