"""Passes over many texts at once: rows are candidates x texts, and what rows share runs once.

Below its first edited layer a candidate is the original model, so those layers run once per different
text, and each candidate's rows join the pass at its own first edited layer. What all texts begin with,
such as a system prompt, is read once per candidate of a stack.

Shapes: B rows, U different texts, T tokens, D width.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from excise.engine.stacking import Stack
from excise.model.forward import Forward
from excise.model.fused_layers import Alike, Inputs
from excise.model.kv_cache import share_lower_layers, take_rows
from excise.prompts.tokens import left_pad

Text = tuple[int, ...]

# A pass in parts has a call for each of them, which costs every row of it about as much as this share
# of a layer: masks, positions, per-layer embeddings.
_CALL_COST = 0.5
# Going on from a cache costs every token about this share of a layer: keys and values are written to it.
_CACHE_COST = 0.05


@dataclass(frozen=True)
class Rows:
    """Row b of a pass carries candidate owners[b], in ascending order, and holds texts[b]."""

    owners: list[int]
    texts: list[Text]

    @classmethod
    def grid(cls, members: Sequence[int], texts: Sequence[Text]) -> Rows:
        """Every one of these candidates with every one of these texts, candidate-major."""
        owners = [member for member in members for _ in texts]
        return cls(owners, list(texts) * len(members))


@dataclass(frozen=True)
class Past:
    """What rows have read so far, left-padded: keys and values, and which positions hold them."""

    cache: Any
    mask: Tensor  # (B, T)

    def pads(self) -> list[int]:
        """Positions before each row's first token."""
        pads: list[int] = (self.mask.shape[1] - self.mask.sum(-1)).tolist()
        return pads


@dataclass(frozen=True)
class After:
    """What rows of a pass have read before: row b goes on from row places[b] of the past.

    The past is of caches that `can_join`, and stays as it is.
    """

    past: Past
    places: Sequence[int]


@dataclass(frozen=True)
class _Given:
    """What the rows of a pass are given, and which rows of it hold the different texts."""

    inputs: Inputs
    different: list[int]  # (U,) of the rows with the same text, the last
    picked: list[int]  # (B,) which of the different texts each row holds

    def of(self, rows: Sequence[int]) -> Inputs:
        """What some rows are given."""
        return self.inputs.of(torch.tensor(rows, device=self.inputs.ids.device))


# Gives a pass over some rows, through the layers from one to another, the cache that it goes on from.
_Caches = Callable[[Sequence[int], range], Any]


