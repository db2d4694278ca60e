"""Rows of prompt files and data sets, one at a time and within bounds; what they mean is `prompts`'.

Every row comes with where it stands, for messages. Knows formats and their libraries' exceptions.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from excise.config import PromptSource
from excise.errors import PromptError, first_line
from excise.reading import check_regular, is_file, is_whole, parse_json

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
LONGEST = 1 << 17  # characters of one text: what Python's csv module allows
_LONGEST_LINE = 1 << 24  # characters: a row may hold much besides
_MOST = 1_000_000  # rows that are looked at
_BATCH = 64  # rows of a parquet file that are decoded together
_LARGEST = 1 << 28  # bytes that the columns of a parquet file may say that they take

Row = tuple[str, dict[str, Any]]  # where it stands, its columns


def read_rows(source: PromptSource) -> Iterator[Row]:
    """The rows of a file or data set, in order.

    Raises:
        PromptError: a file that is missing, of no known suffix or not readable; a row that is not of its
            format, or exceeds the bounds; a data set that cannot be loaded.
    """
    path = Path(source.source)
    suffix = path.suffix.lower()  # of a link, not of what it leads to: the Hub's blobs have none
    if is_file(path):
        if suffix not in SUFFIXES:
            raise PromptError(f"prompt file {path}: use one of {', '.join(SUFFIXES)}")
        return _bounded(_FORMATS[suffix](path, source), source)
    if suffix in SUFFIXES or path.is_absolute() or source.source.count("/") != 1:
        raise _missing(path, source)
    return _bounded(_dataset_rows(source), source)


def columns_of(source: PromptSource) -> list[str]:
    """The columns that are read."""
    named = (source.column, source.answer_column, source.group_column)
    return list(dict.fromkeys(name for name in named if name is not None))


def check_columns(source: PromptSource, there: Sequence[Any], where: str) -> None:
    """Refuse what lacks a column that is to be read, naming those there are.

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
    for number, row in enumerate(rows, start=1):
        if number > _MOST:
            raise PromptError(
                f"prompt set {source.source} has more than {_MOST:,} rows: give a part of it"
            )
        yield row


# -- text files ------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[Row]:
    """The lines of a text file, as the column ""; blank ones too."""
    check_regular(path, "prompt file", PromptError)
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for number, line in enumerate(_pieces(file), start=1):
                where = f"prompt file {path}, line {number}"
                if len(line) > _LONGEST_LINE:
                    raise PromptError(f"{where}: it has more than {_LONGEST_LINE:,} characters")
                if not is_whole(line):
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
    """A cell's text; None where a number was not there when the file was written."""
    return None if text is None or text.strip().lower() == "nan" else text


# -- parquet files and data sets -------------------------------------------------------------------


def _parquet_rows(path: Path, source: PromptSource) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    check_regular(path, "prompt file", PromptError)
    wanted, where = columns_of(source), f"prompt file {path}"
    try:
        schema = pyarrow.parquet.read_schema(path)
        check_columns(source, schema.names, where)
        # As they stand in the file: one long text may stand for very many rows.
        texts = [name for name in wanted if _is_text(schema.field(name).type)]
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
            _check_size(file, wanted, where)
            number = 0
            for batch in file.iter_batches(_BATCH, columns=wanted):
                for column in batch.columns:
                    _check_values(column, where)
                for row in batch.to_pylist():
                    number += 1
                    yield f"{where}, row {number}", row
    except pyarrow.ArrowException as error:
        raise _unreadable(path, error) from None
    except (OSError, ValueError, TypeError, LookupError, OverflowError) as error:
        if isinstance(error, PromptError):
            raise
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: BaseException) -> PromptError:
    reason = first_line(error)
    return PromptError(f"prompt file {path} is not a readable parquet file: {reason:.200}")


def _check_size(file: Any, columns: Sequence[str], where: str) -> None:
    """Refuse columns that take much more memory than a prompt set has."""
    meta = file.metadata
    size = 0
    for group in range(meta.num_row_groups):
        chunks = [meta.row_group(group).column(n) for n in range(meta.num_columns)]
        parts = [c for c in chunks if c.path_in_schema.split(".")[0] in columns]
        size += sum(max(c.total_uncompressed_size, c.total_compressed_size) for c in parts)
    if size > _LARGEST:
        raise PromptError(
            f"{where}: its columns {', '.join(columns):.100} take {size / 1e6:,.0f} MB, where at most "
            f"{_LARGEST / 1e6:.0f} are read: give a part of it"
        )


def _check_values(column: Any, where: str) -> None:
    """Refuse texts that are too long before they become objects; a dictionary's stand for many rows."""
    import pyarrow
    import pyarrow.compute

    values = column.dictionary if pyarrow.types.is_dictionary(column.type) else column
    longest = values.nbytes // max(1, len(values))
    if _is_text(values.type):
        longest = pyarrow.compute.max(pyarrow.compute.binary_length(values)).as_py() or 0
    if longest > 4 * LONGEST:
        raise PromptError(
            f"{where}: a value of {longest:,} bytes, where at most {LONGEST:,} are read"
        )


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    named = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return any(is_kind(kind) for is_kind in named)


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
