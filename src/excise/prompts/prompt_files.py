"""Read the rows of prompt files and datasets, one at a time and within limits.

Every row comes with its place in the file, for messages. Knows formats and their libraries' exceptions;
`sets` knows what the rows mean.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from excise.children import Child, python
from excise.config import PromptSource
from excise.errors import PromptError, first_line
from excise.reading import check_regular, is_file, is_unicode, parse_json

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
LONGEST = 1 << 17  # characters of one text: what Python's csv module allows
_LONGEST_LINE = 1 << 24  # characters: a row may hold much besides
_MOST = 1_000_000  # rows that are looked at
_WORKER = Path(__file__).with_name("parquet_worker.py")
_SECONDS = 30.0  # for each batch of rows of a parquet file
_LONGEST_ANSWER = 1 << 28  # bytes

Row = tuple[str, dict[str, Any]]  # its place for messages, its columns


def read_rows(source: PromptSource) -> Iterator[Row]:
    """Yield the rows of a file or dataset, in order.

    Raises:
        PromptError: a file that is missing, of no known suffix or not readable; a row that is not of its
            format, or exceeds the limits; a dataset that cannot be loaded.
    """
    path = Path(source.source)
    suffix = path.suffix.lower()  # of the link: blobs in the Hub's cache have none
    if is_file(path):
        if suffix not in SUFFIXES:
            raise PromptError(f"prompt file {path}: use one of {', '.join(SUFFIXES)}")
        return _bounded(_FORMATS[suffix](path, source), source)
    if suffix in SUFFIXES or path.is_absolute() or source.source.count("/") != 1:
        raise _missing(path, source)
    return _bounded(_dataset_rows(source), source)


def columns_of(source: PromptSource) -> list[str]:
    """Return the names of the columns to read."""
    chosen = None if source.where is None else source.where.partition("=")[0]
    named = (source.column, source.answer_column, source.group_column, chosen)
    return list(dict.fromkeys(name for name in named if name is not None))


def check_columns(source: PromptSource, there: Sequence[Any], where: str) -> None:
    """Refuse a file or row that lacks a column to read; name those that it has.

    Raises:
        PromptError: one is missing, or there are two of its name.
    """
    for column in columns_of(source):
        if list(there).count(column) > 1:
            raise PromptError(f"{where}: the column {column!r:.60} stands there twice")
        if column not in there:
            names = " ".join(", ".join(map(str, there)).split())
            raise PromptError(
                f"{where}: there is no column {column!r:.60}; the columns are: {names:.200}"
            )


def _missing(path: Path, source: PromptSource) -> PromptError:
    try:
        check_regular(path, "prompt file", PromptError)
    except PromptError as error:
        if os.path.lexists(path):
            return error
    return PromptError(
        f"prompt file {source.source} does not exist (a dataset id looks like owner/name)"
    )


def _bounded(rows: Iterator[Row], source: PromptSource) -> Iterator[Row]:
    column, _, value = (source.where or "").partition("=")
    for number, row in enumerate(rows, start=1):
        if number > _MOST:
            raise PromptError(
                f"prompt set {source.source} has more than {_MOST:,} rows: give a part of it"
            )
        if source.where is None or str(row[1].get(column)) == value:
            yield row


# -- text files ------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[Row]:
    """Yield the lines of a text file, blank ones too, as the column ""."""
    check_regular(path, "prompt file", PromptError)
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for number, line in enumerate(_pieces(file), start=1):
                where = f"prompt file {path}, line {number}"
                if len(line) > _LONGEST_LINE:
                    raise PromptError(f"{where}: it has more than {_LONGEST_LINE:,} characters")
                if not is_unicode(line):
                    raise PromptError(f"{where}: it is not UTF-8 text")
                yield where, {"": line}
    except OSError as error:
        raise PromptError(f"prompt file {path} cannot be read: {error.strerror}") from None


def _pieces(file: TextIO) -> Iterator[str]:
    while line := file.readline(_LONGEST_LINE + 1):
        yield line


def _text_rows(path: Path, source: PromptSource) -> Iterator[Row]:
    for where, line in _lines(path):
        yield where, {source.column: line[""]}


def _json_rows(path: Path, source: PromptSource) -> Iterator[Row]:
    for where, line in _lines(path):
        text = line[""].strip()
        if not text:
            continue
        row = parse_json(text, where, PromptError)
        if not isinstance(row, dict):
            raise PromptError(f"{where}: not a JSON object")
        check_columns(source, list(row), where)
        yield where, row


def _csv_rows(path: Path, source: PromptSource) -> Iterator[Row]:
    where = f"prompt file {path}, line 1"

    def lines() -> Iterator[str]:
        nonlocal where
        for place, line in _lines(path):
            where = place
            yield line[""]

    reader = csv.DictReader(lines(), strict=True)
    try:
        if reader.fieldnames:
            check_columns(source, reader.fieldnames, where)
        for row in reader:
            if None in row:  # what stands beyond the header's last column
                raise PromptError(
                    f"{where}: more fields than the header has: put quotes around text with commas"
                )
            yield where, {name: _cell(row[name]) for name in columns_of(source)}
    except csv.Error as error:
        raise PromptError(f"{where}: {error}") from None


def _cell(text: str | None) -> str | None:
    """Return a cell's text; None where it stands for a missing number (NaN)."""
    return None if text is None or text.strip().lower() == "nan" else text


# -- parquet files and data sets -------------------------------------------------------------------


def _parquet_rows(path: Path, source: PromptSource) -> Iterator[Row]:
    what = f"prompt file {path}"
    check_regular(path, "prompt file", PromptError)
    child = Child([*python(_WORKER), str(path), *columns_of(source)], f"reading {path}", talks=True)
    number = 0
    try:
        answer = _answer(child, what)
        check_columns(source, answer["columns"], what)
        while answer := _answer(child, what):
            for row in answer["rows"]:
                number += 1
                yield f"{what}, row {number}", row
    finally:
        child.stop()


def _answer(child: Child, what: str) -> dict[str, Any]:
    line = child.line(_SECONDS, _LONGEST_ANSWER)
    if not line.endswith(b"\n"):
        reason = (child.stderr_tail().split("\n") if not child.late else [])[-2:]
        said = " ".join(reason).strip() or f"nothing of it could be read in {_SECONDS:g} seconds"
        raise PromptError(f"{what} is not a readable parquet file: {said:.200}")
    answer = dict(json.loads(line))
    if "failed" in answer:
        raise PromptError(f"{what} {answer['failed']}")
    return answer


def _dataset_rows(source: PromptSource) -> Iterator[Row]:
    import pyarrow
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    what = f"dataset {source.source} (split {source.split})"
    failures = (
        *(DatasetsError, pyarrow.ArrowException, OSError, ValueError, RuntimeError),
        *(TypeError, LookupError, AttributeError, ImportError),
    )
    try:
        dataset = load_dataset(
            source.source, source.subset, split=source.split, revision=source.revision
        )
        for number, row in enumerate(dataset, start=1):
            where = f"{what}, row {number}"
            check_columns(source, list(row), where)
            yield where, {column: row[column] for column in columns_of(source)}
    except failures as error:
        if isinstance(error, PromptError):
            raise
        reason = first_line(error)
        raise PromptError(f"{what} cannot be loaded: {reason:.300}") from None


_FORMATS: dict[str, Callable[[Path, PromptSource], Iterator[Row]]] = {
    ".txt": _text_rows,
    ".jsonl": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
