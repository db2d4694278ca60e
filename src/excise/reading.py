"""Read files that others made: regular files only, within size limits, parsed, or one error.

Model folders, prompt files, templates, records and run folders are read through these functions. So no
other module meets a pipe, a gigabyte of JSON, a lone surrogate or a parser's own exception. Knows files
and their syntax; what they mean is checked by whoever reads them.
"""

from __future__ import annotations

import json
import os
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from excise.errors import InputError

LARGEST_TEXT = 64 << 20  # bytes of a text file, unless its reader says otherwise
DEEPEST = 64  # levels of nested lists and tables; real files have about ten


def is_file(path: Path) -> bool:
    """Return whether a path leads to a regular file; false where it cannot be looked at."""
    return _mode(path, stat.S_ISREG)


def is_folder(path: Path) -> bool:
    """Return whether a path leads to a folder; false where it cannot be looked at."""
    return _mode(path, stat.S_ISDIR)


def _mode(path: Path, test: Any) -> bool:
    try:
        return bool(test(path.stat().st_mode))
    except (OSError, ValueError):  # ValueError: a NUL within the name
        return False


def check_regular(path: Path, what: str, error: type[InputError]) -> int:
    """Return the size in bytes of a regular file that can be opened.

    Args:
        path: the file.
        what: what it is, for the message: "markers file".
        error: the class to raise.

    Raises:
        error: it does not exist, is a folder, pipe or device, or may not be read.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise error(f"{what} {path} does not exist") from None
    except (OSError, ValueError) as problem:
        raise error(f"{what} {path} cannot be read: {_reason(problem)}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
        raise error(f"{what} {path} is {kind}, not a file")
    if not os.access(path, os.R_OK):
        raise error(f"{what} {path} cannot be read: permission denied")
    return found.st_size


def read_bytes(
    path: Path, what: str, error: type[InputError], largest: int = LARGEST_TEXT
) -> bytes:
    """Read a file's bytes.

    Raises:
        error: as `check_regular`, or it is larger than `largest` bytes.
    """
    size = check_regular(path, what, error)
    if size > largest:
        raise error(
            f"{what} {path} has {size / 1e6:.0f} MB, where at most {largest / 1e6:.0f} are read: "
            "is it the right file?"
        )
    try:
        with path.open("rb") as file:
            return file.read(largest)
    except OSError as problem:
        raise error(f"{what} {path} cannot be read: {_reason(problem)}") from None


def read_text(path: Path, what: str, error: type[InputError], largest: int = LARGEST_TEXT) -> str:
    """Read a file's text, UTF-8 with or without a byte order mark.

    Raises:
        error: as `read_bytes`, or it is not UTF-8.
    """
    try:
        return read_bytes(path, what, error, largest).decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{what} {path} is not UTF-8 text: byte {problem.start} is of none") from None


def parse_json(
    text: str | bytes,
    where: str,
    error: type[InputError],
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """Parse JSON that nests at most `DEEPEST` levels and whose strings are valid Unicode.

    Args:
        text: the JSON.
        where: how the message begins.
        error: the class to raise.
        pairs: makes each object from its (key, value) pairs; by default the last of equal keys counts.

    Raises:
        error: it is not valid JSON, nests too deeply, or holds a lone surrogate.
    """
    try:
        data = json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise error(_too_deep(where)) from None
    except InputError:  # raised by `pairs`
        raise
    except json.JSONDecodeError as problem:
        line = "" if problem.lineno == 1 else f"line {problem.lineno}, "
        raise error(
            f"{where} is not valid JSON: {problem.msg} ({line}column {problem.colno})"
        ) from None
    except ValueError as problem:  # a number of thousands of digits
        raise error(f"{where} is not valid JSON: {problem}") from None
    check_depth(data, where, error)
    escaped = "\\ud" if isinstance(text, str) else b"\\ud"
    if escaped in text.lower() and not is_unicode(json.dumps(data, ensure_ascii=False)):  # type: ignore[operator]
        raise error(f"{where} holds half of a character (a lone surrogate): remove it")
    return data


def read_json(
    path: Path, what: str, error: type[InputError], largest: int = LARGEST_TEXT
) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        error: as `read_text` and `parse_json`, or it holds something else than an object.
    """
    data = parse_json(read_text(path, what, error, largest), f"{what} {path}", error)
    if not isinstance(data, dict):
        raise error(f"{what} {path} is not a JSON object")
    return data


def read_toml(
    path: Path, what: str, error: type[InputError], largest: int = LARGEST_TEXT
) -> dict[str, Any]:
    """Read the TOML table in a file.

    Raises:
        error: as `read_text`, or it is not TOML, or nests too deeply.
    """
    text = read_text(path, what, error, largest)
    try:
        data = tomllib.loads(text)
    except RecursionError:
        raise error(_too_deep(f"{what} {path}")) from None
    except ValueError as problem:  # besides its own kind: a number of thousands of digits
        raise error(f"{what} {path} is not valid TOML: {problem}") from None
    check_depth(data, f"{what} {path}", error)
    return data


def check_depth(data: Any, where: str, error: type[InputError]) -> None:
    """Refuse data that nests too deeply to be walked recursively.

    Raises:
        error: lists and tables nest deeper than `DEEPEST`.
    """
    level = [data]
    for _ in range(DEEPEST):
        tables = [one for one in level if isinstance(one, dict)]
        lists = [one for one in level if isinstance(one, list)]
        level = [child for one in tables for child in one.values()]
        level += [child for one in lists for child in one]
        if not level:
            return
    raise error(_too_deep(where))


def is_unicode(text: str) -> bool:
    """Return whether a text is valid Unicode: without lone surrogates, which no file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def full_path(path: Path) -> Path:
    """Return the absolute path of a file or folder; a file that is a link keeps its own name.

    In the Hub's cache a file is a link, and what it leads to has neither its name nor its suffix.
    """
    return path.parent.resolve() / path.name if is_file(path) else path.resolve()


def replace_surrogates(text: str) -> str:
    """Replace each lone surrogate by the replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _too_deep(where: str) -> str:
    return f"{where} nests more than {DEEPEST} levels deep: it cannot be meant"


def _reason(problem: OSError | ValueError) -> str:
    return str(getattr(problem, "strerror", None) or problem).lower()
