"""Choose the prompts of the keep set whose responses edits leave as they are: rules on what was measured.

docs/methods.md states them. Knows tokenizers and numbers; runs no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

BEGINNING = 24  # tokens of a response in which it would show the behaviour
MOST_UNKNOWN = 0.02  # share of a prompt's tokens
# A tokenizer that needs this many times as many tokens a byte as for contrast prompts spells the text.
_SPELLED = 2.0

_REASONS = {
    "unknown": "the tokenizer does not know their words",
    "too_long": "they are too long for the model's positions",
    "near_target": "they lie nearer to the target prompts than to the contrast prompts",
    "shows_behaviour": "the original's response shows the behaviour",
}


@dataclass(frozen=True)
class Kept:
    """Prompts of the keep set that are used, with the original's responses to them.

    Attributes:
        ids: token ids of each prompt, up to where its response begins.
        responses: token ids of each one's response.
        left_out: reason -> number of prompts that are not used for it.
    """

    ids: Sequence[Sequence[int]] = ()
    responses: Sequence[Sequence[int]] = ()
    left_out: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return how many were used and left out, JSON-ready, for the study and the record."""
        prompts = len(self.ids) + sum(self.left_out.values())
        return {"prompts": prompts, "used": len(self.ids), "left_out": dict(self.left_out)}

    @property
    def note(self) -> str:
        """The same in a sentence; "" where all are used."""
        reasons = [f"{n} as {_REASONS[why]}" for why, n in self.left_out.items() if n]
        if not reasons:
            return ""
        facts = self.as_dict()
        return (
            f"Of the keep set, {facts['used']} of {facts['prompts']} prompts are used. "
            f"Left out: {'; '.join(reasons)}."
        )


NOTHING_KEPT = Kept()


def known_texts(
    tokenizer: Any, texts: Sequence[str], contrast: Sequence[str], size: int
) -> list[bool]:
    """Return which texts a tokenizer knows: none where it does not know most, or spells them.

    Args:
        tokenizer: the model's.
        texts: of the keep set.
        contrast: texts that it knows.
        size: of the model's vocabulary; larger ids have no embedding.
    """
    rows = _encoded(tokenizer, texts)
    unknown = tokenizer.unk_token_id
    known = [
        bool(row)
        and max(row) < size
        and (unknown is None or row.count(unknown) <= MOST_UNKNOWN * len(row))
        for row in rows
    ]
    tokens, bytes_ = _size(rows, texts)
    usual, usual_bytes = _size(_encoded(tokenizer, contrast), contrast)
    spelled = tokens * usual_bytes > _SPELLED * usual * bytes_
    return [False] * len(texts) if spelled or 2 * sum(known) < len(texts) else known


def _encoded(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    found = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    return [list(row) for row in found["input_ids"]]


def _size(rows: Sequence[Sequence[int]], texts: Sequence[str]) -> tuple[int, int]:
    return sum(map(len, rows)), sum(len(text.encode()) for text in texts)
