"""Settings as plain nested tables: made from dotted keys, merged, file names made absolute, as TOML.

Knows which settings are file names, not what settings mean.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from excise.named_models import NAMED
from excise.reading import full_path, is_file, is_folder

Tree = dict[str, Any]

# Settings of a judge that are a file's name or a built-in one's.
_FILES, _SUFFIXES = ("rubric", "severity", "labelled"), (".toml", ".jsonl", ".csv", ".parquet")
BUILTIN = "builtin"  # among the sources of `prompts.keep`: the set that ships


def walk_texts(data: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text within plain data, keys too, with its dotted path."""
    if isinstance(data, str):
        yield path, data
    elif isinstance(data, dict):
        for key, value in data.items():
            yield path, str(key)
            yield from walk_texts(value, f"{path}.{key}".lstrip("."))
    elif isinstance(data, list | tuple):
        for value in data:
            yield from walk_texts(value, path)


def resolve_paths(tree: Tree, folder: Path) -> Tree:
    """Make the file names in a tree absolute, taken relative to `folder`."""
    places: list[tuple[Any, tuple[str, ...]]]
    prompts, scores = _table(tree, "prompts"), _table(tree, "scores")
    judge = _table(scores, "judge")
    places = [(value, ("source",)) for value in prompts.values()]
    for role in ("keep", "borderline"):
        if isinstance(prompts.get(role), list):
            named = [value for value in prompts[role] if value != {"source": BUILTIN}]
            places += [(value, ("source",)) for value in named]
    places += [
        (prompts, ("chat_template",)),
        (_table(tree, "model"), ("source",)),
        (scores, ("markers_file", "files")),
        (judge, ("source", *(key for key in _FILES if str(judge.get(key)).endswith(_SUFFIXES)))),
        (_table(tree, "export"), ("llama_cpp", "from_gguf")),
    ]
    for table, keys in places:
        for key in keys if isinstance(table, dict) else ():
            value = table.get(key)
            if isinstance(value, list):
                table[key] = [_placed(one, folder) for one in value]
            elif key in table:
                table[key] = _placed(value, folder)
    return tree


def _table(tree: Tree, name: str) -> Tree:
    found = tree.get(name)
    return found if isinstance(found, dict) else {}


def _placed(value: Any, folder: Path) -> Any:
    return absolute(value, folder) if isinstance(value, str) and value else value


def absolute(name: str, folder: Path = Path()) -> str:
    """Return the absolute path of what exists at `folder / name`; leave other names, such as ids, alone.

    So a run can be resumed from anywhere.
    """
    place = folder / name
    found = name not in NAMED and (is_file(place) or is_folder(place))
    return str(full_path(place)) if found else name


def nest(key: str, value: Any) -> Tree:
    """Turn a dotted key and its value into nested tables."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def merge(below: Tree, above: Tree) -> Tree:
    """Merge two trees; where both have a value, `above` wins."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = (
            merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def parse_value(text: str) -> Any:
    """Parse a TOML value; return the text itself where it is none."""
    try:
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return found["value"] if len(found) == 1 else text


def toml_text(tree: Tree) -> str:
    """Return a tree as a TOML document."""
    lines: list[str] = []
    _emit(tree, (), lines)
    return "\n".join(lines).strip() + "\n"


def _emit(table: Tree, path: tuple[str, ...], lines: list[str]) -> None:
    scalars = {key: value for key, value in table.items() if not isinstance(value, dict)}
    if path and (scalars or not table):
        lines.append(f"\n[{'.'.join(path)}]")
    lines.extend(f"{key} = {toml_value(value)}" for key, value in scalars.items())
    for key, value in table.items():
        if isinstance(value, dict):
            _emit(value, (*path, key), lines)


def toml_value(value: Any) -> str:
    """Return plain data as TOML on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return (
            '"'
            + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped)
            + '"'
        )
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + "}"
    return repr(value)
