"""The multi-objective search: ask, measure, tell, in batches that come out the same after a kill.

Trials are asked in batches of C with constant liar. A batch's trials depend only on the batches
before it and on the seed. The sampler is seeded anew by trial number: one that went on from its seed
would repeat its random trials after a resume. An interrupted batch is dropped from the journal, and
asked and measured again as a whole, to the same trials.

A search ends after a number of trials, or when the time for another batch is not left. What depends on
the machine's speed, such as how many trials a time allows, is stored with the study: a resume repeats it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import Any

import optuna
import pydantic
from optuna.distributions import BaseDistribution
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial, Trial, TrialState

from excise.config import SearchSection
from excise.errors import StorageError
from excise.events import OnEvent, Progress, TrialMeasured
from excise.record import ScoreRecord, SearchRecord, TrialRecord
from excise.search.journal import Study
from excise.search.pareto import Objective, Point, pareto
from excise.search.region import Region
from excise.search.resampling import StoredDraws
from excise.search.sampler import Sampler

MOST_EXPLAINED = 300  # trials that the importance of the parameters is computed from
RANDOM_SHARE = 0.3  # of the trials that a time allows, as 60 of 200
_REGION: pydantic.TypeAdapter[Region | None] = pydantic.TypeAdapter(Region | None)


@dataclass(frozen=True)
class Measured:
    """The scores of one candidate, and the seconds that each phase took."""

    scores: dict[str, ScoreRecord] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    reason: str | None = None  # why there are no scores
    draws: dict[str, StoredDraws] = field(default_factory=dict)  # of scores that have them


# Parameters of a batch -> measurements, in order. The first batch of a study is always measured first,
# after a resume too, as drafts are made from it.
Measure = Callable[[list[dict[str, Any]]], list[Measured]]


class Search:
    """The search over one study; `batch` is C."""

    def __init__(
        self,
        study: Study,
        space: dict[str, BaseDistribution],
        objectives: Sequence[Objective],
        section: SearchSection,
        *,
        batch: int,
        seed: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.study = study
        self.objectives = objectives
        self._space = space
        self._sampler = Sampler(space, len(objectives), section.ei_candidates, seed)
        self._startup = section.startup_trials
        self._batch = batch
        self._clock = clock
        self._begun = False
        self._finished: list[TrialRecord] = []  # of the first trials, which no longer change
        self._front: list[Point] = []  # of the trials after the last batch

    def aim(self, region: Region | None) -> None:
        """Let the sampler be told where in this region a trial lies, in place of its scores.

        A study goes on as it was begun: one with trials keeps its region, or does without.
        """
        if not self._trials() and "region" not in self.study.user_attrs:
            self.study.set_user_attr("region", None if region is None else asdict(region))

    def run(self, trials: int, measure: Measure, on_event: OnEvent) -> None:
        """Run batches until the study holds `trials` finished trials.

        A total below an earlier one ends with the first batch that reaches it.

        Raises:
            StorageError: the journal cannot be written.
        """
        with _storing():
            self._drop_unfinished()
            stops, done = self._stops(trials), len(self._trials())
            for start, stop in batches(stops, self._batch):
                if stop > done:
                    self._run_batch(start, stop, measure, on_event)
                    on_event(Progress("search", stop, stops[-1]))

    def run_for(self, seconds: float, measure: Measure, on_event: OnEvent) -> None:
        """Run batches for as long as the search may take, the time of earlier calls included.

        A batch begins where the time for it is left, judged by the one before; the first always does.

        Raises:
            StorageError: the journal cannot be written.
        """
        with _storing():
            self._drop_unfinished()
            done, took = len(self._trials()), 0.0
            if done:
                took = self.spent * self._batch / done
            while not done or self.spent + took <= seconds:
                before = self.spent
                stop = self._open_stop(done)
                self._run_batch(done, stop, measure, on_event, allowed=seconds)
                done, took = stop, self.spent - before
                left = max(0.0, seconds - self.spent)
                more = int(left / took) * self._batch if took else 0
                on_event(Progress("search", done, done + more, left))
            self._stops(done)

    @property
    def asked(self) -> int:
        """The largest total that was asked for."""
        return int(self.study.user_attrs["stops"][-1])

    @property
    def spent(self) -> float:
        """Seconds that the batches of the study took, those of earlier processes included."""
        return float(self.study.user_attrs.get("spent", 0.0))

    @property
    def startup(self) -> int:
        """How many random trials come first."""
        return int(self.study.user_attrs.get("startup", self._startup))

    def first(self) -> list[dict[str, Any]]:
        """Return random parameters: those of a study's first trials."""
        return self._sampler.ask([], range(8), startup=1)

    def facts(self) -> SearchRecord:
        """Return how the search went, for the record."""
        region = region_of_study(self.study)
        edges = () if region is None else region.edges
        return SearchRecord(
            seconds=round(self.spent, 3),
            startup_trials=self.startup,
            region={
                o.name: (e.best, e.worst)
                for o, e in zip(self.objectives, edges, strict=bool(edges))
            },
        )

    def records(self) -> list[TrialRecord]:
        """Return every trial so far, as the record states it."""
        trials, region = self._trials(), region_of_study(self.study)
        known = len(self._finished)
        rest = [record_of(trial, region) for trial in trials[known:]]
        self._finished += takewhile(lambda one: one.state != "running", rest)
        return [*self._finished, *rest[len(self._finished) - known :]]

    def points(self) -> list[Point]:
        """Return the complete trials, as points of the front."""
        return points(self.records(), self.objectives)

    def _drop_unfinished(self) -> None:
        """Drop the trials after the last whole batch; they are asked and measured again."""
        stops, trials = self.study.user_attrs.get("stops", []), self._trials()
        done = next((n for n, one in enumerate(trials) if not one.state.is_finished()), len(trials))
        whole = max(stop for _, stop in [(0, 0), *batches(stops, self._batch)] if stop <= done)
        if whole < len(trials):
            self.study = self.study.before(whole)
            del self._finished[whole:]
            self._front = []
            if self.study.user_attrs.get("stops", []) != stops:  # asked for after those trials
                self.study.set_user_attr("stops", stops)

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _stops(self, trials: int) -> list[int]:
        """Return the totals asked for so far. No batch straddles one, so that each part repeats exactly."""
        known: list[int] = list(self.study.user_attrs.get("stops", []))
        stops = known
        if not known or trials > known[-1]:
            stops = [*known, trials]
        else:
            least = max(trials, len(self._trials()))
            end = next(stop for _, stop in batches(known, self._batch) if stop >= least)
            stops = [*(stop for stop in known if stop < end), end]
        if stops != known:
            self.study.set_user_attr("stops", stops)
        return stops

    def _open_stop(self, start: int) -> int:
        """Return where the batch from `start` on ends: a whole one, where no total was asked for yet."""
        known: list[int] = self.study.user_attrs.get("stops", [])
        stops = self._stops(start + self._batch) if not known or known[-1] <= start else known
        return next(stop for _, stop in batches(stops, self._batch) if stop > start)

    def _run_batch(
        self,
        start: int,
        stop: int,
        measure: Measure,
        on_event: OnEvent,
        allowed: float | None = None,
    ) -> None:
        """Ask, measure and tell a batch; `allowed` are the seconds of the whole search."""
        if start > 0 and not self._begun:
            first = batches(self.study.user_attrs["stops"], self._batch)[0]
            measure([trial.params for trial in self._trials()[slice(*first)]])
        self._begun = True
        begun = self._clock()  # what a resume does again is not in the time
        with self.study.journal.together():
            asked = self._ask(range(start, stop))
        measured = measure([trial.params for trial in asked])
        with self.study.journal.together():
            took = self._clock() - begun
            # Before the trials: a journal that has them has what belongs to them.
            self.study.set_user_attr("spent", self.spent + took)
            if start == 0 and allowed is not None:
                self.study.set_user_attr(
                    "startup", self._random_share(allowed / max(took, 1e-6), stop)
                )
            for trial, result in zip(asked, measured, strict=True):
                self._tell(trial, result)
        front = self._front_with(start)
        for trial, result in zip(asked, measured, strict=True):
            values = {name: score.value for name, score in result.scores.items()}
            number = trial.number
            on_event(TrialMeasured(number, values, number in front))

    def _front_with(self, start: int) -> set[int]:
        """Return the numbers of the trials on the front, given that of the trials before `start`."""
        if start == 0 or not self._front:
            new = self.points()
        else:
            new = [*self._front, *points(self.records()[start:], self.objectives)]
        self._front = pareto(new, self.objectives)
        return {point.number for point in self._front}

    def _random_share(self, batches_in_all: float, batch: int) -> int:
        """Return how many of the trials that a time allows are random ones: the usual share at most."""
        return max(1, min(self._startup, round(RANDOM_SHARE * batches_in_all * batch)))

    def _ask(self, numbers: range) -> list[Trial]:
        """Ask for these trials, a function of the seed, their numbers and the trials before them."""
        known = [
            (trial.params, trial.told or self._scored(trial))
            for trial in self.records()
            if trial.state in ("complete", "screened")
        ]
        asked = []
        self.study.sampler = RandomSampler()  # it has nothing to choose
        for params in self._sampler.ask(known, numbers, self.startup):
            self.study.enqueue_trial(params)
            asked.append(self.study.ask(self._space))
        assert [trial.number for trial in asked] == list(numbers)
        return asked

    def _scored(self, trial: TrialRecord) -> list[float]:
        return [o.sign * trial.scores[o.name].value for o in self.objectives]

    def _tell(self, trial: Trial, result: Measured) -> None:
        values = self._values(result)
        trial.set_user_attr("measured", _stored(result, values))
        if values is None:
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            self.study.tell(trial, values)

    def _values(self, result: Measured) -> list[float] | None:
        """Return the values of the objectives; None where one is missing or any score is not finite."""
        values = [result.scores[o.name].value for o in self.objectives if o.name in result.scores]
        good = len(values) == len(self.objectives) and all(map(_finite, result.scores.values()))
        return values if good else None


