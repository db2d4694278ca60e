"""Read prompt sets, hash them, and split them into direction, search and holdout parts.

Knows nothing of file formats (`prompt_files`), nor of tokenizers or models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import Any

from excise.config import PromptSection, PromptSource
from excise.errors import PromptError
from excise.prompts.prompt_files import LONGEST, read_rows
from excise.reading import is_file, is_unicode
from excise.trees import BUILTIN

_SHIPPED = PromptSource(
    source=str(resources.files("excise") / "data" / "keep" / "prompts.jsonl"), group_column="kind"
)
_LEAST_HELD = 100  # rows that the holdout keeps before any go to `confirm`
_MOST = 100_000  # prompts of one set
_LARGEST = 1 << 28  # characters of one set


@dataclass(frozen=True)
class Prompt:
    """One prompt. `answer` is its known true answer, `group` a label that reports split by."""

    text: str
    answer: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one role and where they came from."""

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
    """Prompt sets of all roles of a run. All but the first four may be empty: then they are not used."""

    target: PromptSet
    contrast: PromptSet
    target_eval: PromptSet
    contrast_eval: PromptSet
    target_holdout: PromptSet
    contrast_holdout: PromptSet
    keep: PromptSet = PromptSet("keep", "", ())
    target_confirm: PromptSet = PromptSet("target_confirm", "", ())
    contrast_confirm: PromptSet = PromptSet("contrast_confirm", "", ())
    borderline_eval: PromptSet = PromptSet("borderline_eval", "", ())
    borderline_holdout: PromptSet = PromptSet("borderline_holdout", "", ())

    def all(self) -> tuple[PromptSet, ...]:
        """Return the sets, in the order of their roles.

        `confirm` is there only where both sides have prompts, the borderline sets only where there are any.
        """
        confirms = len(self.target_confirm) and len(self.contrast_confirm)
        return tuple(
            s
            for role, s in vars(self).items()
            if (confirms or not role.endswith("confirm"))
            and (len(s) or not role.startswith("borderline"))
        )

    def without_keep(self) -> PromptSets:
        """Return the sets for work that has no use for the keep set."""
        return replace(self, keep=PromptSet("keep", "", ()))


def load_prompt_sets(section: PromptSection) -> PromptSets:
    """Read every role of `section`.

    Without sources for evaluation, the rows after the first `direction_size` evaluate. Without
    sources for the holdout, the rows after the first `eval_size` of those are the holdout. What that
    can spare at its end is `confirm`: at most `confirm_size` rows, and none where the holdout would have
    fewer than `holdout_size`, or 100. A prompt that stands in an earlier part is left out of a later one,
    so neither the search nor the choice sees the holdout.

    Raises:
        PromptError: a set is missing, unreadable, empty or equal to its counterpart.
    """
    sides = {side: _load_side(section, side) for side in ("target", "contrast")}
    sets = PromptSets(**{s.role: s for side in sides.values() for s in side})
    _check_distinct(sets)
    sets = replace(sets, **_load_borderline(section, sets))
    return replace(sets, keep=_load_keep(section, sets))


def _load_side(section: PromptSection, side: str) -> tuple[PromptSet, ...]:
    source: PromptSource | None = getattr(section, side)
    eval_source: PromptSource | None = getattr(section, f"{side}_eval")
    holdout_source: PromptSource | None = getattr(section, f"{side}_holdout")
    if source is None:
        raise PromptError(f"no {side} prompts: give --{side} FILE or a --behaviour that names them")
    n, m, h = section.direction_size, section.eval_size, section.holdout_size
    whole = None if h is None else n + m + section.confirm_size + h
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
    seen, spare, held = direction + rest[:m], rest[m:], holdout_source or where
    if holdout_source is None:
        spare = _without(spare, seen)
        beyond = min(section.confirm_size, max(0, len(spare) - (h or _LEAST_HELD)))
        end = min(h or len(spare) - beyond, len(spare))
        holdout, confirm = spare[:end], _without(spare[end : end + beyond], spare[:end])
    else:
        holdout = _without(read_prompts(holdout_source), seen)
        confirm = _without(spare, seen + holdout)[: section.confirm_size]
    return (
        PromptSet(side, source.source, direction),
        PromptSet(f"{side}_eval", where.source, rest[:m]),
        PromptSet(f"{side}_confirm", where.source, confirm),
        PromptSet(f"{side}_holdout", held.source, holdout[:h]),
    )


