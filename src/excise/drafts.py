"""What later candidates are likely to say: responses known before, offered as drafts.

A draft is read in one pass where decoding takes one pass per token. The model still chooses every
token; a draft only says where to look, as in speculative decoding (Leviathan et al., 2023) without
sampling. Drafts are learnt once and then fixed, so that a resumed run repeats what an unbroken one did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from excise.evidence import Response

# Decoding a token costs about this many times what reading it does: every token is a pass of its own,
# and through all layers, where drafts share those below the first edit.
_DECODING_OVER_READING = 4


class Drafts:
    """Known responses to every prompt of one side."""

    def __init__(self) -> None:
        self._counts: list[Counter[tuple[int, ...]]] = []

    def add(self, responses: Sequence[Response]) -> None:
        """One more candidate's responses, one per prompt."""
        self._counts = self._counts or [Counter() for _ in responses]
        for counts, response in zip(self._counts, responses, strict=True):
            counts[response.tokens] += 1

    def after(self, prompt: int, said: tuple[int, ...]) -> tuple[int, ...]:
        """The likeliest continuation of what was said to a prompt; empty where none is known."""
        known = self._counts[prompt]
        fitting = [t for t in known if len(t) > len(said) and t[: len(said)] == said]
        if not fitting:
            return ()
        return max(fitting, key=lambda tokens: (known[tokens], tokens))[len(said) :]

    def expected(self, prompts: Iterable[int]) -> int:
        """Tokens of the likeliest responses to these prompts."""
        return sum(len(self.after(prompt, ())) for prompt in prompts)

    def pay(self, lengths: Mapping[int, int]) -> bool:
        """Whether reading drafts is cheaper than decoding, for prompts' numbers -> tokens.

        Prompts are read once more, with their drafts or to decode what no draft brings to an end.
        """
        drafts = self.expected(lengths)
        return sum(lengths.values()) + drafts < _DECODING_OVER_READING * drafts
