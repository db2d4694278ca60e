"""Read the licence that a model's own card states in its front matter.

Cards come from anybody. The front matter is read as YAML events, within limits: no objects are built,
aliases are not followed, and invalid YAML states no licence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from excise.files import CARD
from excise.reading import is_file

_MOST = 1 << 16  # bytes or characters of a card: its front matter stands at the beginning
_DEEPEST, _LONGEST, _SEVERAL = 16, 100, 8  # levels; characters of a name; names
# The loader in C, where PyYAML was built with it.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULL = ("", "~", "null", "none")


def licence_of(folder: Path) -> str | None:
    """Return the licence of the model in a folder, several joined by ", "; None where none is stated."""
    path = folder / CARD
    if not is_file(path):
        return None
    try:
        with path.open("rb") as file:
            text = file.read(_MOST).decode("utf-8-sig", "replace")
    except OSError:
        return None
    return stated_in(text)


def stated_in(card: str) -> str | None:
    """Return the licence in a card's front matter; None where none is stated."""
    first, *rest = card[:_MOST].splitlines() or [""]
    if first.rstrip() != "---":
        return None
    text = "\n".join(takewhile(lambda line: line.rstrip() != "---", rest))
    found: list[list[str]] = []
    with suppress(yaml.YAMLError):  # what precedes the error counts
        found.extend(_values(yaml.parse(text, Loader=_LOADER), "license"))
    return _name(found[-1]) if found else None  # of equal keys the last counts


def _values(events: Iterable[Any], wanted: str) -> Iterator[list[str]]:
    """Yield, for each occurrence of a key of the outermost mapping, its text or the texts of its list."""
    depth, key = 0, None
    found: list[str] = []
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            named = key == wanted and isinstance(event, yaml.MappingStartEvent)
            if depth > _DEEPEST or named:
                return
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if isinstance(event, yaml.ScalarEvent):
            if depth == 1 and key is None:
                key, found = str(event.value), []
                continue
            if key == wanted and depth <= 2:
                found.append(str(event.value))
        if depth == 1 and key is not None:  # the end of its value
            if key == wanted:
                yield found
            key = None


def _name(values: list[str]) -> str | None:
    names = [" ".join(value.split()) for value in values[:_SEVERAL]]
    good = [n for n in names if len(n) <= _LONGEST and n.isprintable() and n.lower() not in _NULL]
    return ", ".join(good) or None
