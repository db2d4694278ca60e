"""Changes of bytes, of text, of documents and of files: each gives what it made, and says it in words."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from pathlib import Path
from random import Random

from fuzz.values import change_tree, to_json, to_toml

_PIECES = (
    *(b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\x1b[2J", b"\r", b"\n\n", b"\x1a"),
    *(b"\xe2\x80\xa8", b"\x85", b'"', b"{", b"]", b"\\", b"\xc3", b"#", b",", b"'", b"\t", b"\x7f"),
)
_LINK_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 123456\n"
)


def change_bytes(data: bytes, draw: Random) -> tuple[bytes, str]:
    """One change that knows nothing of a format."""
    at = draw.randrange(len(data) + 1)
    end = min(len(data), at + draw.choice([1, 2, 8, 60, 400]))
    how = draw.choice(
        ["flip", "cut", "cut", "insert", "insert", "drop", "repeat", "begin", "whole"]
    )
    if how == "flip" and at < len(data):
        bit = 1 << draw.randrange(8)
        return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :], f"bit {bit} of byte {at}"
    if how == "cut":
        return data[:at], f"cut at byte {at} of {len(data)}"
    if how == "drop":
        return data[:at] + data[end:], f"bytes {at} to {end} dropped"
    if how == "repeat":
        return data[:end] + data[at:], f"bytes {at} to {end} repeated"
    piece = draw.choice(_PIECES)
    if how == "begin":
        return piece + data, f"{piece!r} before all"
    if how == "whole":
        whole = draw.choice([b"", b"\n", b"{}", b"[]", b"null", b"0", piece * 50, _LINK_POINTER])
        return whole, f"nothing but {whole[:20]!r}"
    return data[:at] + piece + data[at:], f"{piece!r} at byte {at}"


def change_json(data: bytes, draw: Random) -> tuple[bytes, str]:
    """One change of a JSON document: mostly of what it says, sometimes of its bytes."""
    if draw.random() < 0.15:
        return change_bytes(data, draw)
    tree, what = change_tree(json.loads(data), draw)
    return to_json(tree).encode("utf-8", "surrogatepass"), what


def change_toml(data: bytes, draw: Random) -> tuple[bytes, str]:
    """One change of a TOML document."""
    if draw.random() < 0.15:
        return change_bytes(data, draw)
    tree, what = change_tree(tomllib.loads(data.decode()), draw)
    return to_toml(tree).encode("utf-8", "surrogatepass"), what


def change_lines(data: bytes, draw: Random) -> tuple[bytes, str]:
    """Lines dropped, repeated, moved, joined."""
    lines = data.splitlines(keepends=True)
    at, to = draw.randrange(len(lines)), draw.randrange(len(lines))
    how = draw.choice(["drop", "repeat", "move", "join", "blank", "from", "crlf"])
    if how == "drop":
        lines = lines[:at] + lines[at + 1 :]
    elif how == "repeat":
        lines = lines[: at + 1] + lines[at:]
    elif how == "move":
        lines.insert(to, lines.pop(at))
    elif how == "join":
        lines[at] = lines[at].rstrip(b"\r\n")
    elif how == "blank":
        lines.insert(at, draw.choice([b"\n", b"  \n", b"\t\n", b"\x00\n"]))
    elif how == "from":
        lines = lines[at:]
    else:
        lines = [line.replace(b"\n", b"\r\n") for line in lines]
    return b"".join(lines), f"line {at} of {len(lines)}: {how}"


def change_file(path: Path, draw: Random) -> str:
    """Something else in a file's place."""
    how = draw.choice(["pipe", "folder", "dangling", "loop", "zero", "outside", "gone"])
    outside = path.parent.with_name(f"{path.parent.name}-outside")
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "dangling":
        path.symlink_to("nowhere-at-all")
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "zero":
        path.symlink_to("/dev/zero")
    elif how == "outside":
        outside.mkdir(exist_ok=True)
        (outside / "secret").write_text("a secret\n")
        path.symlink_to(outside / "secret")
    return f"{path.name}: {how}"


def copy_folder(source: Path, to: Path) -> Path:
    """A copy that may be broken."""
    return Path(shutil.copytree(source, to, symlinks=True))
