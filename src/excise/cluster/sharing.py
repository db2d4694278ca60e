"""How a batch is shared out, and how long an answer is waited for. Pure: it knows no Ray and no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from excise.search.pareto import SHARES

T = TypeVar("T")

LEAST_PATIENCE = 120.0  # seconds: a worker also loads files and warms up
TIMES_USUAL = 10.0  # a worker that takes this many times what another took is given up
# Figures of one candidate on two devices differ by rounding: relative, and near zero absolute.
_RELATIVE, _ABSOLUTE = 1e-3, 1e-6


def shares(batch: Sequence[T], workers: int) -> list[list[T]]:
    """Cut a batch into one run of candidates per worker, in order; the first get the odd ones.

    Fewer candidates than workers leave some with none.
    """
    small, more = divmod(len(batch), workers)
    out, start = [], 0
    for number in range(workers):
        stop = start + small + (number < more)
        out.append(list(batch[start:stop]))
        start = stop
    return out


def patience(usual: float, least: float = LEAST_PATIENCE) -> float:
    """Return the seconds after which a worker is given up, where another took `usual` for as much."""
    return max(least, TIMES_USUAL * usual)


def disagreement(
    mine: Mapping[str, tuple[float, int]], theirs: Mapping[str, tuple[float, int]]
) -> str | None:
    """Say by which score two devices disagree on one candidate beyond rounding; None where by none.

    Args:
        mine: value and count by score.
        theirs: the same of the other device. One prompt more or less of a count is rounding too, as a
            token may be as likely as the next one.
    """
    if mine.keys() != theirs.keys():
        return "it has other scores"
    for name, (value, count) in mine.items():
        other = theirs[name][0]
        step = 1.0 / count if name in SHARES and count else 0.0
        if abs(value - other) > max(_ABSOLUTE, _RELATIVE * abs(value), 1.001 * step):
            return f"{name} is {other:.6g} there and {value:.6g} here"
    return None