def _load_borderline(section: PromptSection, sets: PromptSets) -> dict[str, PromptSet]:
    """Read the borderline set, sources in turn: at most half of it scores trials, the rest is its holdout.

    Raises:
        PromptError: a source cannot be read, or fewer than two of its prompts are in no other set.
    """
    if not section.borderline:
        return {}
    try:
        rows = _in_turn([read_prompts(source) for source in section.borderline])
    except PromptError as error:
        raise PromptError(f"{error} (--set prompts.borderline=[] leaves this set out)") from None
    seen = tuple(p for s in sets.all() for p in s.prompts)
    kept = _without(tuple(dict.fromkeys(rows)), seen)
    name = _sources(section.borderline)
    if len(kept) < 2:
        raise PromptError(
            f"{name}: borderline prompts must be at least two that no other set holds"
        )
    n = min(section.eval_size, len(kept) // 2)
    most = None if section.holdout_size is None else n + section.holdout_size
    return {
        "borderline_eval": PromptSet("borderline_eval", name, kept[:n]),
        "borderline_holdout": PromptSet("borderline_holdout", name, kept[n:most]),
    }


def _sources(sources: Sequence[PromptSource]) -> str:
    """Name several sources: files by their names alone, as a record holds no path of the user's machine."""
    return ", ".join(Path(s.source).name if is_file(Path(s.source)) else s.source for s in sources)


def _load_keep(section: PromptSection, sets: PromptSets) -> PromptSet:
    """Read the keep set: each prompt once, and none of another role, which edits must not see.

    Sources take turns, and so do the groups of each, so that the first `keep_size` rows hold them all.
    """
    sources = [
        read_prompts(_SHIPPED if source.source == BUILTIN else source) for source in section.keep
    ]
    rows: dict[str, Prompt] = {}
    for prompt in _in_turn(map(_groups_in_turn, sources)):
        rows.setdefault(prompt.text, prompt)
    kept = _without(tuple(rows.values()), tuple(p for s in sets.all() for p in s.prompts))
    names = _sources(section.keep)
    if names and not kept:
        raise PromptError(
            f"{names}: the other sets of prompts hold all of its rows: "
            "give --keep with other prompts, or --no-keep"
        )
    return PromptSet("keep", names, kept[: section.keep_size])


def _groups_in_turn(rows: Sequence[Prompt]) -> list[Prompt]:
    groups: dict[str | None, list[Prompt]] = {}
    for prompt in rows:
        groups.setdefault(prompt.group, []).append(prompt)
    return _in_turn(groups.values())


def _in_turn(groups: Iterable[Sequence[Prompt]]) -> list[Prompt]:
    return [prompt for row in zip_longest(*groups) for prompt in row if prompt is not None]


def _without(rows: tuple[Prompt, ...], seen: tuple[Prompt, ...]) -> tuple[Prompt, ...]:
    texts = {prompt.text for prompt in seen}
    return tuple(prompt for prompt in rows if prompt.text not in texts)


def _check_distinct(sets: PromptSets) -> None:
    for a, b in (
        (sets.target, sets.contrast),
        (sets.target_eval, sets.contrast_eval),
        (sets.target_confirm, sets.contrast_confirm),
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
    """Read the first `limit` prompts of a source, in order; drop blank ones.

    Raises:
        PromptError: missing or empty file, missing column, unknown suffix, unreachable dataset; a row that
            is not text, or far more text than a prompt set has.
    """
    prompts: list[Prompt] = []
    size = 0
    for where, row in read_rows(source):
        prompt = _prompt(source, row, where)
        if not prompt.text:
            continue
        prompts.append(prompt)
        size += sum(len(part or "") for part in (prompt.text, prompt.answer, prompt.group))
        if size > _LARGEST or len(prompts) > _MOST:
            raise PromptError(
                f"prompt set {source.source} has more than {_MOST:,} prompts, or {_LARGEST:,} characters: "
                "give a part of it"
            )
        if len(prompts) == limit:
            break
    if not prompts:
        raise PromptError(f"prompt set {source.source} is empty: it needs at least one prompt")
    return tuple(prompts)


def _prompt(source: PromptSource, row: dict[str, Any], where: str) -> Prompt:
    if isinstance(row[source.column], bool):
        raise PromptError(f"{where}: column {source.column!r:.60} holds bool, not text")
    columns = (source.column, source.answer_column, source.group_column)
    text, *optional = (None if c is None else _text(row[c], c, where) for c in columns)
    return Prompt("" if text is None else text.strip(), *optional)


def _text(value: Any, column: str, where: str) -> str | None:
    """Return a value as text; None where there is none, as where a number is missing."""
    if value is None or value != value:  # NaN
        return None
    if not isinstance(value, str | bool | int | float | Decimal | date):
        kind = type(value).__name__
        raise PromptError(f"{where}: column {column!r:.60} holds {kind}, not text: {value!r:.60}")
    text = str(value)
    if len(text) > LONGEST:
        raise PromptError(
            f"{where}: a text of {len(text):,} characters, where at most {LONGEST:,} are read"
        )
    if not is_unicode(text):
        raise PromptError(
            f"{where}: column {column!r:.60} holds half of a character (a lone surrogate): remove it"
        )
    return text
