"""What prompt files, markers and templates say, read in the plainest way: the judge's own readers."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import unicodedata
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

from fuzz.ground import DIRECTION, EVAL


class Unreadable(Exception):
    """A file that says nothing clear: whoever reads a meaning into it is wrong."""


def prompts(path: Path) -> list[str]:
    """The prompts of a file, in order, without blank ones.

    Raises:
        Unreadable: it is none.
    """
    try:
        found = [_stripped(value) for value in _column(path)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error, RecursionError) as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from None
    if not any(found):
        raise Unreadable("no prompts")
    return [text for text in found if text]


def _column(path: Path) -> list[Any]:
    if path.suffix == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            found: list[Any] = parquet.read_table(path, columns=["text"]).column("text").to_pylist()
        except ArrowException as error:
            raise ValueError(str(error)) from None
        return found
    text = path.read_bytes().decode("utf-8-sig")
    lines = [line for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
    if path.suffix == ".txt":
        return list(lines)
    if path.suffix == ".jsonl":
        return [json.loads(line)["text"] for line in lines]
    rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    if any(None in row for row in rows):
        raise ValueError("more fields than columns")
    return [None if str(row["text"]).strip().lower() == "nan" else row["text"] for row in rows]


def _stripped(value: Any) -> str:
    if value is None or value != value:  # NaN: a number that is missing
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal | date):
        raise TypeError(f"a prompt that is {type(value).__name__}")
    text = str(value).strip()
    text.encode("utf-8")
    return text


def parts(texts: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Direction, search and holdout prompts, as the README says that rows are dealt."""
    first = texts[:DIRECTION]
    rest = [text for text in texts[DIRECTION:] if text not in first]
    search = rest[:EVAL]
    return first, search, [text for text in rest[EVAL:] if text not in search]


def digest(texts: list[str]) -> str:
    """The hash that a record holds of a set of prompts."""
    return hashlib.sha256(b"".join(text.encode() + b"\0" for text in texts)).hexdigest()


_IGNORED = re.compile("[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
                      "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8]")  # fmt: skip


def fold(text: str) -> str:
    """A text in the form in which markers are compared."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = _IGNORED.sub("", text)
    for alike, plain in (("\u2018\u2019\u02bc", "'"), ("\u201c\u201d", '"')):
        text = re.sub(f"[{alike}]", plain, text)
    return re.sub(r"\s+", " ", re.sub(r"[*_`]+", "", text))


def markers(path: Path) -> list[str]:
    """The phrases of a markers file, folded.

    Raises:
        Unreadable: it is none.
    """
    try:
        lines = re.split(r"\r\n|\r|\n", path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise Unreadable(str(error)) from None
    found = [fold(line.strip()).strip() for line in lines if not line.startswith("#")]
    if not any(found):
        raise Unreadable("no markers")
    return [phrase for phrase in found if phrase]


def front_matter(path: Path) -> dict[str, Any]:
    """The metadata of a README.md; empty where it has none that can be read."""
    import yaml

    try:
        text = path.read_bytes()[:100_000].decode("utf-8-sig")
        found = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.S)
        inside = found[1] if found else ""
        plain = inside.count("*") < 20 and inside.count("license:") < 2 and "---" not in inside
        data = yaml.safe_load(found[1]) if found and plain else {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def set_value(text: str) -> Any:
    """The value of `a.b=c`: TOML, else a string."""
    import tomllib

    value = text.partition("=")[2].strip()
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        return value
