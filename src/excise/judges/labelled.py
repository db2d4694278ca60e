"""Labelled responses: what a judge is certified on. Knows files and verdicts, not judges."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from excise.config import PromptSource
from excise.errors import PromptError
from excise.judges.verdicts import VERDICTS, Exchange
from excise.prompts.prompt_files import Row, read_rows
from excise.reading import check_regular
from excise.trees import BUILTIN

SHIPPED = Path(str(resources.files("excise"))) / "data" / "labelled" / "disclaimers.jsonl"
_MOST = 100_000  # rows
_WHAT = "labelled file"
_COLUMNS = ("prompt", "response", "verdict")


@dataclass(frozen=True)
class Labelled:
    """Responses with the verdicts that people gave them.

    Attributes:
        source: the file's name: no path of the user's machine.
        exchanges: prompts and responses.
        verdicts: one for each.
    """

    source: str
    exchanges: tuple[Exchange, ...]
    verdicts: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hash of the texts and verdicts, in order."""
        digest = hashlib.sha256()
        for one, verdict in zip(self.exchanges, self.verdicts, strict=True):
            digest.update(repr((one.prompt, one.response, one.ended, verdict)).encode())
        return digest.hexdigest()


def _rows(source: PromptSource) -> Iterator[Row]:
    """Yield the rows of a file, which its reader calls a prompt file."""
    try:
        for where, row in read_rows(source):
            yield where.replace("prompt file", _WHAT, 1), row
    except PromptError as error:
        raise PromptError(str(error).replace("prompt file", _WHAT, 1)) from None


def read_labelled(name: str) -> Labelled:
    """Read a .jsonl, .csv or .parquet file with the columns prompt, response and verdict.

    In a .jsonl file, a column `ended` that is false says that a response was cut.

    Args:
        name: the file, or `builtin` for the set that ships.

    Raises:
        PromptError: it cannot be read, lacks a column, holds an unknown verdict, or is too small.
    """
    path = SHIPPED if name == BUILTIN else Path(name)
    check_regular(path, _WHAT, PromptError)
    column, answer, group = _COLUMNS
    source = PromptSource(source=str(path), column=column, answer_column=answer, group_column=group)
    exchanges, verdicts = [], []
    for where, row in _rows(source):
        if not all(name in row for name in _COLUMNS):
            raise PromptError(f"{where}: it needs the columns {', '.join(_COLUMNS)}")
        prompt, verdict, ended = row[column], row[group], row.get("ended", True)
        response = row[answer] or ""  # an empty cell is an empty response
        if not isinstance(prompt, str) or not isinstance(response, str):
            raise PromptError(f"{where}: prompt and response must be texts")
        if verdict not in VERDICTS:
            raise PromptError(
                f"{where}: the verdict {verdict!r:.40} is none of {', '.join(VERDICTS)}"
            )
        if not isinstance(ended, bool):
            raise PromptError(f"{where}: ended is {ended!r:.40}, where true or false belongs")
        exchanges.append(Exchange(prompt, response, ended))
        verdicts.append(verdict)
        if len(exchanges) > _MOST:
            raise PromptError(
                f"labelled file {name} has more than {_MOST:,} rows: give a part of it"
            )
    if len(set(verdicts)) < 2:
        raise PromptError(
            f"labelled file {name} holds {len(exchanges)} responses of {len(set(verdicts))} verdicts: "
            "a judge is measured by telling at least two apart"
        )
    return Labelled(path.name, tuple(exchanges), tuple(verdicts))
