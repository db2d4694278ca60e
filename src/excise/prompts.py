"""Read prompt sets, hash them, and split them into direction, search and holdout parts.

Knows files and dataset ids; knows nothing of tokenizers or models.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from excise.config import PromptSection, PromptSource
from excise.errors import PromptError, first_line

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Prompt:
    """One prompt. `answer` is its known true answer, `group` a label that reports split by."""

    text: str
    answer: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one role and where they came from; `sha256` is over their texts."""

    role: str
    source: str
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def sha256(self) -> str:
        """Hash of the texts, in order, so that a changed file is noticed."""
        return _digest([prompt.text for prompt in self.prompts])

    @property
    def labels_sha256(self) -> str:
        """Hash of the answers and groups, in order."""
        return _digest([f"{prompt.answer!r} {prompt.group!r}" for prompt in self.prompts])


def _digest(texts: list[str]) -> str:
    return hashlib.sha256(b"".join(text.encode("utf-8") + b"\0" for text in texts)).hexdigest()


@dataclass(frozen=True)
class PromptSets:
    """All six roles of a run. The holdout may be empty: then nothing is measured on it."""

    target: PromptSet
    contrast: PromptSet
    target_eval: PromptSet
    contrast_eval: PromptSet
    target_holdout: PromptSet
    contrast_holdout: PromptSet

    def all(self) -> tuple[PromptSet, ...]:
        """The sets, in the order of their roles."""
        return tuple(vars(self).values())


def load_prompt_sets(section: PromptSection) -> PromptSets:
    """Read every role of `section`.

    Without sources for evaluation, the rows after the first `direction_size` evaluate. Without
    sources for the holdout, the rows after the first `eval_size` of those are the holdout. A prompt
    that an earlier part has is left out of a later one, so that the holdout is never seen before.

    Raises:
        PromptError: a set is missing, unreadable, empty or equal to its counterpart.
    """
    sides = {side: _load_side(section, side) for side in ("target", "contrast")}
    sets = PromptSets(**{s.role: s for side in sides.values() for s in side})
    _check_distinct(sets)
    return sets


def _load_side(section: PromptSection, side: str) -> tuple[PromptSet, PromptSet, PromptSet]:
    source: PromptSource | None = getattr(section, side)
    eval_source: PromptSource | None = getattr(section, f"{side}_eval")
    holdout_source: PromptSource | None = getattr(section, f"{side}_holdout")
    if source is None:
        raise PromptError(f"no {side} prompts: give --{side} FILE or a --behaviour that names them")
    n, m, h = section.direction_size, section.eval_size, section.holdout_size
    whole = None if h is None else n + m + h
    rows = read_prompts(source, limit=n if eval_source else whole)
    direction, rest = rows[:n], rows[n:]
    where = eval_source or source
    if eval_source is not None:
        rest = read_prompts(eval_source)
    rest = _without(rest, direction)
    if not rest:
        raise PromptError(
            f"{where.source}: all of its rows are used for the direction (direction_size {n}): "
            f"give --{side}-eval with other prompts, more rows, or a smaller --direction-size"
        )
    held = holdout_source or where
    holdout = rest[m:] if holdout_source is None else read_prompts(holdout_source)
    holdout = _without(holdout, direction + rest[:m])
    return (
        PromptSet(side, source.source, direction),
        PromptSet(f"{side}_eval", where.source, rest[:m]),
        PromptSet(f"{side}_holdout", held.source, holdout[:h]),
    )


def _without(rows: tuple[Prompt, ...], seen: tuple[Prompt, ...]) -> tuple[Prompt, ...]:
    texts = {prompt.text for prompt in seen}
    return tuple(prompt for prompt in rows if prompt.text not in texts)


def _check_distinct(sets: PromptSets) -> None:
    for a, b in (
        (sets.target, sets.contrast),
        (sets.target_eval, sets.contrast_eval),
        (sets.target_holdout, sets.contrast_holdout),
    ):
        if not len(a) or not len(b):
            continue
        shared = {p.text for p in a.prompts} & {p.text for p in b.prompts}
        if shared:
            raise PromptError(
                f"{a.role} and {b.role} share {len(shared)} of their prompts "
                f"({a.source}, {b.source}): the behaviour's prompts and the others must differ"
            )


def read_prompts(source: PromptSource, limit: int | None = None) -> tuple[Prompt, ...]:
    """The first `limit` prompts of a source, in order; blank ones are dropped.

    Raises:
        PromptError: missing or empty file, missing column, unknown suffix, unreachable dataset.
    """
    rows = _rows(source)
    try:
        prompts = tuple(islice((p for p in map(_prompt(source), rows) if p.text), limit))
        for prompt in prompts:
            prompt.text.encode("utf-8")  # JSON can name half of a character
    except (OSError, UnicodeError, json.JSONDecodeError, csv.Error) as error:
        raise PromptError(f"prompt file {source.source} cannot be read: {error}") from None
    if not prompts:
        raise PromptError(f"prompt set {source.source} is empty: it needs at least one prompt")
    return prompts


def _prompt(source: PromptSource) -> Any:
    def build(row: dict[str, Any]) -> Prompt:
        if source.column not in row:
            raise PromptError(
                f"prompt set {source.source} has no column {source.column!r}; "
                f"its columns are: {', '.join(map(str, row))}"
            )
        optional = []
        for column in (source.answer_column, source.group_column):
            if column is not None and column not in row:
                raise PromptError(f"prompt set {source.source} has no column {column!r}")
            value = None if column is None else row[column]
            optional.append(None if value is None else str(value))
        text = row[source.column]
        if not isinstance(text, str | int | float | None) or isinstance(text, bool):
            raise PromptError(
                f"prompt set {source.source}: column {source.column!r} holds {type(text).__name__}, "
                f"not text: {text!r:.60}"
            )
        return Prompt("" if text is None else str(text).strip(), *optional)

    return build


def _rows(source: PromptSource) -> Iterator[dict[str, Any]]:
    path = Path(source.source)
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix not in SUFFIXES:
            raise PromptError(f"prompt file {path}: use one of {', '.join(SUFFIXES)}")
        return _file_rows(path, suffix, source.column)
    if suffix in SUFFIXES or path.is_absolute() or source.source.count("/") != 1:
        raise PromptError(
            f"prompt file {source.source} does not exist (a dataset id looks like owner/name)"
        )
    return _dataset_rows(source)


def _file_rows(path: Path, suffix: str, column: str) -> Iterator[dict[str, Any]]:
    if suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    with path.open(encoding="utf-8-sig", newline="") as file:
        if suffix == ".txt":
            yield from ({column: line} for line in file)
        elif suffix == ".csv":
            yield from _csv_rows(path, csv.DictReader(file, strict=True))
        else:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise PromptError(f"prompt file {path}, line {number}: not a JSON object")
                yield row


def _csv_rows(path: Path, reader: csv.DictReader[str]) -> Iterator[dict[str, Any]]:
    for row in reader:
        if None in row:  # what stands beyond the header's last column
            raise PromptError(
                f"prompt file {path}, line {reader.line_num}: more fields than the header has: put "
                "quotes around text with commas"
            )
        yield dict(row)


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise PromptError(f"prompt file {path} is not a readable parquet file: {error}") from None


def _dataset_rows(source: PromptSource) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(
            source.source, source.subset, split=source.split, revision=source.revision
        )
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise PromptError(
            f"dataset {source.source} (split {source.split}) cannot be loaded: {first_line(error)}"
        ) from None
    yield from dataset
