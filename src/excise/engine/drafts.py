"""What later candidates are likely to say: responses known before, offered as drafts.

A draft is read in one pass where decoding takes one pass per token. The model still chooses every
token; a draft only says where to look, as in speculative decoding (Leviathan et al., 2023) without
sampling. Drafts are learnt once and then fixed, so that a resumed run repeats what an unbroken one did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from excise.engine.requests import Response

Tokens = tuple[int, ...]

# Decoding a token costs about this many times what reading it does: every token is a pass of its own,
# and through all layers, where drafts share those below the first edit.
_DECODING_OVER_READING = 4
# What has left the known responses comes back to one where so many last tokens, or fewer, are alike.
_LONGEST_MATCH = 2


def cheaper_than_decoding(gained: int, read: int) -> bool:
    """Whether it is cheaper to read so many tokens than to decode those that it brings."""
    return read < _DECODING_OVER_READING * gained


class Drafts:
    """Known responses to every prompt of one side."""

    def __init__(self) -> None:
        self._counts: list[Counter[Tokens]] = []
        # (prompt, or None for any; a few tokens) -> a response, and where in it they have just ended.
        self._places: dict[tuple[int | None, Tokens], tuple[Tokens, int]] = {}

    def add(self, responses: Sequence[Response]) -> None:
        """One more candidate's responses, one per prompt."""
        self._counts = self._counts or [Counter() for _ in responses]
        for prompt, (counts, one) in enumerate(zip(self._counts, responses, strict=True)):
            counts[one.tokens] += 1
            if counts[one.tokens] == 1:
                self._index(prompt, one.tokens)

    def _index(self, prompt: int, tokens: Tokens) -> None:
        for end in range(1, len(tokens)):
            for length in range(1, min(end, _LONGEST_MATCH) + 1):
                last = tokens[end - length : end]
                self._places[prompt, last] = self._places[None, last] = (tokens, end)

    def after(self, prompt: int, said: Tokens) -> Tokens:
        """The likeliest continuation of what was said to a prompt; empty where none is known.

        That of a known response to it which begins so; else of one, to this prompt or another, that
        has the same last tokens somewhere (prompt lookup decoding, Saxena, 2023).
        """
        known = self._counts[prompt]
        fitting = [t for t in known if len(t) > len(said) and t[: len(said)] == said]
        if fitting:
            return max(fitting, key=lambda tokens: (known[tokens], tokens))[len(said) :]
        for length in range(min(_LONGEST_MATCH, len(said)), 0, -1):
            for whose in (prompt, None):
                if (whose, said[-length:]) in self._places:
                    tokens, end = self._places[whose, said[-length:]]
                    return tokens[end:]
        return ()
