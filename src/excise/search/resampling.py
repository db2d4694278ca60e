"""What each prompt adds to a score, and what trials look like on prompts drawn again. Pure maths.

All trials are measured on the same prompts, so one set of indices draws them for all: what makes a prompt
easy or hard is the same in every trial, and cancels where two of them are compared (bootstrap; Efron 1979).

Shapes: B replicates, N trials, P prompts, K objectives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from excise.search.pareto import Objective

REPLICATES = 1000
Array = NDArray[np.float64]

_DIGITS = 6  # of a stored total: far below what one prompt more or less changes
_LARGEST = 1e100


class Draws(NamedTuple):
    """What each prompt of a side adds to a score, which is the sum of totals over the sum of sizes.

    Attributes:
        totals: one per prompt: 1 where it shows the behaviour, its tokens' KL divergence, and so on.
        sizes: what each is out of: its tokens, or 0 where it does not count; empty where each is 1.
    """

    totals: tuple[float, ...]
    sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, totals: Sequence[float], sizes: Sequence[int]) -> Draws:
        """Return the draws, without sizes where each is 1."""
        return cls(tuple(totals), () if all(size == 1 for size in sizes) else tuple(sizes))


class StoredDraws(BaseModel):
    """Draws as a study keeps them: rounded to six digits, with the side of their prompts."""

    model_config = ConfigDict(frozen=True)

    side: str
    totals: list[Annotated[int | float, Field(ge=-_LARGEST, le=_LARGEST)]]
    sizes: list[Annotated[int, Field(ge=0, lt=1 << 31)]] = []

    @model_validator(mode="after")
    def _fit(self) -> StoredDraws:
        if (self.sizes and len(self.sizes) != len(self.totals)) or not sum(self.counts):
            raise ValueError("has totals and sizes that do not fit")
        return self

    @classmethod
    def of(cls, draws: Draws, side: str) -> StoredDraws | None:
        """Return draws as they are stored; None where one is not finite, or nothing counts."""
        if not all(map(math.isfinite, draws.totals)):
            return None
        if not sum(draws.sizes or (1,) * len(draws.totals)):
            return None
        totals = [_rounded(total) for total in draws.totals]
        return cls(side=side, totals=totals, sizes=list(draws.sizes))

    @property
    def counts(self) -> list[int]:
        """The sizes, also where each is 1."""
        return self.sizes or [1] * len(self.totals)


def _rounded(total: float) -> float:
    """Return a total as it is stored: the shortest form of six digits."""
    return int(total) if total == int(total) else float(f"{total:.{_DIGITS}g}")


Evidence = Sequence[Mapping[str, StoredDraws]]  # one mapping per trial: its objectives' draws


def resample(
    objectives: Sequence[Objective],
    evidence: Evidence,
    more: Mapping[int, Mapping[str, StoredDraws]] | None = None,
    *,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> Array | None:
    """Draw the prompts again, with replacement, and return every trial's values on them (B, N, K).

    Args:
        objectives: K of them.
        evidence: what each prompt added to each trial's objectives, in the order of the trials.
        more: by position, the same on further prompts of some trials; they are drawn apart from the others.
        seed: of the draws.
        replicates: B.

    Returns:
        None where the evidence of a trial is not there, or is not of the same prompts.
    """
    parts = [dict(enumerate(evidence)), dict(more or {})]
    weights: dict[tuple[int, str, int], Array] = {}
    values = np.empty((replicates, len(evidence), len(objectives)))
    for at, objective in enumerate(objectives):
        totals = np.zeros((replicates, len(evidence)))
        sizes = np.zeros((replicates, len(evidence)))
        for part, found in enumerate(parts):
            mine = {trial: one[objective.name] for trial, one in found.items()
                    if objective.name in one}  # fmt: skip
            if len(mine) < len(found) or len({(d.side, len(d.totals)) for d in mine.values()}) > 1:
                return None
            if not mine:
                continue
            first = next(iter(mine.values()))
            key = (part, first.side, len(first.totals))
            if key not in weights:
                weights[key] = _weights(len(first.totals), replicates, [seed, part, at])
            trials = list(mine)
            totals[:, trials] += weights[key] @ np.array([d.totals for d in mine.values()], float).T
            sizes[:, trials] += weights[key] @ np.array([d.counts for d in mine.values()], float).T
        # A replicate may hold no prompt that counts, such as one with a known answer.
        drawn = np.where(sizes > 0, totals, totals.sum(0))
        values[:, :, at] = drawn / np.where(sizes > 0, sizes, np.maximum(sizes.sum(0), 1))
    return values


def _weights(prompts: int, replicates: int, seed: list[int]) -> Array:
    """Return how often each replicate draws each prompt (B, P)."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    return rng.multinomial(prompts, [1 / prompts] * prompts, size=replicates).astype(float)


def front_probability(values: Array, objectives: Sequence[Objective]) -> Array:
    """Return the share of replicates in which each trial is on the front (N)."""
    signed = values * [o.sign for o in objectives]
    return np.asarray(np.mean([_undominated(one) for one in signed], axis=0))


def _undominated(points: Array) -> NDArray[np.bool_]:
    """Return which of the points (N, K), all minimised, no other dominates."""
    if points.shape[1] != 2:
        no_worse = np.all(points[:, None] <= points[None], axis=-1)
        better = np.any(points[:, None] < points[None], axis=-1)
        return np.asarray(~np.any(no_worse & better, axis=0))
    # From left to right, a point must lie below all before it, or be equal to the last that does.
    order = np.lexsort(points.T[::-1])
    x, y = points[order].T
    lowest = np.minimum.accumulate(y)
    below = np.r_[True, y[1:] < lowest[:-1]]
    last = np.maximum.accumulate(np.where(below, np.arange(len(y)), 0))
    found = np.empty(len(y), dtype=bool)
    found[order] = below | ((x == x[last]) & (y == y[last]))
    return found


def costs(values: Array, objectives: Sequence[Objective]) -> Array:
    """Return what the knee minimises (B, N): the objectives' sum, each divided by its worth.

    An objective without a worth is divided by its range over the replicate's front, as in `pareto.knee`.
    """
    signs, scales = [o.sign for o in objectives], np.ones((len(values), len(objectives)))
    if any(not o.worth for o in objectives):
        for row, one in enumerate(values):
            front = one[_undominated(one * signs)]
            spread = front.max(0) - front.min(0)
            scales[row] = np.where(spread > 0, spread, 1.0)
    for at, objective in enumerate(objectives):
        if objective.worth:
            scales[:, at] = objective.worth
    return np.asarray((values * signs / scales[:, None]).sum(-1))


def regret(values: Array, objectives: Sequence[Objective]) -> Array:
    """Return each trial's expected regret (N): how far its cost is above the best of each replicate."""
    found = costs(values, objectives)
    return np.asarray((found - found.min(1, keepdims=True)).mean(0))
