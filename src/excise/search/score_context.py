"""What scorers see beside the evidence: markers, prompts, the judge, and where an answer begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from excise.engine.requests import Decided, Evidence, Response
from excise.judges.markers import Markers
from excise.judges.verdicts import UNFINISHED, Exchange, Verdicts
from excise.prompts.sets import Prompt

# Side, number of the prompt, response -> the answer after its chain of thought; None where that goes on.
Answer = Callable[[str, int, Response], str | None]


@dataclass(frozen=True)
class ScoreContext:
    """What scorers are given beside the evidence: markers, each side's prompts, and the judge if any.

    `answer`, where models think, gives what stands after the chain of thought.
    """

    markers: Markers
    prompts: dict[str, tuple[Prompt, ...]]
    judge: Verdicts | None = None
    answer: Answer | None = None

    @property
    def decided(self) -> Decided | None:
        """What settles a response early: a marker in it; a judge, and where models think, whole ones."""
        return self.markers.found if self.judge is None and self.answer is None else None

    def answers(self, evidence: Evidence, side: str) -> list[Response]:
        """Return the responses of a side as they are judged: without a chain of thought."""
        responses = evidence.responses[side]
        if self.answer is None:
            return responses
        texts = (self.answer(side, n, one) or "" for n, one in enumerate(responses))
        return [replace(one, text=text) for one, text in zip(responses, texts, strict=True)]

    def unfinished(self, evidence: Evidence, side: str) -> list[bool]:
        """Return which responses were cut before their chain of thought ended."""
        responses = evidence.responses[side]
        if self.answer is None:
            return [False] * len(responses)
        return [self.answer(side, n, one) is None for n, one in enumerate(responses)]

    def verdicts(self, evidence: Evidence, side: str) -> list[str | None]:
        """Return the judge's verdict on each answer of a side; None where it gave none."""
        assert self.judge is not None
        unfinished = self.unfinished(evidence, side)
        asked = [
            one
            for one, over in zip(self.exchanges(evidence, side), unfinished, strict=True)
            if not over
        ]
        found = iter(self.judge.verdicts(asked))
        return [UNFINISHED if over else next(found) for over in unfinished]

    def exchanges(self, evidence: Evidence, side: str) -> list[Exchange]:
        """Return a side's prompts with their answers."""
        pairs = zip(self.prompts[side], self.answers(evidence, side), strict=True)
        return [Exchange(prompt.text, r.text, r.ended) for prompt, r in pairs]