class Passes:
    """Forward passes of one stack's candidates."""

    def __init__(
        self,
        forward: Forward,
        stack: Stack,
        pad: int,
        *,
        reuse: bool,
        prefixes: Sequence[Text] = (),
    ) -> None:
        """Prepare passes; none runs yet.

        Args:
            forward: the model.
            stack: the candidates' edits.
            pad: the padding token.
            reuse: run layers below a candidate's first edited one once for all candidates.
            prefixes: token prefixes that many texts share; for caches that `can_join`.
        """
        self.forward = forward
        self.stack = stack
        self._anatomy = forward.anatomy
        self._pad = pad
        self._reuse = reuse
        self._prefixes = sorted(prefixes, key=len, reverse=True)
        self._prefilled: dict[tuple[Text, tuple[int, ...]], Past] = {}

    def free(self) -> None:
        """Free the prefilled prefixes; they are prefilled again where they are needed."""
        self._prefilled.clear()

    def read(self, rows: Rows, keep: int, after: After | None = None) -> Tensor:
        """Hidden states (B, keep, D) at the last `keep` tokens of every row.

        `after`: what was read of the texts, each of which has at least one token more; no state of
        the tokens read before is kept.
        """
        after = after or self._prefix(rows, keep)
        given, caches = self._open(rows, None, after)
        steps = joining(self._starts(rows))
        return self._climb(rows, given, caches, keep, steps)

    def fill(self, rows: Rows, room: int, after: After | None = None) -> tuple[Tensor, Past]:
        """Hidden states (B, D) at every row's last token, and the past of it with more room."""
        after = after or self._prefix(rows, 1)
        given, caches = self._open(rows, room, after)
        layer = self._starts(rows)[0]
        filled: dict[int, Any] = {}  # by the layer that a part of the pass begins at

        def remembered(some: Sequence[int], layers: range) -> Any:
            filled[layers.start] = caches(some, layers)
            return filled[layers.start]

        # All rows join at once: a layer's keys and values are then those of all of them.
        states = self._climb(rows, given, remembered, 1, [(layer, len(rows.owners))])
        if layer > 0:
            share_lower_layers(filled[0], filled[layer], layer, torch.tensor(given.picked))
        return states[:, -1], Past(filled[layer], given.inputs.mask)

    def _open(self, rows: Rows, room: int | None, after: After | None) -> tuple[_Given, _Caches]:
        """What is left to read of texts, and the caches to go on from.

        Texts are left-padded, and so is their past: where a row has less to read than others, it reads
        some of its last tokens again, where padding would be otherwise, and nothing has a gap.

        Caches hold the whole texts with so much more room; None: they need hold the past only.
        """
        before, read = 0, [0] * len(rows.texts)
        if after is not None:
            before, pads = after.past.mask.shape[1], after.past.pads()
            read = [before - pads[place] for place in after.places]
        new = [len(text) - n for text, n in zip(rows.texts, read, strict=True)]
        columns = max(new)
        width = before + columns
        different, picked = _distinct(rows)
        texts = [rows.texts[row] for row in different]
        tails = [text[-columns:] for text in texts]
        ids = left_pad(tails, different, self._pad, self.forward.device).ids
        starts = torch.tensor([[width - len(text)] for text in texts], device=ids.device)
        places = torch.arange(width, device=ids.device)
        mask = (places >= starts).long()
        positions = (places[before:] - starts).clamp_min(0)

        def caches(some: Sequence[int], layers: range) -> Any:
            if after is None and room is None:
                return None
            empty = self.forward.cache(width + (room or 0))
            if after is None:
                return empty
            moved = [columns - new[row] for row in some]
            return take_rows(
                after.past.cache, empty, [after.places[row] for row in some], layers, moved
            )

        each = torch.tensor(picked, device=ids.device)
        return _Given(Inputs(ids, mask, positions).of(each), different, picked), caches

    def _prefix(self, rows: Rows, keep: int) -> After | None:
        """Return the longest prefix that all texts share, prefilled once per candidate, if that pays."""
        members = tuple(dict.fromkeys(rows.owners))
        width = max(map(len, rows.texts))
        for known in self._prefixes:
            n = len(known)
            if n <= _CACHE_COST * width:
                break
            if width - n >= keep and all(len(t) > n and t[:n] == known for t in set(rows.texts)):
                past = self._prefilled.get((known, members))
                if past is None:
                    past = self.fill(Rows.grid(members, [known]), 0)[1]
                    self._prefilled[known, members] = past
                place = {member: place for place, member in enumerate(members)}
                return After(past, [place[owner] for owner in rows.owners])
        return None

    def _climb(
        self,
        rows: Rows,
        given: _Given,
        caches: _Caches,
        keep: int,
        steps: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Hidden states (B, keep, D): layer by layer upwards, rows joining as `steps` says."""
        hidden, shared = None, None  # of the rows that have joined, of the texts of those that wait
        alike = None  # of the rows that have joined, those that `hidden` holds once
        waiting = {number: number for number in range(len(given.different))}
        for (layer, active), (above, more) in pairwise([(0, 0), *steps]):
            layers, some = range(layer, above), range(active)
            joining = given.picked[active:more]
            if not layers:
                alike = self._alike(active, joining)
                continue
            if active:
                cache = caches(some, layers)
                with self.stack.applied(rows.owners[:active]):
                    hidden = self.forward.through(
                        layers, given.of(some), cache, hidden=hidden, alike=alike
                    )
            left = sorted(set(given.picked[active:]))
            shared = None if shared is None else shared[[waiting[number] for number in left]]
            waiting = {number: place for place, number in enumerate(left)}
            same = [given.different[number] for number in left]
            cache = caches(same, layers)
            shared = self.forward.through(layers, given.of(same), cache, hidden=shared)
            joined = shared[[waiting[number] for number in dict.fromkeys(joining)]]
            hidden = joined if hidden is None else torch.cat([hidden, joined])
            alike = self._alike(active, joining)
        layers, every = range(steps[-1][0], len(self._anatomy.layers)), range(len(rows.owners))
        cache = caches(every, layers)
        with self.stack.applied(rows.owners):
            return self.forward.through(
                layers, given.inputs, cache, hidden=hidden, keep=keep, alike=alike
            )

    def _alike(self, before: int, texts: Sequence[int]) -> Alike | None:
        """Which of some rows are the same, in a pass that holds so many others before them.

        They are as they join, where they have the same text. None where no two of them are, and where
        nothing is to be reused (then no row waits for others, and all have states of their own).
        """
        kinds = {text: before + number for number, text in enumerate(dict.fromkeys(texts))}
        if len(kinds) == len(texts) or not self._reuse:
            return None
        each = [*range(before), *(kinds[text] for text in texts)]
        first = {kind: row for row, kind in reversed(list(enumerate(each)))}
        rows = [first[kind] for kind in range(before + len(kinds))]
        device = self.forward.device
        return Alike(torch.tensor(rows, device=device), torch.tensor(each, device=device))

    def _starts(self, rows: Rows) -> list[int]:
        """Per row the layer where it may begin, never above that of a row after it.

        Zero where that would not pay: where few rows have a text in common.
        """
        most = min(self._anatomy.skippable, len(self._anatomy.layers) - 1) if self._reuse else 0
        layers = [min(self.stack.first_of(owner), most) for owner in rows.owners]
        starts = list(accumulate(reversed(layers), min))[::-1]
        waiting = {text for text, start in zip(rows.texts, starts, strict=True) if start}
        saved = sum(starts) - len(waiting) * starts[-1]
        return starts if saved > _CALL_COST * len(waiting) else [0] * len(starts)


def _distinct(rows: Rows) -> tuple[list[int], list[int]]:
    """The last row of every different text, and which of the texts each row holds.

    The last, because no row begins higher: below that, its past is the original model's.
    """
    last = {text: row for row, text in enumerate(rows.texts)}
    numbers = {text: number for number, text in enumerate(last)}
    return list(last.values()), [numbers[text] for text in rows.texts]


def joining(starts: Sequence[int]) -> list[tuple[int, int]]:
    """When rows join a pass: (layer, rows that take part from there on), both ascending.

    Args:
        starts: per row the layer where it may begin, ascending. It may always begin lower.
    """
    steps, layer = [], starts[0]
    for above in sorted(set(starts))[1:]:
        active = bisect_left(starts, above)
        if (len(starts) - active) * (above - layer) > _CALL_COST * active:
            steps.append((layer, active))
            layer = above
    return [*steps, (layer, len(starts))]
