"""All scorers of a run, asked together: candidates in, scores out; hopeless ones meet fewer prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import pydantic

from excise.engine.requests import Divergence, Evidence, Request
from excise.engine.stacking import CandidateEdits
from excise.errors import MeasurementError
from excise.record import ScoreRecord, Scores
from excise.search.loop import Measured
from excise.search.pareto import Objective, Point, hopeless
from excise.search.scorers import Score, ScoreContext, Scorer, needs_of, score_of

# A screened candidate cannot reach the front; these few prompts still tell the sampler where it is.
SCREENED_PROMPTS = 16

_Clock = Callable[[], float]


class Measures(Protocol):
    """What a panel asks: the engine, or whatever answers requests for one finished model."""

    def measure(
        self,
        candidates: Sequence[CandidateEdits],
        requests: Sequence[Request],
        only: dict[str, int] | None = None,
    ) -> list[Evidence]:
        """As `Engine.measure`."""
        ...


class Panel:
    """Scorers on one engine. `quick` ones need divergence only, and can be had before decoding."""

    def __init__(
        self, engine: Measures, scorers: Sequence[Scorer], context: ScoreContext, *, screen: bool
    ) -> None:
        self._engine = engine
        self._context = context
        self._screen = screen
        self._requests = {s.name: needs_of(s, context) for s in scorers}
        self._names = [s.name for s in scorers]
        self._quick = [s for s in scorers if _is_quick(self._requests[s.name])]
        self._slow = [s for s in scorers if not _is_quick(self._requests[s.name])]

    def measure(
        self,
        candidates: Sequence[CandidateEdits],
        objectives: Sequence[Objective] = (),
        finished: Sequence[Point] = (),
        clock: _Clock = time.perf_counter,
    ) -> list[Measured]:
        """Scores of every candidate.

        Divergence first: a candidate that a finished point beats whatever its other objectives turn
        out to be is screened, that is measured on the first 16 prompts only.
        """
        begun = clock()
        evidence = self._engine.measure(candidates, self._wanted(self._quick))
        scores = [self._scores(self._quick, one) for one in evidence]
        drifted = clock()
        best = {s.name: s.best for s in self._slow if s.best is not None}
        behind = [
            self._screen
            and bool(objectives)
            and hopeless({k: v.value for k, v in one.items()}, best, finished, objectives)
            for one in scores
        ]
        if self._slow:
            self._add_slow(candidates, scores, behind)
        ended = clock()
        share = len(candidates)
        seconds = {"drift": (drifted - begun) / share, "responses": (ended - drifted) / share}
        return [
            Measured({name: one[name] for name in self._names}, dict(seconds), screened)
            for one, screened in zip(scores, behind, strict=True)
        ]

    def _add_slow(
        self, candidates: Sequence[CandidateEdits], scores: list[Scores], behind: list[bool]
    ) -> None:
        wanted = self._wanted(self._slow)
        few = dict.fromkeys((request.side for request in wanted), SCREENED_PROMPTS)
        for flag, only in ((False, None), (True, few)):
            numbers = [n for n, screened in enumerate(behind) if screened is flag]
            if not numbers:
                continue
            evidence = self._engine.measure([candidates[n] for n in numbers], wanted, only)
            for number, one in zip(numbers, evidence, strict=True):
                scores[number] |= self._scores(self._slow, one)

    def _wanted(self, scorers: Sequence[Scorer]) -> list[Request]:
        return [request for s in scorers for request in self._requests[s.name]]

    def _scores(self, scorers: Sequence[Scorer], evidence: Evidence) -> Scores:
        return {s.name: _recorded(s, score_of(s, evidence, self._context)) for s in scorers}


def _recorded(one: Scorer, score: Score) -> ScoreRecord:
    try:
        return to_record(score)
    except (pydantic.ValidationError, AttributeError):
        raise MeasurementError(
            f"scorer {one.name} must return a Score with a count, an interval of two numbers or None, and "
            f"parts that are scores, and returned {score!r:.200}"
        ) from None


def to_record(score: Score) -> ScoreRecord:
    """A score as the record states it."""
    parts = {group: to_record(part) for group, part in score.parts.items()}
    return ScoreRecord(value=score.value, n=score.n, interval=score.interval, parts=parts or None)


def _is_quick(requests: Sequence[Request]) -> bool:
    return all(isinstance(request, Divergence) for request in requests)
