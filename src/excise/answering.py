"""Greedy responses of a stack's candidates to prompts: drafts are read, the rest is decoded.

Rows are candidates x prompts, candidate-major. B rows, P prompts, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from excise.decoding import Transcript, greedy
from excise.drafts import Drafts
from excise.kvcache import join, take_rows
from excise.passes import Passes, Rows, Text
from excise.stacking import Stack

# A row that left its draft may meet another one; after so many of them it is decoded.
_MOST_DRAFTS = 4


class Answering:
    """Responses of `members`, candidates of one stack, to `numbers`, prompts of one side.

    All of it is measured under `stack.applied()`, in passes of at most `rows` rows.
    """

    def __init__(
        self,
        passes: Passes,
        stack: Stack,
        members: Sequence[int],
        numbers: Sequence[int],
        prompts: Sequence[list[int]],
        transcript: Transcript,
        *,
        rows: int,
    ) -> None:
        self._passes, self._stack = passes, stack
        self._members, self._numbers = members, numbers
        self._prompts = [tuple(prompts[number]) for number in numbers]
        self._transcript = transcript
        self._most = rows
        self._owners = Rows.grid(members, self._prompts).owners

    def decode(self) -> None:
        """Prompts in passes of so many rows, then all rows decode together."""
        self._decode(list(range(len(self._owners))), self._prompt_parts(), len(self._members))

    def follow(self, drafts: Drafts) -> None:
        """Read what each row is likely to say, as far as it says so; decode what is left."""
        prompts, expected = sum(map(len, self._prompts)), drafts.expected(self._numbers)
        if self._passes.cheaper_anew(self._stack, self._members, prompts, expected):
            self._say_first()
        else:
            self._follow_from_cache(drafts)
        for _ in range(_MOST_DRAFTS):
            likely = self._likely(drafts)
            if not likely:
                break
            self._read_drafts(likely)
        left = self._transcript.open_rows()
        if left:
            parts = [left[start : start + self._most] for start in range(0, len(left), self._most)]
            self._decode(left, [self._rows(part) for part in parts], 1)

    def _say_first(self) -> None:
        """The first token of every row."""
        parts = self._prompt_parts()
        last = [self._passes.read(self._stack, part, 1)[:, -1] for part in parts]
        hidden = _together(last, len(self._members))
        self._say(range(len(self._owners)), self._passes.forward.greedy(hidden))

    def _follow_from_cache(self, drafts: Drafts) -> None:
        """The first token of every row, and its draft right after it, from the prompts' cache."""
        everything = list(range(len(self._owners)))
        first, cache, mask = self._filled(everything, self._prompt_parts(), len(self._members))
        self._say(everything, first)
        likely = self._likely(drafts)
        order = sorted(likely, key=lambda row: (-len(likely[row]), row))
        tokens = self._most * mask.shape[1]  # of a pass over whole prompts
        while order:
            longest = len(likely[order[0]])
            some, order = order[: max(1, tokens // longest)], order[max(1, tokens // longest) :]
            self._read_from_cache(sorted(some), likely, cache, mask)

    def _read_from_cache(
        self, some: list[int], likely: dict[int, Text], cache: Any, mask: Tensor
    ) -> None:
        """One pass over drafts from the cache of all rows' prompts; rows are padded on the right."""
        forward = self._passes.forward
        texts = [(*self._transcript.said(row), *likely[row][:-1]) for row in some]
        batch = self._passes.continuation(texts)
        keep = batch.ids.shape[1]
        before = mask[torch.tensor(some, device=mask.device)]
        positions = before.sum(-1, keepdim=True) + torch.arange(keep, device=mask.device)
        whole = torch.cat([before, batch.mask], dim=1)
        taken = take_rows(cache, forward.cache(whole.shape[1]), some)
        self._stack.select([self._owners[row] for row in some])
        hidden = forward.hidden(batch.ids, whole, positions, taken, keep)
        self._compare_all(some, likely, hidden[batch.mask.bool().to(hidden.device)])

    def _say(self, rows: Iterable[int], tokens: Tensor) -> None:
        for row, token in zip(rows, tokens.tolist(), strict=True):
            self._transcript.say(row, token)

    def _prompt_parts(self) -> list[Rows]:
        """All candidates with some of the prompts each, in passes of so many rows."""
        step = max(1, self._most // len(self._members))
        prompts = self._prompts
        parts = [prompts[start : start + step] for start in range(0, len(prompts), step)]
        return [Rows.grid(self._members, part) for part in parts]

    def _likely(self, drafts: Drafts) -> dict[int, Text]:
        """What the open rows may be expected to go on with, for those where anything is known."""
        found = {}
        for row in self._transcript.open_rows():
            number = self._numbers[row % len(self._numbers)]
            draft = drafts.after(number, self._transcript.said(row))
            if draft:
                found[row] = draft[: self._transcript.room(row)]
        return found

    def _read_drafts(self, likely: dict[int, Text]) -> None:
        """One reading of every draft; its row says the model's tokens until they leave the draft."""
        texts = {row: (*self._text(row), *draft[:-1]) for row, draft in likely.items()}
        order = sorted(likely, key=lambda row: (-len(texts[row]), texts[row], row))
        for start in range(0, len(order), self._most):
            some = sorted(order[start : start + self._most])
            keep = max(len(likely[row]) for row in some)
            rows = Rows([self._owners[row] for row in some], [texts[row] for row in some])
            hidden = self._passes.read(self._stack, rows, keep)
            wanted = torch.zeros(len(some), keep, dtype=torch.bool)
            for slot, row in enumerate(some):
                wanted[slot, keep - len(likely[row]) :] = True
            self._compare_all(some, likely, hidden[wanted.to(hidden.device)])

    def _compare_all(self, rows: list[int], likely: dict[int, Text], hidden: Tensor) -> None:
        """`hidden` are the states that predict the rows' drafts, row after row."""
        said = iter(self._passes.forward.greedy(hidden).tolist())
        for row in rows:
            self._compare(row, likely[row], [next(said) for _ in likely[row]])

    def _compare(self, row: int, draft: Text, said: list[int]) -> None:
        for expected, token in zip(draft, said, strict=True):
            self._transcript.say(row, token)
            if token != expected or not self._transcript.is_open(row):
                return

    def _decode(self, rows: list[int], parts: list[Rows], groups: int) -> None:
        """Read what rows have so far, part by part, then decode them together."""
        first, cache, mask = self._filled(rows, parts, groups)

        def regroup(alive: list[int]) -> None:
            self._stack.select([self._owners[row] for row in alive])

        regroup(rows)
        greedy(self._passes.forward, self._transcript, rows, first, mask, cache, regroup)

    def _filled(
        self, rows: list[int], parts: list[Rows], groups: int
    ) -> tuple[Tensor, Any, Tensor]:
        """The next token of every row, the cache of what was read with room for more, and its mask.

        Every part holds rows of the same `groups` candidates, or `groups` is 1.
        """
        room = max(map(self._transcript.room, rows))
        alone = len(parts) == 1
        filled = [self._passes.fill(self._stack, part, room if alone else 0) for part in parts]
        width = max(mask.shape[1] for _, _, mask in filled)
        mask = _together([_padded(mask, width) for _, _, mask in filled], groups)
        cache = filled[0][1]
        if not alone:
            empty = self._passes.forward.cache(width + room)
            cache = join([part for _, part, _ in filled], empty, groups, width)
        hidden = _together([hidden for hidden, _, _ in filled], groups)
        return self._passes.forward.greedy(hidden), cache, mask

    def _rows(self, rows: list[int]) -> Rows:
        return Rows([self._owners[row] for row in rows], [self._text(row) for row in rows])

    def _text(self, row: int) -> Text:
        return (*self._prompts[row % len(self._prompts)], *self._transcript.said(row))


def _together(parts: list[Tensor], groups: int) -> Tensor:
    """Rows of all parts in one tensor; each part holds rows of the same candidates, candidate-major."""
    by_group = [part.view(groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(by_group, dim=1).flatten(0, 1)


def _padded(mask: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(mask, (width - mask.shape[1], 0))
