"""Differences of two models on the same samples, with intervals. Pure maths.

Two models that meet the same samples differ by less noise than their figures' own intervals suggest: what
makes a sample hard is the same for both. So the interval is of the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from excise.intervals import Z95

_REPLICATES = 4000


@dataclass(frozen=True)
class Difference:
    """The second model's mean less the first's, on the same samples.

    Attributes:
        value: the difference.
        interval: 95 %.
        n: samples.
        gained: samples that only the second model gets right; None where samples are not right or wrong.
        lost: samples that only the first gets right.
        p: of McNemar's exact test that neither is likelier to be right alone.
    """

    value: float
    interval: tuple[float, float]
    n: int
    gained: int | None = None
    lost: int | None = None
    p: float | None = None


def difference(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Difference:
    """Compare two models' values on the same samples, in the same order; there is at least one.

    Right and wrong (1 and 0) are compared by what changed sides, others by their differences.
    """
    first, second = np.asarray(before, float), np.asarray(after, float)
    assert len(first) == len(second) > 0
    value = float((second - first).mean())
    if not set(np.unique([first, second])) <= {0.0, 1.0}:
        return Difference(value, paired_bootstrap(second - first, seed), len(first))
    gained, lost = int((second > first).sum()), int((second < first).sum())
    bounds = proportions(gained, lost, len(first))
    return Difference(value, bounds, len(first), gained, lost, mcnemar(gained, lost))


def proportions(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a difference of paired proportions, sound also where few samples differ.

    Wald's with one sample more on either side (Bonett and Price 2012).
    """
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z95 * ((up + down - (up - down) ** 2) / (n + 2)) ** 0.5
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided p of McNemar's exact test: a fair coin for each sample that changed sides."""
    changed = gained + lost
    tail = sum(comb(changed, k) for k in range(min(gained, lost) + 1))
    return float(min(1.0, 2 * tail / 2**changed))


def paired_bootstrap(differences: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of a mean difference: quantiles of means over samples drawn again.

    They are widened by what percentiles of n samples lack (Hesterberg 2015, expanded percentiles).
    """
    n = len(differences)
    if n < 2:
        value = float(differences[0])
        return value, value
    rng = np.random.default_rng(seed)
    rows = rng.integers(n, size=(_REPLICATES, n))
    means = differences[rows].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    # Student's quantile over the normal one, to the first order in 1/n.
    wider = (1 + (1 + Z95**2) / (4 * (n - 1))) * (n / (n - 1)) ** 0.5
    middle = float(differences.mean())
    return float(middle + (low - middle) * wider), float(middle + (high - middle) * wider)
