"""Settings as plain nested tables: from dotted keys, laid over each other, names of files made whole.

Knows where the names of files stand, not what settings mean.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from excise.reading import full_path, is_file, is_folder

Tree = dict[str, Any]


def texts(data: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text within plain data, keys too, and where it is."""
    if isinstance(data, str):
        yield path, data
    elif isinstance(data, dict):
        for key, value in data.items():
            yield path, str(key)
            yield from texts(value, f"{path}.{key}".lstrip("."))
    elif isinstance(data, list | tuple):
        for value in data:
            yield from texts(value, path)


def anchor(tree: Tree, folder: Path) -> Tree:
    """Make the names of files in a tree relative to `folder`, not to where a later command is called."""
    places: list[tuple[Any, tuple[str, ...]]]
    places = [(value, ("source",)) for value in _table(tree, "prompts").values()]
    places += [
        (_table(tree, "prompts"), ("chat_template",)),
        (_table(tree, "model"), ("source",)),
        (_table(tree, "scores"), ("markers_file", "files")),
        (_table(tree, "export"), ("llama_cpp", "from_gguf")),
    ]
    for table, keys in places:
        for key in keys if isinstance(table, dict) else ():
            value = table.get(key)
            if isinstance(value, str):
                table[key] = _beside(value, folder)
            elif isinstance(value, list):
                table[key] = [_beside(v, folder) if isinstance(v, str) else v for v in value]
    return tree


def _table(tree: Tree, name: str) -> Tree:
    found = tree.get(name)
    return found if isinstance(found, dict) else {}


def _beside(name: str, folder: Path) -> str:
    """The whole path of what lies there; other names, such as ids, as they are."""
    place = folder / name
    found = name not in ("", "demo") and (is_file(place) or is_folder(place))
    return str(full_path(place)) if found else name


def nest(key: str, value: Any) -> Tree:
    """A dotted key and its value as nested tables."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def merge(below: Tree, above: Tree) -> Tree:
    """`below` with what `above` says in its place, table by table."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = (
            merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def parse_value(text: str) -> Any:
    """A value in TOML, else the text as it is."""
    try:
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return found["value"] if len(found) == 1 else text
