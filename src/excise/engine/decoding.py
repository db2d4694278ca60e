"""Batched greedy decoding. Finished rows leave the batch; a row whose verdict is settled finishes early.

Knows rows and tokens; knows candidates only through `applied`, a context with the edits of some rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor

from excise.engine.requests import Decided, Response
from excise.model.forward import Forward
from excise.model.kv_cache import select_rows

# Finished rows are removed once they are this share of the batch: every removal copies the cache.
_COMPACT_AT = 0.25


class ResponseTree:
    """A trie of all responses' tokens, so that each prefix is detokenised and judged only once.

    Most rows repeat others: the same prompt under another candidate, the same phrase.
    """

    def __init__(
        self,
        tokenizer: Any,
        deciders: frozenset[Decided] | None,
        spoken: tuple[int, ...] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._spoken = spoken
        self._deciders = deciders
        self._children: dict[tuple[int, int], int] = {}
        self._from: list[tuple[int, int]] = [(0, 0)]  # a node's parent, and its token
        self._length: list[int] = [0]
        self._final: list[bool] = [False]
        self._responses: dict[tuple[int, bool], Response] = {}

    def step(self, node: int, token: int) -> int:
        """Return the child of `node` for one more token; add it where it is new."""
        key = (node, token)
        child = self._children.get(key)
        if child is None:
            settled = self._settled((*self.tokens(node), token))  # first: a decider may raise
            child = self._children[key] = len(self._from)
            self._from.append(key)
            self._length.append(self._length[node] + 1)
            self._final.append(settled)
        return child

    def _settled(self, tokens: tuple[int, ...]) -> bool:
        if self._deciders is None:
            return False
        text = self.text(tokens)
        return all(decided(text) for decided in self._deciders)

    def tokens(self, node: int) -> tuple[int, ...]:
        """Return the tokens from the root to a node; each node stores its own alone."""
        found = []
        while node:
            node, token = self._from[node]
            found.append(token)
        return tuple(reversed(found))

    def length(self, node: int) -> int:
        """Return the number of tokens from the root to a node."""
        return self._length[node]

    def is_decided(self, node: int) -> bool:
        """Return whether the verdict on this response can no longer change."""
        return self._final[node]

    def response(self, node: int, ended: bool) -> Response:
        """Return the response that ends at a node, made once."""
        if (node, ended) not in self._responses:
            tokens = self.tokens(node)
            self._responses[node, ended] = Response(tokens, self.text(tokens), ended)
        return self._responses[node, ended]

    def text(self, tokens: Sequence[int]) -> str:
        """Detokenise response tokens, without special tokens, after the prefix that all responses share."""
        return str(self._tokenizer.decode([*self._spoken, *tokens], skip_special_tokens=True))


class Transcript:
    """The tokens that every row has generated, and which rows are finished.

    `ends` are the tokens that end a response, `limit` the most tokens of one; `on_step` is told after each
    decode step how many are done.
    """

    def __init__(
        self,
        tree: ResponseTree,
        rows: int,
        ends: frozenset[int],
        limit: int,
        on_step: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._tree, self._ends, self._limit = tree, ends, limit
        self._on_step, self._steps = on_step, 0
        self._nodes = [0] * rows
        self._done: dict[int, Response] = {}

    def append(self, row: int, token: int) -> None:
        """Append a row's next token. An end token, the limit or a settled verdict finishes the row."""
        node = self._nodes[row] = self._tree.step(self._nodes[row], token)
        ended = token in self._ends
        if ended or self.room(row) == 0 or self._tree.is_decided(node):
            self._done[row] = self._tree.response(node, ended)

    def count_step(self) -> None:
        """Count a decode step."""
        self._steps += 1
        self._on_step(self._steps)

    def tokens(self, row: int) -> tuple[int, ...]:
        """Return the tokens of a row so far."""
        return self._tree.tokens(self._nodes[row])

    def room(self, row: int) -> int:
        """Return how many tokens a row may still generate."""
        return self._limit - self._tree.length(self._nodes[row])

    def is_open(self, row: int) -> bool:
        """Return whether a row is unfinished."""
        return row not in self._done

    def open_rows(self) -> list[int]:
        """Return the unfinished rows."""
        return [row for row in range(len(self._nodes)) if row not in self._done]

    def responses(self) -> list[Response]:
        """Return every row's response, once all are finished."""
        return [self._done[row] for row in range(len(self._nodes))]


def greedy(
    forward: Forward,
    transcript: Transcript,
    alive: list[int],
    first: Tensor,
    mask: Tensor,
    cache: Any,
    applied: Callable[[list[int]], AbstractContextManager[None]],
) -> None:
    """Decode rows greedily until all are finished.

    Args:
        forward: the model.
        transcript: receives the rows' tokens.
        alive: the rows of the transcript that the batch holds.
        first: (B,) the next token of each, already chosen.
        mask: (B, T) attention mask of the prefilled positions, which `cache` holds.
        cache: KV cache with room for all tokens that the rows may still generate.
        applied: gives the context in which a batch of these rows of the transcript is run.
    """
    device, seen = mask.device, mask.shape[1]  # logits may come from another device
    tokens = first.to(device)
    positions = mask.sum(-1)
    rooms = list(map(transcript.room, alive))
    # A finished row may stay for a while; it must not run out of positions meanwhile.
    last = positions + torch.tensor(rooms, device=device) - 1
    mask = torch.cat([mask, mask.new_ones(len(alive), max(rooms))], dim=1)
    with ExitStack() as context:
        context.enter_context(applied(alive))
        while True:
            for row, token in zip(alive, tokens.tolist(), strict=True):
                if transcript.is_open(row):
                    transcript.append(row, token)
            open_slots = [slot for slot, row in enumerate(alive) if transcript.is_open(row)]
            if not open_slots:
                return
            if len(open_slots) <= (1 - _COMPACT_AT) * len(alive):
                alive = [alive[slot] for slot in open_slots]
                picked = torch.tensor(open_slots, device=device)
                tokens, mask = tokens[picked], mask[picked]
                positions, last = positions[picked], last[picked]
                select_rows(cache, open_slots)
                context.close()
                context.enter_context(applied(alive))
            seen += 1
            hidden = forward.hidden(tokens[:, None], mask[:, :seen], positions[:, None], cache)
            positions = torch.minimum(positions + 1, last)
            tokens = forward.greedy(hidden[:, -1]).to(device)
            transcript.count_step()