@contextmanager
def _storing() -> Iterator[None]:
    """Say of a journal that cannot be written what it is."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write the study: {error.strerror or error}") from None


def _finite(score: ScoreRecord) -> bool:
    return all(map(math.isfinite, (score.value, *(score.interval or ()))))


def _stored(result: Measured, values: list[float] | None) -> dict[str, Any]:
    """Return a measurement as a trial stores it. JSON has no infinities, so such scores are left out."""
    good = values is not None
    scores = {name: score for name, score in result.scores.items() if _finite(score)}
    draws = {k: v.model_dump(exclude_defaults=True) for k, v in result.draws.items()}
    return {
        "scores": {k: v.model_dump(exclude_none=True) for k, v in scores.items()},
        "seconds": result.seconds,
        "draws": draws,
        "reason": result.reason if good or result.reason else "a score is not finite",
    }


def batches(stops: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Return (first, end) of every batch: each part between two stops is cut into batches of `size`."""
    out, start = [], 0
    for stop in stops:
        out += [(low, min(low + size, stop)) for low in range(start, stop, size)]
        start = stop
    return out


def points(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> list[Point]:
    """Return the complete trials as points of the front."""
    return [
        Point(r.number, tuple(r.scores[o.name].value for o in objectives))
        for r in records
        if r.state == "complete"
    ]


def draws_of(trial: FrozenTrial) -> dict[str, StoredDraws]:
    """Return what each prompt added to a trial's scores; {} in studies of earlier versions."""
    found = trial.user_attrs.get("measured", {}).get("draws", {})
    return {name: StoredDraws.model_validate(one) for name, one in found.items()}


def region_of_study(study: optuna.Study) -> Region | None:
    """Return the region of interest of a study; None where its sampler is told scores as they are.

    Raises:
        pydantic.ValidationError: what is stored is no region.
    """
    return _REGION.validate_python(study.user_attrs.get("region"))


def record_of(trial: FrozenTrial, region: Region | None = None) -> TrialRecord:
    """Return a trial of the study as the record states it, and what the sampler is told of it."""
    measured = trial.user_attrs.get("measured", {})
    screened = bool(measured.get("screened", False))  # by an earlier version
    if trial.state == TrialState.COMPLETE:
        state = "screened" if screened else "complete"
    else:
        state = "failed" if trial.state == TrialState.FAIL else "running"
    return TrialRecord.model_validate(
        {
            "number": trial.number,
            "state": state,
            "params": trial.params,
            "scores": measured.get("scores", {}),
            "seconds": measured.get("seconds", {}),
            "screened": screened,
            "reason": measured.get("reason"),
            "told": region.told(trial.values) if region is not None and trial.values else None,
        }
    )


def importance(study: optuna.Study, objectives: Sequence[Objective]) -> dict[str, dict[str, float]]:
    """Compute how much of each objective's variance a parameter explains; {} if trials are too few.

    Functional ANOVA over a random forest (Hutter, Hoos and Leyton-Brown 2014), whose time grows with the
    trials: of many it sees some, from the first to the last.
    """
    done = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    if len(done) < 10:
        return {}
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    done = done[:: -(-len(done) // MOST_EXPLAINED)]
    some = optuna.create_study(directions=study.directions)
    some.add_trials(done)
    out = {}
    for position, objective in enumerate(objectives):
        values = {t.values[position] for t in done}
        if len(values) < 3:  # nothing varies, nothing to explain
            continue

        def target(trial: FrozenTrial, at: int = position) -> float:
            return float(trial.values[at])

        evaluator = FanovaImportanceEvaluator(seed=0)
        found = get_param_importances(some, evaluator=evaluator, target=target)
        out[objective.name] = {name: float(value) for name, value in found.items()}
    return out
