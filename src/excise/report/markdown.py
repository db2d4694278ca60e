"""Text into GitHub-flavoured Markdown that shows it as it is: nothing in it can become markup."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$])")
_STARTS_BLOCK = re.compile(r"^(\d*)(?=[#+=.)-](?:\s|[#=-]|$))")
_SPACE = re.compile(r"\s+")


def plain(text: str) -> str:
    """One line of text with every character that Markdown or HTML would read escaped."""
    line = _SPACE.sub(" ", text).strip().replace("&", "&amp;")
    return _STARTS_BLOCK.sub(r"\1\\", _SPECIAL.sub(r"\\\1", line))


def code(text: str) -> str:
    """A code span, also inside a table: it cannot be ended from within, and pipes are escaped."""
    line = _SPACE.sub(" ", text).strip().replace("`", "'").replace("|", "\\|")
    return f"`{line}`" if line else ""


def fence(text: str, language: str = "") -> str:
    """A fenced block, with a fence longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    """A table of cells that are Markdown already; `align` holds an l or r for each column."""
    rule = ["---:" if side == "r" else ":---" for side in align or "l" * len(head)]
    lines = [head, rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(items: Iterable[str]) -> str:
    """A list of items that are Markdown already."""
    return "\n".join(f"- {item}" for item in items)
