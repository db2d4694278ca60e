"""Batched forward passes over (candidate, prompt) rows.

Layers below a candidate's first edit run once per distinct prompt: there the candidate is the original
model. Its rows join the batch at its own first edited layer. A common prefix, such as a system prompt, is
prefilled once per candidate of a stack.

Shapes: B rows, U distinct texts, T tokens, D width.
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
from excise.model.fused_layers import Duplicates, Inputs
from excise.model.kv_cache import share_lower_layers, take_rows
from excise.prompts.tokens import left_pad

Text = tuple[int, ...]

# Cost of one more call in a pass (masks, positions, per-layer embeddings): a share of a layer's, per row.
_CALL_COST = 0.5
# Cost of copying a cache, as a share of a layer's, per token.
_CACHE_COST = 0.05


@dataclass(frozen=True)
class Rows:
    """The rows of a batch: row b holds texts[b] and carries candidate owners[b]; owners ascend."""

    owners: list[int]
    texts: list[Text]

    @classmethod
    def grid(cls, members: Sequence[int], texts: Sequence[Text]) -> Rows:
        """Return the product of candidates and texts, candidate-major."""
        owners = [member for member in members for _ in texts]
        return cls(owners, list(texts) * len(members))


@dataclass(frozen=True)
class Past:
    """KV cache of a left-padded batch, and the attention mask of its positions."""

    cache: Any
    mask: Tensor  # (B, T)

    def pads(self) -> list[int]:
        """Return the number of padding positions per row."""
        pads: list[int] = (self.mask.shape[1] - self.mask.sum(-1)).tolist()
        return pads


@dataclass(frozen=True)
class CachedRows:
    """Where the rows of a batch continue a KV cache: row b from row places[b] of `past`.

    `past` is copied from, never written. Its cache is one that `can_join`.
    """

    past: Past
    places: Sequence[int]


@dataclass(frozen=True)
class _Given:
    """Inputs of a pass, and which of its rows hold the distinct texts."""

    inputs: Inputs
    different: list[int]  # (U,) the last row of each distinct text
    picked: list[int]  # (B,) index of each row's text among the distinct ones

    def of(self, rows: Sequence[int]) -> Inputs:
        """Return the inputs of some rows."""
        return self.inputs.of(torch.tensor(rows, device=self.inputs.ids.device))


# Returns the cache that a pass of these rows through these layers continues; None where it needs none.
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

    def read(self, rows: Rows, keep: int, after: CachedRows | None = None) -> Tensor:
        """Return hidden states (B, keep, D) at the last `keep` tokens of every row (teacher forcing).

        With `after`, the texts begin with what its rows hold, and have at least one token more. States
        of cached tokens are not returned.
        """
        after = after or self._prefix(rows, keep)
        given, caches = self._open(rows, None, after)
        steps = join_schedule(self._starts(rows))
        return self._run(rows, given, caches, keep, steps)

    def prefill(
        self, rows: Rows, room: int, after: CachedRows | None = None
    ) -> tuple[Tensor, Past]:
        """Return hidden states (B, D) at every row's last token, and a cache with room for more tokens."""
        after = after or self._prefix(rows, 1)
        given, caches = self._open(rows, room, after)
        layer = self._starts(rows)[0]
        filled: dict[int, Any] = {}  # by the first layer of each part of the pass

        def remembered(some: Sequence[int], layers: range) -> Any:
            filled[layers.start] = caches(some, layers)
            return filled[layers.start]

        # All rows join at once: a layer's keys and values are then those of all of them.
        states = self._run(rows, given, remembered, 1, [(layer, len(rows.owners))])
        if layer > 0:
            share_lower_layers(filled[0], filled[layer], layer, torch.tensor(given.picked))
        return states[:, -1], Past(filled[layer], given.inputs.mask)

    def _open(
        self, rows: Rows, room: int | None, after: CachedRows | None
    ) -> tuple[_Given, _Caches]:
        """Return the inputs that remain beyond the cached tokens, and the caches to continue.

        Texts and caches are left-padded. A row with fewer new tokens than others reads some of its last
        cached tokens again in place of padding, so that no row has a gap.

        Caches have capacity for whole texts plus `room`; with None, no cache is kept beyond `after`.
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

    def _prefix(self, rows: Rows, keep: int) -> CachedRows | None:
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
                    past = self.prefill(Rows.grid(members, [known]), 0)[1]
                    self._prefilled[known, members] = past
                place = {member: place for place, member in enumerate(members)}
                return CachedRows(past, [place[owner] for owner in rows.owners])
        return None

    def _run(
        self,
        rows: Rows,
        given: _Given,
        caches: _Caches,
        keep: int,
        steps: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Return hidden states (B, keep, D); rows join at the layers that `steps` names."""
        hidden, shared = None, None  # of the rows that have joined; of waiting texts
        duplicates = None  # rows that `hidden` holds once
        waiting = {number: number for number in range(len(given.different))}
        for (layer, active), (above, more) in pairwise([(0, 0), *steps]):
            layers, some = range(layer, above), range(active)
            joining = given.picked[active:more]
            if not layers:
                duplicates = self._duplicates(active, joining)
                continue
            if active:
                cache = caches(some, layers)
                with self.stack.applied(rows.owners[:active]):
                    hidden = self.forward.run_layers(
                        layers, given.of(some), cache, hidden=hidden, duplicates=duplicates
                    )
            left = sorted(set(given.picked[active:]))
            shared = None if shared is None else shared[[waiting[number] for number in left]]
            waiting = {number: place for place, number in enumerate(left)}
            same = [given.different[number] for number in left]
            cache = caches(same, layers)
            shared = self.forward.run_layers(layers, given.of(same), cache, hidden=shared)
            joined = shared[[waiting[number] for number in dict.fromkeys(joining)]]
            hidden = joined if hidden is None else torch.cat([hidden, joined])
            duplicates = self._duplicates(active, joining)
        layers, every = range(steps[-1][0], len(self._anatomy.layers)), range(len(rows.owners))
        cache = caches(every, layers)
        with self.stack.applied(rows.owners):
            return self.forward.run_layers(
                layers, given.inputs, cache, hidden=hidden, keep=keep, duplicates=duplicates
            )

    def _duplicates(self, before: int, texts: Sequence[int]) -> Duplicates | None:
        """Return which of the joining rows have equal states, after `before` rows that differ.

        Rows of one text are equal when they join. None where no two are, or where nothing is reused.
        """
        kinds = {text: before + number for number, text in enumerate(dict.fromkeys(texts))}
        if len(kinds) == len(texts) or not self._reuse:
            return None
        each = [*range(before), *(kinds[text] for text in texts)]
        first = {kind: row for row, kind in reversed(list(enumerate(each)))}
        rows = [first[kind] for kind in range(before + len(kinds))]
        device = self.forward.device
        return Duplicates(torch.tensor(rows, device=device), torch.tensor(each, device=device))

    def _starts(self, rows: Rows) -> list[int]:
        """Return per row the layer at which it joins, ascending; all zero where few rows share a text."""
        most = min(self._anatomy.skippable, len(self._anatomy.layers) - 1) if self._reuse else 0
        layers = [min(self.stack.first_of(owner), most) for owner in rows.owners]
        starts = list(accumulate(reversed(layers), min))[::-1]
        waiting = {text for text, start in zip(rows.texts, starts, strict=True) if start}
        saved = sum(starts) - len(waiting) * starts[-1]
        return starts if saved > _CALL_COST * len(waiting) else [0] * len(starts)


def _distinct(rows: Rows) -> tuple[list[int], list[int]]:
    """Return the last row of every distinct text, and the index of each row's text among them.

    The last row joins highest: below that layer its cache is the original model's.
    """
    last = {text: row for row, text in enumerate(rows.texts)}
    numbers = {text: number for number, text in enumerate(last)}
    return list(last.values()), [numbers[text] for text in rows.texts]


def join_schedule(starts: Sequence[int]) -> list[tuple[int, int]]:
    """Return when rows join a pass: (layer, number of rows from that layer on), both ascending.

    Args:
        starts: the highest layer at which each row may join, ascending.
    """
    steps, layer = [], starts[0]
    for above in sorted(set(starts))[1:]:
        active = bisect_left(starts, above)
        if (len(starts) - active) * (above - layer) > _CALL_COST * active:
            steps.append((layer, active))
            layer = above
    return [*steps, (layer, len(starts))]
