"""The choice of a trial: fronts on resampled prompts, and a second measurement of those that it is between.

Of many trials the best on the search prompts is in part the luckiest on them. Those that could be chosen
are measured again on prompts that the search has not used; both measurements together decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pydantic
from pydantic import BaseModel, ConfigDict

from excise.errors import RunStateError
from excise.events import OnEvent, Progress
from excise.intervals import one_sided, wilson
from excise.record import ScoreRecord, Scores, TrialRecord
from excise.search import resampling
from excise.search.loop import Measure, Search, draws_of
from excise.search.pareto import SHARES, Objective, Point, choose, pareto
from excise.search.resampling import Array, StoredDraws

BUDGET = 0.1  # of what the search's trials cost: bench/choice.py
_CONFIRM = "confirm"  # the study's attribute


class Confirmed(BaseModel):
    """A trial's measurement on prompts that the search has not used, as the study keeps it."""

    model_config = ConfigDict(frozen=True)

    scores: Scores
    draws: dict[str, StoredDraws] = {}


class Chooser:
    """The choice among the trials of a search that has ended."""

    def __init__(self, search: Search, rule: str, seed: int) -> None:
        self._search = search
        self._rule = rule
        self._seed = seed
        self._goals = search.objectives
        self._records = [r for r in search.records() if r.state == "complete"]
        by_number = {t.number: t for t in search.study.get_trials(deepcopy=False)}
        self._evidence = [draws_of(by_number[r.number]) for r in self._records]
        self.confirmed = _stored(search)

    def values(self) -> Array | None:
        """Return every complete trial's objectives on resampled prompts; None without the evidence."""
        places = {r.number: place for place, r in enumerate(self._records)}
        more = {places[n]: one.draws for n, one in self.confirmed.items() if n in places}
        return resampling.resample(self._goals, self._evidence, more, seed=self._seed)

    def contenders(self, most: int) -> list[TrialRecord]:
        """Return the trials to measure again: what the rule chooses, what it would without that, and so on.

        They need not be on the front: what beats them there may be luck. Resampling does not tell which
        to take, as 0 of 100 stays 0 however often it is drawn again. Fewer than two decide nothing.
        """
        if most < 2 or self.values() is None:
            return []
        left, found = [t for t in self.annotated() if t.state == "complete"], list[TrialRecord]()
        while left and len(found) < most:
            best = choose_among(self._rule, left, self._goals)
            if best is None:
                break
            found.append(best)
            left.remove(best)
        return found if len(found) > 1 else []

    def confirm(self, trials: Sequence[TrialRecord], measure: Measure, on_event: OnEvent) -> None:
        """Measure trials again, those that were not yet, and keep it in the study; one may have no edit."""
        left = [t for t in trials if t.number not in self.confirmed]
        results = measure([t.params for t in left]) if left else []
        for trial, result in zip(left, results, strict=True):
            if all(o.name in result.scores and o.name in result.draws for o in self._goals):
                self.confirmed[trial.number] = Confirmed(scores=result.scores, draws=result.draws)
        if left:
            kept = {str(n): one.model_dump(mode="json") for n, one in self.confirmed.items()}
            self._search.study.set_user_attr(_CONFIRM, kept)
        on_event(Progress("confirm", len(trials), len(trials)))

    def annotated(self) -> list[TrialRecord]:
        """Return every trial with its second measurement, its place on resampled fronts and its regret."""
        values, known = self.values(), dict[int, dict[str, Any]]()
        if values is not None:
            chance = resampling.front_probability(values, self._goals)
            regret = resampling.regret(values, self._goals)
            for place, record in enumerate(self._records):
                known[record.number] = {
                    "front_probability": round(float(chance[place]), 3),
                    "regret": float(f"{regret[place]:.4g}"),
                }
        for number, one in self.confirmed.items():
            known.setdefault(number, {})["confirm"] = one.scores
        return [r.model_copy(update=known.get(r.number, {})) for r in self._search.records()]

    def choose(self, trials: Sequence[TrialRecord]) -> tuple[list[int], TrialRecord | None]:
        """Return the front, and the trial that the rule chooses of those annotated; None if it fits none.

        Only what was measured twice is chosen, where that holds a trial that fits. It stands on the front
        by what both measurements say, whatever beats it on the search prompts alone.
        """
        front = [point.number for point in pareto(self._search.points(), self._goals)]
        chosen = choose_among(self._rule, [t for t in trials if t.confirm], self._goals)
        if chosen is None:
            chosen = choose_among(self._rule, [t for t in trials if t.number in front], self._goals)
        if chosen is not None and chosen.number not in front:
            front.append(chosen.number)
        return front, chosen


def _stored(search: Search) -> dict[int, Confirmed]:
    """Read the second measurements that a study keeps.

    Raises:
        RunStateError: they cannot be read.
    """
    kept = search.study.user_attrs.get(_CONFIRM, {})
    try:
        return pydantic.TypeAdapter(dict[int, Confirmed]).validate_python(kept)
    except pydantic.ValidationError:
        raise RunStateError(
            f"{search.study.path} holds a second measurement of trials that cannot be read: put the "
            "journal back as it was, or choose a new --out"
        ) from None


def choose_among(
    rule: str, trials: Sequence[TrialRecord], objectives: Sequence[Objective]
) -> TrialRecord | None:
    """Choose one of some complete trials, by all that was measured of them.

    The knee is the trial with the least expected regret, where that is known of all of them.

    Raises:
        ConfigError: the rule does not parse or names no objective.
    """
    by_number = {trial.number: trial for trial in trials}
    regrets = [(trial.regret, trial.number) for trial in trials if trial.regret is not None]
    if rule == "knee" and regrets and len(regrets) == len(trials):
        return by_number[min(regrets)[1]]
    figures = {n: [figure(trial, o.name) for o in objectives] for n, trial in by_number.items()}
    points = [Point(n, tuple(score.value for score in found)) for n, found in figures.items()]

    def bound(number: int, at: int, level: float) -> float:
        score, goal = figures[number][at], objectives[at]
        share = goal.name in SHARES
        ends = one_sided(score.value, score.n, score.interval, level, share=share)
        return ends[goal.sign > 0]

    chosen = choose(rule, points, objectives, bound)
    return None if chosen is None else by_number[chosen.number]


def figure(trial: TrialRecord, name: str) -> ScoreRecord:
    """Return a trial's score on all prompts that it was measured on: those of the search, and `confirm`."""
    first, second = trial.scores[name], (trial.confirm or {}).get(name)
    n = first.n + (0 if second is None else second.n)
    if second is None or not n:
        return first
    value = (first.value * first.n + second.value * second.n) / n
    if name in SHARES:
        return ScoreRecord(value=value, n=n, interval=wilson(round(value * n), n))
    if first.interval is None or second.interval is None:
        return ScoreRecord(value=value, n=n)
    halves = [(s.interval[1] - s.value) * s.n for s in (first, second) if s.interval is not None]
    half = sum(h * h for h in halves) ** 0.5 / n
    return ScoreRecord(value=value, n=n, interval=(max(0.0, value - half), value + half))
