"""All scorers of a run on one engine: candidates in, scores out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import pydantic

from excise.engine.requests import Divergence, Evidence, Request, Responses
from excise.engine.stacking import CandidateEdits
from excise.errors import MeasurementError
from excise.record import ScoreRecord, Scores
from excise.search.loop import Measured
from excise.search.scorers import Score, ScoreContext, Scorer, needs_of, score_of

_Clock = Callable[[], float]


class Measures(Protocol):
    """What answers a panel's requests: the engine, or the loader of an exported model."""

    def measure(
        self, candidates: Sequence[CandidateEdits], requests: Sequence[Request]
    ) -> list[Evidence]:
        """Answer all requests for every candidate, as `Engine.measure` does."""
        ...


class Panel:
    """The scorers of a run on one engine."""

    def __init__(self, engine: Measures, scorers: Sequence[Scorer], context: ScoreContext) -> None:
        self._engine = engine
        self._scorers = scorers
        self._context = context
        self._requests = [request for s in scorers for request in needs_of(s, context)]

    def measure(
        self, candidates: Sequence[CandidateEdits], clock: _Clock = time.perf_counter
    ) -> list[Measured]:
        """Return every candidate's scores, and its share of the seconds that each kind of request took."""
        evidence = [Evidence() for _ in candidates]
        seconds = {}
        # One kind after the other: the small first stack of a search is for decoding.
        for phase, kind in (("drift", Divergence), ("responses", Responses)):
            begun = clock()
            wanted = [request for request in self._requests if isinstance(request, kind)]
            answers = self._engine.measure(candidates, wanted) if wanted else []
            for one, answer in zip(evidence, answers, strict=bool(wanted)):
                one.divergence |= answer.divergence
                one.responses |= answer.responses
            seconds[phase] = (clock() - begun) / len(candidates)
        return [self._measured(one, seconds, clock) for one in evidence]

    def _measured(self, one: Evidence, seconds: dict[str, float], clock: _Clock) -> Measured:
        if self._context.judge is None:
            return Measured(self._scores(one), dict(seconds))
        begun = clock()
        scores = self._scores(one)
        return Measured(scores, seconds | {"judge": clock() - begun})

    def _scores(self, evidence: Evidence) -> Scores:
        return {s.name: _recorded(s, score_of(s, evidence, self._context)) for s in self._scorers}


def _recorded(one: Scorer, score: Score) -> ScoreRecord:
    try:
        return to_record(score)
    except (pydantic.ValidationError, AttributeError):
        raise MeasurementError(
            f"scorer {one.name} must return a Score with a count, an interval of two numbers or None, and "
            f"parts that are scores, and returned {score!r:.200}"
        ) from None


def to_record(score: Score) -> ScoreRecord:
    """Return a score as the record states it."""
    parts = {group: to_record(part) for group, part in score.parts.items()}
    return ScoreRecord(value=score.value, n=score.n, interval=score.interval, parts=parts or None)
