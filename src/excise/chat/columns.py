"""Answers of several points, streamed: rows of one stack on the untouched weights, one pass a token.

A column's cache is kept between its answers: what a new text shares with what the cache holds is not
read again. Nothing is held between two steps but caches: edits and inference mode are entered for each,
so that whoever waits for the next step finds the model untouched.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor

from excise.chat.sampling import Dice, Sampling, check_logits, likeliest
from excise.checkpoints.loading import Loaded
from excise.engine.passes import CachedRows, Passes, Past, Rows, Text
from excise.engine.stacking import CandidateEdits, Stack
from excise.errors import ExciseError, MemoryExhausted, is_out_of_memory
from excise.model.anatomy import Writer
from excise.model.kv_cache import can_join, keep_ends
from excise.model.parameters import any_offloaded
from excise.prompts.tokens import end_tokens, pad_token, same_length


@dataclass
class Answer:
    """What a column has said so far.

    Attributes:
        tokens: its tokens, without the one that ended it.
        ended: whether the model ended it.
        open: whether it goes on.
        first: the likeliest first tokens with their probabilities.
    """

    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    open: bool = True
    first: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class _Group:
    """Columns that share passes, and the cache of what they have read.

    `held` has each column's tokens in the cache, from position `starts` on; what follows them there is
    of no text: a finished column stays in the batch.
    """

    columns: list[int]
    past: Past
    starts: list[int]
    held: list[list[int]]
    dice: Dice
    waiting: list[int] = field(
        default_factory=list
    )  # each column's last token, not yet in the cache


class Columns:
    """The columns of a chat: candidates of one stack, with what their caches hold."""

    def __init__(
        self, loaded: Loaded, writers: Sequence[Writer], edits: Sequence[CandidateEdits]
    ) -> None:
        self._forward = loaded.forward
        self._padding = loaded.anatomy.padding
        self._ends = end_tokens(loaded.model, loaded.tokenizer)
        pad = pad_token(loaded.model, loaded.tokenizer)
        self._passes = Passes(self._forward, Stack(writers, edits), pad, reuse=True)
        joins = can_join(self._forward.cache(1))
        self._keeps = joins and self._padding and not any_offloaded(loaded.model)
        self._group: _Group | None = None  # that of all columns, kept for their next texts
        self.read = 0  # tokens that the last answer's texts had, beyond those in the cache

    def answer(
        self, texts: Sequence[Text], sampling: Sampling, number: int
    ) -> Generator[list[Answer], None, None]:
        """Answer one text per column; yield all answers after every token, until all are finished.

        Closing the iterator ends the answers where they are.

        Args:
            texts: the token ids of each column's conversation.
            sampling: how tokens are drawn, and how many.
            number: which answer of the chat it is, for the noise.

        Raises:
            MeasurementError: logits are not finite.
            MemoryExhausted: the texts do not fit.
        """
        answers, groups = [Answer() for _ in texts], list[_Group]()
        try:
            for columns in self._parts(texts):
                group, logits = self._begin(columns, texts, sampling, number)
                groups.append(group)
                for column, first in zip(columns, likeliest(logits), strict=True):
                    answers[column].first = first
                _append(group, group.dice.next(logits), answers, self._ends, sampling.limit)
            yield answers
            while any(answer.open for answer in answers):
                for group in groups:
                    if any(answers[column].open for column in group.columns):
                        logits = self._step(group, answers)
                        _append(group, group.dice.next(logits), answers, self._ends, sampling.limit)
                yield answers
        except ExciseError:
            groups.clear()
            raise
        finally:
            whole = len(groups) == 1 and len(groups[0].columns) == len(texts)
            self._group = groups[0] if whole and self._keeps else None

    def _parts(self, texts: Sequence[Text]) -> list[list[int]]:
        """Split the columns into those that can share a pass: all, unless padding would leak."""
        every = list(range(len(texts)))
        if self._padding:
            return [every]
        lengths = [len(text) for text in texts]
        runs = same_length(sorted(every, key=lambda n: (lengths[n], n)), lengths)
        return [sorted(run) for run in runs]

    def _begin(
        self, columns: list[int], texts: Sequence[Text], sampling: Sampling, number: int
    ) -> tuple[_Group, Tensor]:
        """Read the columns' texts; return their group and the logits (B, V) of what follows."""
        rows = Rows(columns, [texts[column] for column in columns])
        with torch.inference_mode(), _within_memory():
            after = self._known(rows.texts)
            hidden, past = self._passes.prefill(rows, sampling.limit, after)
            logits = self._logits(hidden)
        held = [list(text) for text in rows.texts]
        return _Group(columns, past, past.pads(), held, Dice(sampling, number)), logits

    def _known(self, texts: Sequence[Text]) -> CachedRows | None:
        """Return the cache of what these texts share with the last ones; None where that is nothing."""
        group, self._group = self._group, None
        self.read = max(map(len, texts))
        if group is None or len(group.held) != len(texts):
            return None
        same = [_common(h, text) for h, text in zip(group.held, texts, strict=True)]
        if min(same) == 0:
            return None
        width = max(same)
        ends = [start + n for start, n in zip(group.starts, same, strict=True)]
        cache = keep_ends(group.past.cache, self._forward.cache(width), ends, width)
        counts = torch.tensor(same, device=group.past.mask.device)
        places = torch.arange(width, device=counts.device)
        mask = (places >= (width - counts)[:, None]).long()
        self.read = max(len(text) - n for text, n in zip(texts, same, strict=True))
        return CachedRows(Past(cache, mask), range(len(texts)))

    def _step(self, group: _Group, answers: list[Answer]) -> Tensor:
        """Run one token of each column through the model; return the logits (B, V) of the next ones."""
        mask = group.past.mask
        positions = mask.sum(-1, keepdim=True)
        # Finished columns are read on as well: what they say then belongs to no text.
        mask = torch.cat([mask, mask.new_ones(len(group.columns), 1)], dim=1)
        ids = torch.tensor(group.waiting, device=mask.device)[:, None]
        with torch.inference_mode(), self._passes.stack.applied(group.columns), _within_memory():
            hidden = self._forward.hidden(ids, mask, positions, group.past.cache)
            logits = self._logits(hidden[:, -1])
        group.past = Past(group.past.cache, mask)
        for held, column, token in zip(group.held, group.columns, group.waiting, strict=True):
            if answers[column].open:
                held.append(token)
        return logits

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self._forward.logits(hidden)
        check_logits(logits)
        return logits


def _append(
    group: _Group, tokens: Tensor, answers: list[Answer], ends: frozenset[int], limit: int
) -> None:
    """Append its next token (B,) to each open answer of a group."""
    group.waiting = tokens.tolist()
    for column, token in zip(group.columns, group.waiting, strict=True):
        answer = answers[column]
        if answer.open:
            answer.ended = token in ends
            if not answer.ended:
                answer.tokens.append(token)
            answer.open = not answer.ended and len(answer.tokens) < limit


def _common(held: Sequence[int], text: Text) -> int:
    """Return how many tokens two texts begin with alike; at least one of `text` is left to read."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(held, text, strict=False))
    return min(sum(1 for _ in same), len(text) - 1)


@contextmanager
def _within_memory() -> Iterator[None]:
    """Say in a line that memory has run out.

    Raises:
        MemoryExhausted: it has.
    """
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryExhausted(
            "out of memory: talk to fewer points at once, or begin a new chat"
        ) from None
