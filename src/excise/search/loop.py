"""The multi-objective search: ask, measure, tell, in batches that come out the same after a kill.

Trials are asked in batches of C with constant liar. A batch's trials depend only on the batches
before it and on the seed. The sampler is seeded anew by trial number: one that went on from its seed
would repeat its random trials after a resume. An interrupted batch is dropped from the journal, and
asked and measured again as a whole, to the same trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState

from excise.config import SearchSection
from excise.errors import StorageError
from excise.events import OnEvent, Progress, TrialMeasured
from excise.record import ScoreRecord, TrialRecord
from excise.search.journal import Study
from excise.search.pareto import Objective, Point, pareto


@dataclass(frozen=True)
class Measured:
    """The scores of one candidate, and the seconds that each phase took."""

    scores: dict[str, ScoreRecord] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    reason: str | None = None  # why there are no scores


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
    ) -> None:
        self.study = study
        self._space = space
        self.objectives = objectives
        self._section = section
        self._batch = batch
        self._seed = seed
        self._begun = False

    def run(self, trials: int, measure: Measure, on_event: OnEvent) -> None:
        """Run batches until the study holds `trials` finished trials.

        A total below an earlier one ends with the first batch that reaches it.

        Raises:
            StorageError: the journal cannot be written.
        """
        try:
            self._drop_unfinished()
            stops = self._stops(trials)
            parts = batches(stops, self._batch)
            for start, stop in parts:
                if stop <= len(self._trials()):
                    continue
                if start > 0 and not self._begun:
                    measure([trial.params for trial in self._trials()[slice(*parts[0])]])
                self._begun = True
                self._run_batch(start, stop, measure, on_event)
                on_event(Progress("search", stop, stops[-1]))
        except OSError as error:
            raise StorageError(f"cannot write the study: {error.strerror or error}") from None

    @property
    def asked(self) -> int:
        """The largest total that was asked for."""
        return int(self.study.user_attrs["stops"][-1])

    def records(self) -> list[TrialRecord]:
        """Return every trial so far, as the record states it."""
        return [record_of(trial) for trial in self._trials()]

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

    def _run_batch(self, start: int, stop: int, measure: Measure, on_event: OnEvent) -> None:
        with self.study.journal.together():
            asked = [self._ask(number) for number in range(start, stop)]
        measured = measure([trial.params for trial in asked])
        with self.study.journal.together():
            for trial, result in zip(asked, measured, strict=True):
                self._tell(trial, result)
        front = {p.number for p in pareto(self.points(), self.objectives)}
        for trial, result in zip(asked, measured, strict=True):
            values = {name: score.value for name, score in result.scores.items()}
            number = trial.number
            on_event(TrialMeasured(number, values, number in front))

    def _ask(self, number: int) -> Trial:
        """Ask for trial `number`, a function of the seed, the number and the trials before it."""
        state = np.random.SeedSequence([self._seed, number]).generate_state(1)[0]
        self.study.sampler = TPESampler(
            multivariate=True,
            constant_liar=True,
            n_startup_trials=self._section.startup_trials,
            n_ei_candidates=self._section.ei_candidates,
            seed=int(state),
        )
        trial = self.study.ask(self._space)
        assert trial.number == number
        return trial

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


def _finite(score: ScoreRecord) -> bool:
    return all(map(math.isfinite, (score.value, *(score.interval or ()))))


def _stored(result: Measured, values: list[float] | None) -> dict[str, Any]:
    """Return a measurement as a trial stores it. JSON has no infinities, so such scores are left out."""
    good = values is not None
    scores = {name: score for name, score in result.scores.items() if _finite(score)}
    return {
        "scores": {k: v.model_dump(exclude_none=True) for k, v in scores.items()},
        "seconds": result.seconds,
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


def record_of(trial: FrozenTrial) -> TrialRecord:
    """Return a trial of the study as the record states it."""
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
        }
    )


def importance(study: optuna.Study, objectives: Sequence[Objective]) -> dict[str, dict[str, float]]:
    """Compute how much of each objective's variance a parameter explains; {} if trials are too few.

    Functional ANOVA over a random forest (Hutter, Hoos and Leyton-Brown 2014).
    """
    done = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    if len(done) < 10:
        return {}
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    out = {}
    for position, objective in enumerate(objectives):
        values = {t.values[position] for t in done}
        if len(values) < 3:  # nothing varies, nothing to explain
            continue

        def target(trial: FrozenTrial, at: int = position) -> float:
            return float(trial.values[at])

        evaluator = FanovaImportanceEvaluator(seed=0)
        found = get_param_importances(study, evaluator=evaluator, target=target)
        out[objective.name] = {name: float(value) for name, value in found.items()}
    return out
