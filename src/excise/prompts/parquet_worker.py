"""Worker process that reads a .parquet file for `prompt_files`, called with FILE COLUMN...

The library crashes on some damaged files, and a small file can hold gigabytes, so it runs in a process
of its own with a memory limit. Answers are JSON lines on standard output: the file's columns, then
lists of rows, then an empty object. In place of any of them an error may come.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from decimal import Decimal
from typing import Any, BinaryIO

import pyarrow
import pyarrow.compute
import pyarrow.parquet
from pyarrow import types

from excise.prompts.memory_limit import limit_memory

_MEMORY = 3 << 28  # bytes; pyarrow reserves any whole gigabyte at once
_BATCH = 64  # rows that are decoded together
_LARGEST = 1 << 27  # bytes that the columns may take, by their metadata
_LONGEST = 1 << 19  # bytes of one value
_SHOWN = 60  # characters that a message shows of a value
_FAILURES = (pyarrow.ArrowException, OSError, ValueError, TypeError, LookupError, OverflowError)


class _ParquetError(Exception):
    pass


def answers(path: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield what the file holds: `columns`, then `rows`; or `failed`, what is wrong with it."""
    try:
        schema = pyarrow.parquet.read_schema(path)
        yield {"columns": schema.names}
        if set(columns) <= set(schema.names):
            for batch in _batches(path, columns, schema):
                yield from _rows(batch)
    except MemoryError:
        yield {"failed": f"takes more than {_MEMORY >> 20} MB of memory"}
    except _ParquetError as fault:
        yield {"failed": str(fault)}
    except _FAILURES as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        yield {"failed": f"is not a readable parquet file: {lines[0]:.200}"}


def _batches(path: str, columns: Sequence[str], schema: Any) -> Iterator[Any]:
    # Keep dictionary encoding: one long text may stand for very many rows.
    texts = [name for name in columns if _is_text(schema.field(name).type)]
    with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
        size = _size(file.metadata, columns)
        if size > _LARGEST:
            names = ", ".join(columns)
            raise _ParquetError(
                f"is too large: {names:.100} take {size / 1e6:,.0f} MB, where at most "
                f"{_LARGEST / 1e6:.0f} are read: give a part of it"
            )
        yield from file.iter_batches(_BATCH, columns=list(columns), use_threads=False)


def _size(meta: Any, columns: Sequence[str]) -> int:
    groups = [meta.row_group(number) for number in range(meta.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(meta.num_columns)]
    ours = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
    return sum(max(chunk.total_uncompressed_size, chunk.total_compressed_size) for chunk in ours)


def _is_text(kind: Any) -> bool:
    named = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return any(is_kind(kind) for is_kind in named)


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    for column in batch.columns:
        _check_values(column)
    rows: list[dict[str, Any]] = []
    for row in batch.to_pylist():
        kept = {}
        for name, value in row.items():
            if isinstance(value, Decimal | date):  # Decimal has a NaN too
                value = str(value) if value == value else None
            if not isinstance(value, str | bool | int | float | None):
                yield {"rows": rows}
                shown = repr(value)[:_SHOWN]
                raise _ParquetError(
                    f"column {name!r:.60} holds {type(value).__name__}, not text: {shown}"
                )
            kept[name] = value
        rows.append(kept)
    yield {"rows": rows}


def _check_values(column: Any) -> None:
    """Refuse texts that are too long before they become objects: a dictionary's stand for many rows."""
    values = column.dictionary if types.is_dictionary(column.type) else column
    longest = values.nbytes // max(1, len(values))
    if _is_text(values.type):
        longest = pyarrow.compute.max(pyarrow.compute.binary_length(values)).as_py() or 0
    if longest > _LONGEST:
        raise _ParquetError(
            f"has a value of {longest:,} bytes, where at most {_LONGEST:,} are read"
        )


def _main(arguments: Sequence[str]) -> None:
    # Whatever a library prints to standard output must not come between the answers.
    out: BinaryIO = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # More threads, and other memory pools, reserve much more than they use.
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())
    pyarrow.set_io_thread_count(1)
    pyarrow.set_cpu_count(1)
    limit_memory(_MEMORY)
    path, *columns = arguments
    with out:
        for answer in answers(path, columns):
            out.write(json.dumps(answer).encode() + b"\n")
            out.flush()
        out.write(b"{}\n")


if __name__ == "__main__":
    _main(sys.argv[1:])
