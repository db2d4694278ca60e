"""Greedy decoding of many rows at once: finished rows leave the batch, decided ones finish early.

Knows rows and tokens; knows nothing of candidates, except through the `regroup` call that tells the
stack which rows are left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from excise.evidence import Decided, Response
from excise.forward import Forward
from excise.kvcache import select_rows

# Rows are taken out of the batch once this share of it is finished: each time copies the cache.
_COMPACT_AT = 0.25


class ResponseTree:
    """All responses seen, as a tree of tokens, so that a text is decoded and judged only once.

    Most rows repeat what others said: the same prompt under another candidate, the same phrase.
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
        self._tokens: list[tuple[int, ...]] = [()]
        self._final: list[bool] = [False]

    def step(self, node: int, token: int) -> int:
        """The node reached from `node` by one more token."""
        key = (node, token)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = len(self._tokens)
            tokens = (*self._tokens[node], token)
            self._tokens.append(tokens)
            self._final.append(self._settled(tokens))
        return child

    def _settled(self, tokens: tuple[int, ...]) -> bool:
        if self._deciders is None:
            return False
        text = self.text(tokens)
        return all(decided(text) for decided in self._deciders)

    def is_decided(self, node: int) -> bool:
        """Whether the verdict on this response can no longer change."""
        return self._final[node]

    def response(self, node: int, ended: bool) -> Response:
        """The response that this node stands for."""
        tokens = self._tokens[node]
        return Response(tokens, self.text(tokens), ended)

    def text(self, tokens: Sequence[int]) -> str:
        """Text of response tokens, without special tokens, after what every response begins with."""
        return str(self._tokenizer.decode([*self._spoken, *tokens], skip_special_tokens=True))


def greedy(
    forward: Forward,
    tree: ResponseTree,
    first: Tensor,
    mask: Tensor,
    cache: Any,
    *,
    ends: frozenset[int],
    limit: int,
    regroup: Callable[[list[int]], None],
) -> list[Response]:
    """Decode every row to its end.

    Args:
        forward: the model.
        tree: where responses are kept and judged.
        first: (B,) the first response token of each row, already chosen.
        mask: (B, T) mask of the prompts, whose states `cache` holds.
        cache: key-value cache with room for `limit` more positions.
        ends: tokens that end a response.
        limit: most tokens of a response.
        regroup: told which of the B rows are still in the batch, whenever that changes.
    """
    alive = list(range(first.shape[0]))
    nodes = [0] * len(alive)
    done: dict[int, Response] = {}
    tokens = first
    mask = torch.cat([mask, mask.new_ones(len(alive), limit)], dim=1)
    seen = mask.shape[1] - limit
    positions = mask[:, :seen].sum(-1)
    for count in range(1, limit + 1):
        for slot, token in enumerate(tokens.tolist()):
            row = alive[slot]
            if row in done:
                continue
            node = nodes[slot] = tree.step(nodes[slot], token)
            if token in ends or count == limit or tree.is_decided(node):
                done[row] = tree.response(node, token in ends)
        if len(done) == first.shape[0]:
            break
        open_slots = [slot for slot, row in enumerate(alive) if row not in done]
        if len(open_slots) <= (1 - _COMPACT_AT) * len(alive):
            alive = [alive[slot] for slot in open_slots]
            nodes = [nodes[slot] for slot in open_slots]
            picked = torch.tensor(open_slots, device=tokens.device)
            tokens, mask, positions = tokens[picked], mask[picked], positions[picked]
            select_rows(cache, open_slots)
            regroup(alive)
        seen += 1
        hidden = forward.hidden(tokens[:, None], mask[:, :seen], positions[:, None], cache)
        positions = positions + 1
        tokens = forward.greedy(hidden[:, -1])
    return [done[row] for row in range(first.shape[0])]
