"""Greedy responses of a stack's candidates: prefill, verify drafts (speculative decoding), decode the rest.

Rows are candidates x prompts, candidate-major. B rows, P prompts, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from excise.engine.decoding import Transcript, greedy
from excise.engine.drafts import Drafts, cheaper_than_decoding
from excise.engine.passes import CachedRows, Passes, Past, Rows, Text
from excise.model.kv_cache import join

Part = tuple[Rows, CachedRows | None]  # rows of one pass, and the cache that they continue


class ResponseBatch:
    """Greedy responses of `members`, candidates of one stack, to `numbers`, prompts of one side.

    Passes have at most `rows` rows.
    """

    def __init__(
        self,
        passes: Passes,
        members: Sequence[int],
        numbers: Sequence[int],
        prompts: Sequence[list[int]],
        transcript: Transcript,
        *,
        rows: int,
    ) -> None:
        self._passes = passes
        self._members, self._numbers = members, numbers
        self._prompts = [tuple(prompts[number]) for number in numbers]
        self._transcript = transcript
        self._most = rows
        self._owners = Rows.grid(members, self._prompts).owners
        self.first_round: tuple[int, int] | None = (
            None  # tokens of drafts that it accepted, and read
        )

    def decode(self) -> None:
        """Prefill the prompts in passes of at most `rows` rows, then decode all rows in one batch."""
        self._decode(list(range(len(self._owners))), self._prompt_parts(), len(self._members))

    def decode_with_drafts(self, drafts: Drafts) -> None:
        """Verify drafts in forward passes while that is cheaper than decoding, then decode what remains."""
        first, past = self._filled(self._prompt_parts(), len(self._members), 0)
        for row, token in enumerate(first.tolist()):
            self._transcript.append(row, token)
        pays = True
        while pays and (likely := self._likely(drafts)):
            gained, read = self._verify_drafts(likely, past)
            pays = cheaper_than_decoding(gained, read)
            self.first_round = self.first_round or (gained, read)
        left = self._transcript.open_rows()
        if left:
            some = [left[start : start + self._most] for start in range(0, len(left), self._most)]
            parts: list[Part] = [(self._rows(part), CachedRows(past, part)) for part in some]
            del past  # the parts hold it until they are prefilled
            self._decode(left, parts, 1)

    def _prompt_parts(self) -> list[Part]:
        """Split the prompts into passes of at most `rows` rows, all candidates in each."""
        step = max(1, self._most // len(self._members))
        prompts = self._prompts
        parts = [prompts[start : start + step] for start in range(0, len(prompts), step)]
        return [(Rows.grid(self._members, part), None) for part in parts]

    def _likely(self, drafts: Drafts) -> dict[int, Text]:
        """Return a draft for each unfinished row that has one."""
        found = {}
        for row in self._transcript.open_rows():
            number = self._numbers[row % len(self._numbers)]
            draft = drafts.after(number, self._transcript.tokens(row))
            if draft:
                found[row] = draft[: self._transcript.room(row)]
        return found

    def _verify_drafts(self, likely: dict[int, Text], past: Past) -> tuple[int, int]:
        """Run every draft through the model once, and accept the tokens up to the first mismatch.

        Returns how many tokens were accepted, and how many were read.
        """
        texts = {row: (*self._text(row), *draft[:-1]) for row, draft in likely.items()}
        new = {row: len(self._transcript.tokens(row)) + len(likely[row]) - 1 for row in likely}
        # Rows with the same text are adjacent, so that they share a pass.
        order = sorted(likely, key=lambda row: (-new[row], texts[row], row))
        tokens = self._most * past.mask.shape[1]  # of a pass over whole prompts
        gained = 0
        while order:
            most = max(1, min(tokens // new[order[0]], 2 * self._most))
            some, order = sorted(order[:most]), order[most:]
            keep = max(len(likely[row]) for row in some)
            rows = Rows([self._owners[row] for row in some], [texts[row] for row in some])
            hidden = self._passes.read(rows, keep, CachedRows(past, some))
            wanted = torch.zeros(len(some), keep, dtype=torch.bool)
            for slot, row in enumerate(some):
                wanted[slot, keep - len(likely[row]) :] = True
            said = iter(self._passes.forward.greedy(hidden[wanted.to(hidden.device)]).tolist())
            for row in some:
                gained += self._compare(row, likely[row], [next(said) for _ in likely[row]])
        return gained, sum(new.values())

    def _compare(self, row: int, draft: Text, said: list[int]) -> int:
        """Append the model's tokens up to the first that differs from the draft; return how many."""
        for count, (expected, token) in enumerate(zip(draft, said, strict=True), start=1):
            self._transcript.append(row, token)
            if token != expected or not self._transcript.is_open(row):
                return count
        return len(draft)

    def _decode(self, rows: list[int], parts: list[Part], groups: int) -> None:
        """Prefill the rows part by part, then decode them in one batch."""
        room = max(map(self._transcript.room, rows))
        first, past = self._filled(parts, groups, room)

        def applied(alive: list[int]) -> AbstractContextManager[None]:
            return self._passes.stack.applied([self._owners[row] for row in alive])

        forward = self._passes.forward
        greedy(forward, self._transcript, rows, first, past.mask, past.cache, applied)

    def _filled(self, parts: list[Part], groups: int, room: int) -> tuple[Tensor, Past]:
        """Prefill all parts; return every row's next token, and one joined cache with `room` more tokens.

        Every part holds rows of the same `groups` candidates, or `groups` is 1. `parts` is emptied, so
        that the caches that it continues are freed before they are joined.
        """
        alone = len(parts) == 1
        ours = room if alone else 0
        filled = [self._passes.prefill(rows, ours, after) for rows, after in parts]
        parts.clear()
        pasts = [past for _, past in filled]
        width = max(past.mask.shape[1] for past in pasts)
        mask = _together([_padded(past.mask, width) for past in pasts], groups)
        cache = pasts[0].cache
        if not alone:
            empty = self._passes.forward.cache(width + room)
            cache = join([past.cache for past in pasts], empty, groups, width)
        hidden = _together([hidden for hidden, _ in filled], groups)
        return self._passes.forward.greedy(hidden), Past(cache, mask)

    def _rows(self, rows: list[int]) -> Rows:
        return Rows([self._owners[row] for row in rows], [self._text(row) for row in rows])

    def _text(self, row: int) -> Text:
        return (*self._prompts[row % len(self._prompts)], *self._transcript.tokens(row))


def _together(parts: list[Tensor], groups: int) -> Tensor:
    """Concatenate the rows of all parts, candidate-major; each part holds rows of the same candidates."""
    by_group = [part.view(groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(by_group, dim=1).flatten(0, 1)


def _padded(mask: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(mask, (width - mask.shape[1], 0))
