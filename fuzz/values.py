"""Odd values, and JSON and TOML that hold what no encoder would write: repeated keys, raw text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

Path = tuple[str | int, ...]
Leaf = tuple[Path, Any]


@dataclass(frozen=True)
class Raw:
    """Text that is written as it is, in the place of a value."""

    text: str


class Pairs(list[tuple[str, Any]]):
    """An object whose keys may repeat."""


PLAIN: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e-320, 1e308, "", " ", "x", [], {}, [[]]),
    *(2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, [None], {"a": 1}, ["a", 1]),
    *("true", "null", "1", "float16", "bfloat16", "auto", "../outside", "/nowhere/at/all", "a/b"),
)
STRANGE: tuple[Any, ...] = (
    *(math.nan, math.inf, -math.inf, 10**400, "\ud800", "a\udfffb", "\x00", "a\x00b"),
    *("\x1b[31mred\x1b[0m", "\x07", "\u202eright to left", "\ufeff", "\u2028", "e\u0301", "\u212b"),
    *("x" * 300, "x" * 100_000, "%s%n{}{0}", "{{ 7 * 7 }}", "[bold]x[/bold]", "a\nb", '"""', "\\"),
    *(Raw("[" * 60 + "]" * 60), Raw("[" * 5000 + "]" * 5000), Raw('{"a":' * 900 + "1" + "}" * 900)),
    *(Raw("1e999"), Raw("-"), Raw("01"), Raw("9" * 5000), Raw("'x'"), Raw("undefined"), Raw("")),
    *(list(range(3000)), {str(i): i for i in range(500)}, [{}] * 50, ["x" * 1000] * 20),
)


def odd(draw: Random) -> Any:
    """Any odd value."""
    return draw.choice(PLAIN if draw.random() < 0.55 else STRANGE)


def near(value: Any, draw: Random) -> Any:
    """A value of the same type that is not this one, or hardly so."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice([value + 1, value - 1, -value, value * 2, value * 1000, value // 2, 0])
    if isinstance(value, float):
        return draw.choice(
            [value * 2, value / 2, -value, value + 1, value * 1e6, 0.0, value * 1.01]
        )
    if isinstance(value, str):
        changed = [value + " ", value.upper(), value[:-1], value * 2, value[::-1], "\u200b" + value]
        return draw.choice(changed)
    if isinstance(value, list) and value:
        at = draw.randrange(len(value))
        return draw.choice(
            [value[:at] + value[at + 1 :], [*value, value[at]], value[::-1], value * 2]
        )
    return odd(draw)


def spots(tree: Any, draw: Random) -> Path:
    """A place in a tree; upper ones more often, so that a vocabulary does not drown the rest."""
    path: Path = ()
    while isinstance(tree, dict | list) and tree and (not path or draw.random() < 0.75):
        step: Any = draw.choice(list(tree)) if isinstance(tree, dict) else draw.randrange(len(tree))
        path, tree = (*path, step), tree[step]
    return path


def at(tree: Any, path: Path) -> Any:
    """What stands in a place."""
    for step in path:
        tree = tree[step]
    return tree


def put(tree: Any, path: Path, change: Callable[[Any], Any]) -> Any:
    """The tree with `change` made of what stands in a place."""
    if not path:
        return change(tree)
    copy: Any = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = put(tree[path[0]], path[1:], change)
    return copy


def change_tree(tree: Any, draw: Random) -> tuple[Any, str]:
    """One change of parsed JSON or TOML, and what it is."""
    path = spots(tree, draw)
    if not path:
        value = odd(draw)
        return value, f"the whole = {shown(value)}"
    name, holder = ".".join(map(str, path)), at(tree, path[:-1])
    how = draw.choice(
        ["odd"] * 5 + ["near"] * 4 + ["drop"] * 2 + ["rename", "repeat", "add", "swap"]
    )
    value = near(at(tree, path), draw) if how == "near" else odd(draw)
    if how in ("odd", "near") or not isinstance(holder, dict):
        return put(tree, path, lambda _: value), f"{name} = {shown(value)}"
    key = str(path[-1])

    def renewed(old: dict[str, Any]) -> Any:
        pairs = [(k, v) for k, v in old.items()]
        place = [k for k, _ in pairs].index(key)
        if how == "drop":
            return dict(p for p in pairs if p[0] != key)
        if how == "rename":
            new = draw.choice([key + "s", key.upper(), key[:-1], "", "\x1b[2J", "__class__"])
            return dict([*pairs[:place], (new, old[key]), *pairs[place + 1 :]])
        if how == "repeat":
            return Pairs([*pairs, (key, value)])
        if how == "add":
            return {**old, draw.choice(["extra", "auto_map", "_name_or_path", "\u00e9"]): value}
        other = draw.choice(list(old))
        return {**old, key: old[other], other: old[key]}

    return put(tree, path[:-1], renewed), f"{how} {name} ({shown(value)})"


def shown(value: Any) -> str:
    """A value in few characters, all of them visible."""
    try:
        text = value.text if isinstance(value, Raw) else repr(value)
    except RecursionError:
        text = "nested deeply"
    return ascii(text[:40] + ("..." if len(text) > 40 else ""))[1:-1]


def to_json(tree: Any) -> str:
    """JSON text of a tree with `Raw` and `Pairs` in it."""
    if isinstance(tree, Raw):
        return tree.text
    if isinstance(tree, Pairs):
        inner = [f"{json.dumps(k)}: {to_json(v)}" for k, v in tree]
        return "{" + ", ".join(inner) + "}"
    if isinstance(tree, dict):
        return to_json(Pairs(tree.items()))
    if isinstance(tree, list):
        return "[" + ", ".join(map(to_json, tree)) + "]"
    return json.dumps(tree)


def to_toml(tree: Any, path: tuple[str, ...] = ()) -> str:
    """TOML text of a tree, each value under its dotted key."""
    if not path and not isinstance(tree, dict | Pairs):
        return f"value = {toml_value(tree)}\n"
    lines = []
    for key, value in tree.items() if isinstance(tree, dict) else tree:
        name = (*path, str(key))
        if isinstance(value, Pairs) or (isinstance(value, dict) and value):
            lines.append(to_toml(value, name))
        elif value is not None:
            lines.append(f"{'.'.join(map(_toml_key, name))} = {toml_value(value)}\n")
    return "".join(lines)


def _toml_key(key: str) -> str:
    return key if key.replace("_", "").isalnum() and key.isascii() else json.dumps(key)


def toml_value(value: Any) -> str:
    """A value as TOML writes it, also where TOML has no such value."""
    if isinstance(value, dict | Pairs):
        pairs = value.items() if isinstance(value, dict) else value
        return "{" + ", ".join(f"{_toml_key(k)} = {toml_value(v)}" for k, v in pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return to_json(value)
