"""Text into GitHub-flavoured Markdown that shows it as it is: nothing in it can become markup.

Templates of this environment escape every value that is put into them. Only what the functions of this
module return is Markdown already; no filter of Jinja makes text so, `safe` included.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_DATA = Path(str(resources.files("excise"))) / "data"
_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$])")
_STARTS_BLOCK = re.compile(r"^(\d*)(?=[#+=.)-](?:\s|[#=-]|$))")
_SPACE = re.compile(r"\s+")


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def plain(value: object) -> Markdown:
    """Return one line of text with every character that Markdown or HTML would read escaped."""
    if isinstance(value, Markdown):
        return value
    line = _SPACE.sub(" ", str(value)).strip().replace("&", "&amp;")
    return Markdown(_STARTS_BLOCK.sub(r"\1\\", _SPECIAL.sub(r"\\\1", line)))


def code(text: object) -> Markdown:
    """Return a code span, also for tables: it cannot be ended from within, pipes are escaped."""
    line = _SPACE.sub(" ", str(text)).strip().replace("`", "'").replace("|", "\\|")
    return Markdown(f"`{line}`" if line else "")


def fence(text: str, language: str = "") -> Markdown:
    """Return a fenced block, with a fence longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return Markdown(f"{ticks}{language}\n{text}\n{ticks}")


def environment(**functions: Callable[..., Any]) -> Environment:
    """Return a Jinja environment that escapes every value put into its templates.

    Args:
        functions: what templates may call, beside the filters `code` and `fence`.
    """
    made = Environment(
        loader=FileSystemLoader(_DATA),
        finalize=plain,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"code": code, "fence": fence}
    made.globals |= functions
    return made
