"""All scorers of a run on one engine: candidates in, scores out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import pydantic

from excise.engine.requests import Divergence, Evidence, Request, Responses
from excise.engine.stacking import CandidateEdits
from excise.errors import MeasurementError
from excise.record import ScoreRecord, Scores
from excise.search.loop import Measure, Measured
from excise.search.resampling import Draws, StoredDraws
from excise.search.score_context import ScoreContext
from excise.search.scorers import Score, Scorer, needs_of, score_of

_Clock = Callable[[], float]
# Parameters of a trial -> its edits; a MeasurementError says why it has none.
EditsOf = Callable[[Mapping[str, Any]], CandidateEdits]


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
        needs = {s.name: needs_of(s, context) for s in scorers}
        self._requests = [request for of_one in needs.values() for request in of_one]
        self._sides = {
            name: "+".join(sorted({request.side for request in of_one}))
            for name, of_one in needs.items()
        }

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

    def _measured(self, evidence: Evidence, seconds: dict[str, float], clock: _Clock) -> Measured:
        judged = self._context.judge is not None
        begun = clock() if judged else 0.0
        found = {s: score_of(s, evidence, self._context) for s in self._scorers}
        scores: Scores = {s.name: _recorded(s, score) for s, score in found.items()}
        draws = {
            s.name: StoredDraws.of(score.draws, self._sides[s.name])
            for s, score in found.items()
            if isinstance(score.draws, Draws)
        }
        if judged:
            seconds = seconds | {"judge": clock() - begun}
        known = {name: one for name, one in draws.items() if one is not None}
        return Measured(scores, dict(seconds), draws=known)


def measurer(
    edits_of: EditsOf, panel: Panel, learning: Callable[[], AbstractContextManager[None]]
) -> Measure:
    """Return a function that measures a batch of parameters, for the search.

    `learning` surrounds the first batch: its responses become drafts for later candidates.
    """
    batches = itertools.count()

    def measure(params: list[dict[str, Any]]) -> list[Measured]:
        begun = time.perf_counter()
        edits = [edits_or_reason(edits_of, one) for one in params]
        built = (time.perf_counter() - begun) / len(params)
        good = [one for one in edits if not isinstance(one, str)]
        with learning() if next(batches) == 0 else nullcontext():
            results = iter(panel.measure(good) if good else ())
        return [
            Measured(seconds={"edits": built}, reason=one)
            if isinstance(one, str)
            else _timed(next(results), built)
            for one in edits
        ]

    return measure


def edits_or_reason(edits_of: EditsOf, params: Mapping[str, Any]) -> CandidateEdits | str:
    """Return a candidate's edits, or why it has none."""
    try:
        return edits_of(params)
    except MeasurementError as error:
        return str(error)


def _timed(measured: Measured, built: float) -> Measured:
    return replace(measured, seconds={"edits": built, **measured.seconds})


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
    return ScoreRecord(
        value=score.value,
        n=score.n,
        interval=score.interval,
        parts=parts or None,
        spread=score.spread or None,
    )
