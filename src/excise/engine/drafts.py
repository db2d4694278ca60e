"""Drafts for speculative decoding: earlier candidates' responses, verified by later candidates' models.

A draft is verified in one forward pass where decoding takes one per token. The model still chooses every
token, as in speculative decoding (Leviathan et al., 2023) without sampling. Drafts are collected once and
then fixed, so that a resumed run repeats what an unbroken one did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from excise.engine.requests import Response

Tokens = tuple[int, ...]

# Cost of decoding a token over that of verifying it. Decoding takes a pass per token through all layers,
# where drafts share those below the first edit; but many rows decode together, and rows that a draft has
# helped on wait for those that it has not.
_DECODING_OVER_READING = 2
# Longest n-gram that prompt lookup matches.
_LONGEST_MATCH = 2


def cheaper_than_decoding(gained: int, read: int) -> bool:
    """Return whether verifying `read` tokens is cheaper than decoding the `gained` ones accepted."""
    return read < _DECODING_OVER_READING * gained


class Drafts:
    """Earlier responses to every prompt of one side."""

    def __init__(self) -> None:
        self._counts: list[Counter[Tokens]] = []
        self._gained, self._read = 0, 0
        # (prompt, or None for any; n-gram) -> a response, and the position after the n-gram in it.
        self._places: dict[tuple[int | None, Tokens], tuple[Tokens, int]] = {}

    def add(self, responses: Sequence[Response]) -> None:
        """Add one candidate's responses, one per prompt."""
        self._counts = self._counts or [Counter() for _ in responses]
        for prompt, (counts, one) in enumerate(zip(self._counts, responses, strict=True)):
            counts[one.tokens] += 1
            if counts[one.tokens] == 1:
                self._index(prompt, one.tokens)

    def tried(self, gained: int, read: int) -> None:
        """Count the first round of one batch of rows, while drafts are collected."""
        self._gained += gained
        self._read += read

    @property
    def pay(self) -> bool:
        """Whether a first round was cheaper than decoding; assumed where none was counted."""
        return not self._read or cheaper_than_decoding(self._gained, self._read)

    def _index(self, prompt: int, tokens: Tokens) -> None:
        for end in range(1, len(tokens)):
            for length in range(1, min(end, _LONGEST_MATCH) + 1):
                last = tokens[end - length : end]
                self._places[prompt, last] = self._places[None, last] = (tokens, end)

    def after(self, prompt: int, said: Tokens) -> Tokens:
        """Return the likeliest continuation of a response to a prompt; empty where none is known.

        From the most frequent known response with this prefix; else from one, to this prompt or another,
        that holds the last n-gram (prompt lookup decoding, Saxena, 2023).
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
