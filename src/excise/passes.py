"""Passes over whole texts: rows are candidates x texts, and what candidates share runs once.

Below its first edited layer a candidate is the original model, so what those layers make of a text is
kept while a batch of candidates is measured, and each candidate's rows join a pass at that layer.

Shapes: B rows, U different texts, T tokens, D width.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from excise.anatomy import Anatomy
from excise.forward import Forward
from excise.kvcache import share_lower_layers
from excise.stacking import Stack
from excise.tokens import Batch, left_pad, right_pad

Text = tuple[int, ...]

# States of lower layers are kept up to about this many bytes: the oldest go before a pass begins.
_BANK_BYTES = 512 * 2**20
# Rows that wait for their layer make others begin with a call of their own, which costs each row of
# it about as much as this share of a layer: masks, positions, per-layer embeddings.
_CALL_COST = 0.5


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


class Bank:
    """What the layers below one layer make of texts: states that no edit above them can change.

    Rows of a tensor, one per token. Row 0 stands for padding: it is masked, so any real state will do.
    """

    def __init__(self) -> None:
        self._places: dict[Text, int] = {}
        self._states: Tensor | None = None
        self._filled = 1

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return 0 if self._states is None else self._states.nbytes

    def missing(self, texts: Sequence[Text]) -> list[Text]:
        """Those of the texts that it does not hold, each once."""
        return [text for text in dict.fromkeys(texts) if text not in self._places]

    def add(self, texts: Sequence[Text], hidden: Tensor) -> None:
        """Keep the states (N, T, D) of left-padded texts."""
        rows = [row[-len(text) :] for text, row in zip(texts, hidden, strict=True)]
        if self._states is None:
            self._states = hidden[0, -1:].clone()
        end = self._filled + sum(map(len, texts))
        if end > len(self._states):
            grown = self._states.new_zeros(max(end, 2 * len(self._states)), hidden.shape[-1])
            grown[: self._filled] = self._states[: self._filled]
            self._states = grown
        self._states[self._filled : end] = torch.cat(rows)
        for text in texts:
            self._places[text] = self._filled
            self._filled += len(text)

    def take(self, texts: Sequence[Text], width: int) -> Tensor:
        """States (N, width, D) of left-padded texts."""
        assert self._states is not None
        index = torch.zeros(len(texts), width, dtype=torch.long)
        for row, text in enumerate(texts):
            start = self._places[text]
            index[row, width - len(text) :] = torch.arange(start, start + len(text))
        return self._states[index.to(self._states.device)]


class Passes:
    """Runs texts through one model under a stack's edits."""

    def __init__(self, forward: Forward, anatomy: Anatomy, pad: int, *, reuse: bool) -> None:
        """`reuse`: run layers below a candidate's first edited one once for all candidates."""
        self.forward = forward
        self._anatomy = anatomy
        self._pad = pad
        self._reuse = reuse
        self._banks: OrderedDict[int, Bank] = OrderedDict()

    def batch(self, texts: Sequence[Text]) -> Batch:
        """These texts, left-padded, on the model's device."""
        return left_pad(texts, range(len(texts)), self._pad, self.forward.device)

    def continuation(self, texts: Sequence[Text]) -> Batch:
        """These texts as they go on from a cache: right-padded."""
        return right_pad(texts, self._pad, self.forward.device)

    def forget(self) -> None:
        """Let go of what is kept of lower layers."""
        self._banks.clear()

    def read(self, stack: Stack, rows: Rows, keep: int) -> Tensor:
        """Hidden states (B, keep, D) at the last `keep` tokens of every row."""
        batch, picked = self._distinct(rows)
        texts = (batch.ids[picked], batch.mask[picked], batch.positions[picked])
        starts = self._starts(stack, rows, len(batch.rows))
        if starts[-1] == 0:
            stack.select(rows.owners)
            return self.forward.hidden(*texts, None, keep)
        while self._banks and sum(bank.nbytes for bank in self._banks.values()) > _BANK_BYTES:
            self._banks.popitem(last=False)
        steps = joining(starts)
        width = batch.ids.shape[1]
        layer, active = steps[0]
        hidden = self._below(stack, layer, rows.texts[:active], width)
        for (layer, active), (above, more) in pairwise(steps):
            stack.select(rows.owners[:active])
            with self._from(layer, hidden):
                hidden = self.forward.up_to(above, *(part[:active] for part in texts))
            joined = self._below(stack, above, rows.texts[active:more], width)
            assert joined is not None, "only the first step may begin at the first layer"
            hidden = torch.cat([hidden, joined])
        stack.select(rows.owners)
        with self._from(steps[-1][0], hidden):
            return self.forward.hidden(*texts, None, keep)

    def fill(self, stack: Stack, rows: Rows, room: int) -> tuple[Tensor, Any, Tensor]:
        """Hidden states (B, D) at every row's last token, the cache with more room, and the mask."""
        batch, picked = self._distinct(rows)
        capacity = batch.ids.shape[1] + room
        layer = self._starts(stack, rows, len(batch.rows))[0]
        cache, lower, hidden = self.forward.cache(capacity), None, None
        if layer > 0:
            lower = self.forward.cache(capacity)
            texts = (batch.ids, batch.mask, batch.positions)
            with stack.paused():
                hidden = self.forward.up_to(layer, *texts, lower)
            hidden = hidden[picked.to(hidden.device)]
        stack.select(rows.owners)
        mask = batch.mask[picked]
        with self._from(layer, hidden):
            states = self.forward.hidden(batch.ids[picked], mask, batch.positions[picked], cache)
        if lower is not None:
            share_lower_layers(lower, cache, layer, picked)
        return states[:, -1], cache, mask

    def cheaper_anew(self, stack: Stack, members: Sequence[int], prompts: int, drafts: int) -> bool:
        """Whether to read prompts once more with their drafts, rather than drafts through all layers.

        Without a cache the layers below the first edit are known of both; with one, prompts are not
        read twice. `prompts` and `drafts` are tokens.
        """
        layers = len(self._anatomy.layers)
        first = min(self._start(stack, member) for member in members)
        # Above the layers that others' keys and values come from, prompts are not needed.
        again = prompts * (self._anatomy.skippable - first) + drafts * (layers - first)
        return again < drafts * layers

    def _distinct(self, rows: Rows) -> tuple[Batch, Tensor]:
        """A batch of the different texts, and which of them each row holds."""
        places = {text: place for place, text in enumerate(dict.fromkeys(rows.texts))}
        batch = self.batch(list(places))
        return batch, torch.tensor([places[text] for text in rows.texts], device=batch.ids.device)

    def _start(self, stack: Stack, candidate: int) -> int:
        """The layer where a candidate may begin."""
        most = min(self._anatomy.skippable, len(self._anatomy.layers) - 1)
        return min(stack.first_of(candidate), most) if self._reuse else 0

    def _starts(self, stack: Stack, rows: Rows, different: int) -> list[int]:
        """Per row the layer where it may begin, never above that of a row after it.

        Zero where every row has a text of its own: then nothing is shared.
        """
        if different == len(rows.texts):
            return [0] * different
        layers = [self._start(stack, owner) for owner in rows.owners]
        return list(accumulate(reversed(layers), min))[::-1]

    def _below(self, stack: Stack, layer: int, texts: Sequence[Text], width: int) -> Tensor | None:
        """What the layers below `layer` make of left-padded texts (N, width, D); None below the first."""
        if layer == 0:
            return None
        bank = self._banks.setdefault(layer, Bank())
        self._banks.move_to_end(layer)
        missing = bank.missing(texts)
        if missing:
            batch = self.batch(missing)
            known = [n for n, b in self._banks.items() if n < layer and not b.missing(missing)]
            lower = max(known, default=0)
            hidden = self._banks[lower].take(missing, batch.ids.shape[1]) if lower else None
            with stack.paused(), self._from(lower, hidden):
                states = self.forward.up_to(layer, batch.ids, batch.mask, batch.positions)
            bank.add(missing, states)
        return bank.take(texts, width)

    def _from(self, layer: int, hidden: Tensor | None) -> Any:
        return nullcontext() if hidden is None else self.forward.starting_at(layer, hidden)


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
