"""Confidence intervals of rates and of ratios. Pure maths."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

Z95 = 1.959963984540054


def wilson(count: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Return the Wilson score interval of a rate (Wilson 1927), sound at 0 and 1 and for small n.

    `z` is the normal quantile of its ends; the interval is a 95 % one by default.
    """
    if n == 0:
        return (0.0, 1.0)
    rate, z2 = count / n, z * z
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * (rate * (1 - rate) / n + z2 / (4 * n * n)) ** 0.5
    low = 0.0 if count == 0 else max(0.0, centre - half)
    high = 1.0 if count == n else min(1.0, centre + half)
    return (low, high)


def one_sided(
    value: float, n: int, interval: tuple[float, float] | None, level: float, *, share: bool
) -> tuple[float, float]:
    """Return the bounds that lie below a figure, and above it, each with the confidence `level`.

    Args:
        value: the figure.
        n: what it is out of.
        interval: its 95 % interval, None where it has none: the figure is its own bound then.
        level: above one half and below one.
        share: whether it is a rate: its bounds are those of Wilson's interval. Others are taken as normal.
    """
    z = NormalDist().inv_cdf(level)
    if share:
        return wilson(round(value * n), n, z)
    low, high = interval or (value, value)
    return (value - (value - low) * z / Z95, value + (high - value) * z / Z95)


def ratio(totals: Sequence[float], sizes: Sequence[int]) -> tuple[float, tuple[float, float]]:
    """Return sum of totals over sum of sizes, and its 95 % interval with each pair as one draw.

    Tokens of one response are not independent, so the spread is taken over responses (linearised
    ratio estimator; Cochran, Sampling Techniques, 1977).
    """
    n, size = len(totals), sum(sizes)
    value = sum(totals) / size
    if n < 2:
        return value, (value, value)
    spread = sum((t - value * s) ** 2 for t, s in zip(totals, sizes, strict=True))
    half = Z95 * (n * spread / (n - 1)) ** 0.5 / size
    return value, (max(0.0, value - half), value + half)
