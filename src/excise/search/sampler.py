"""Which parameters to try next: Optuna's multivariate TPE, told of trials by where they lie in the region.

It is asked for a batch at a time, in a study of its own in memory, and seeded anew by trial number: what
it answers is a function of the seed, the number and the trials before the batch. Its time grows with the
trials that it is told of, so of a long search it is told the best and the last ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import le
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import create_trial

# The parameters of a trial, and what the sampler is told of it.
Known = tuple[Mapping[str, Any], Sequence[float]]

MOST = 60  # trials that the sampler is told of
BEST = 20  # of them, from the front down; the others are the last ones


class Sampler:
    """The sampler of a search; everything that it is told is better the less it is."""

    def __init__(
        self, space: Mapping[str, BaseDistribution], objectives: int, candidates: int, seed: int
    ) -> None:
        """`objectives` counts them; `candidates` are the points that TPE weighs for each trial."""
        self._space = dict(space)
        self._objectives = objectives
        self._candidates = candidates
        self._seed = seed

    def ask(self, known: Sequence[Known], numbers: range, startup: int) -> list[dict[str, Any]]:
        """Return the parameters of a batch.

        Args:
            known: the complete trials before the batch, in order.
            numbers: those of the batch's trials.
            startup: how many trials must be complete before one is not random.
        """
        study = optuna.create_study(directions=["minimize"] * self._objectives)
        if len(known) < startup:
            return [self._one(study, RandomSampler(self._seed_of(n))) for n in numbers]
        for place in telling([told for _, told in known]):
            params, told = known[place]
            trial = create_trial(params=dict(params), distributions=self._space, values=told)
            study.add_trial(trial)
        return [self._one(study, self._tpe(number)) for number in numbers]

    def _one(self, study: optuna.Study, sampler: BaseSampler) -> dict[str, Any]:
        study.sampler = sampler
        return study.ask(self._space).params

    def _tpe(self, number: int) -> TPESampler:
        return TPESampler(
            multivariate=True,
            constant_liar=True,
            n_startup_trials=0,
            n_ei_candidates=self._candidates,
            seed=self._seed_of(number),
        )

    def _seed_of(self, number: int) -> int:
        return int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])


def telling(told: Sequence[Sequence[float]]) -> list[int]:
    """Return the places of the trials to tell the sampler of: all, or the best and the last ones."""
    count = len(told)
    if count <= MOST:
        return list(range(count))
    rest = sorted(range(count), key=lambda place: tuple(told[place]))
    best: list[int] = []
    while rest and len(best) < BEST:
        front, rest = _parted(told, rest)
        best += front[:: -(-len(front) // (BEST - len(best)))]  # of too many, some of each part
    last = sorted(set(range(count)) - set(best))[len(best) - MOST :]
    return sorted([*best, *last])


def _parted(told: Sequence[Sequence[float]], places: list[int]) -> tuple[list[int], list[int]]:
    """Part the front of some trials from the others; `places` are in the order of what is told.

    As `pareto.pareto`, for values that are all minimised: of thousands of trials, before every batch.
    """
    front: list[int] = []
    others: list[int] = []
    for place in places:
        mine = told[place]
        beaten = any(all(map(le, told[one], mine)) for one in reversed(front))
        (others if beaten else front).append(place)
    return front, others
