"""Pareto fronts, and rules that choose a point on them. Pure maths."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from excise.errors import ConfigError

_LIMIT = re.compile(r"\s*([a-z_][\w.]*)\s*([<>]=)\s*([0-9.eE+-]+)\s*(?:@\s*([0-9.]{1,9})\s*%\s*)?$")
_VERDICTS = ("verdict_shows", "verdict_answers", "verdict_other", "verdict_broken", "no_answer")
SHARES = frozenset(
    {"behaviour_rate", "false_rate", "restored", "kept", *_VERDICTS}
)  # scores from 0 to 1
_SHORT = {"rate": "behaviour_rate"}


@dataclass(frozen=True)
class Objective:
    """An objective: `sign` is +1 to minimise and -1 to maximise; `worth` is its weight in the knee."""

    name: str
    sign: int = 1
    worth: float | None = None


@dataclass(frozen=True)
class Point:
    """A trial as a point: its number and one value per objective, in their order."""

    number: int
    values: tuple[float, ...]


class Limit(NamedTuple):
    """A limit on the objective `at`; with `level` it must hold with that confidence."""

    at: int
    limit: float
    level: float | None = None


# A point's number, an objective's position and a level -> what its figure is at worst, with that
# confidence.
Bound = Callable[[int, int, float], float]


def beats(a: Point, b: Point, objectives: Sequence[Objective]) -> bool:
    """Return whether `a` dominates `b`: nowhere worse and somewhere better."""
    differences = [o.sign * (y - x) for o, x, y in zip(objectives, a.values, b.values, strict=True)]
    return min(differences) >= 0 and max(differences) > 0


def pareto(points: Sequence[Point], objectives: Sequence[Objective]) -> list[Point]:
    """Return the points that no other dominates, best first by the first objective; of equals the first."""

    def cost(point: Point) -> tuple[list[float], int]:
        signed = zip(objectives, point.values, strict=True)
        return [o.sign * value for o, value in signed], point.number

    kept: list[Point] = []
    for point in sorted(points, key=cost):  # one that beats it, or equals it, comes before it
        # Of two objectives the last that was kept is the best by the second, so it comes first here.
        rivals = (o.values == point.values or beats(o, point, objectives) for o in reversed(kept))
        if not any(rivals):
            kept.append(point)
    return kept


def choose(
    rule: str, front: Sequence[Point], objectives: Sequence[Objective], bound: Bound | None = None
) -> Point | None:
    """Choose the point of a rule: `knee`, or the best under a limit (`drift<=X`, `rate<=X@95%`).

    The limit of an objective that is maximised is a least value: `rate>=X`. Under a limit on one
    objective the best of the others wins; None when no point keeps the limit. A limit with a level is
    kept by points whose figure keeps it with that confidence, as `bound` says.

    Raises:
        ConfigError: the rule does not parse or names no objective.
    """
    found = parse_rule(rule, objectives)
    if not front:
        return None
    if found is None:
        return knee(front, objectives)
    at, limit, level = found
    sign = objectives[at].sign

    def figure(point: Point) -> float:
        known = None if level is None or bound is None else bound(point.number, at, level)
        return point.values[at] if known is None else known

    kept = [p for p in front if sign * figure(p) <= sign * limit]
    others = [i for i in range(len(objectives)) if i != at]
    return min(
        kept,
        key=lambda p: (
            [objectives[i].sign * p.values[i] for i in others],
            sign * p.values[at],
            p.number,
        ),
        default=None,
    )


def parse_rule(rule: str, objectives: Sequence[Objective]) -> Limit | None:
    """Parse a rule to its limit, or None for the knee.

    Raises:
        ConfigError: the rule does not parse or names no objective.
    """
    if rule == "knee":
        return None
    match = _LIMIT.match(rule)
    names = [o.name for o in objectives]
    if match is None:
        raise ConfigError(
            f"cannot select by {rule!r:.80}: use knee, drift<=X, rate<=X or rate<=X@95%"
        )
    name = _SHORT.get(match[1], match[1])
    if name not in names:
        raise ConfigError(f"cannot select by {match[1]!r}: the objectives are {', '.join(names)}")
    at = names.index(name)
    fitting = "<=" if objectives[at].sign > 0 else ">="
    if match[2] != fitting:
        raise ConfigError(
            f"cannot select by {rule!r}: a limit on {match[1]} is {match[1]}{fitting}X"
        )
    try:
        limit = float(match[3])
    except ValueError:
        raise ConfigError(f"cannot select by {rule!r}: {match[3]!r} is not a number") from None
    if name in SHARES and not 0 <= limit <= 1:
        raise ConfigError(f"cannot select by {rule!r}: {match[3]} is not a share, 0.05 is 5 %")
    return Limit(at, limit, None if match[4] is None else _level(match[4], rule))


def _level(percent: str, rule: str) -> float:
    try:
        level = float(percent) / 100
    except ValueError:
        level = 0.0
    if not 0.5 < level < 1:
        raise ConfigError(
            f"cannot select by {rule!r}: the confidence is more than 50 % and less than 100 %"
        )
    return level


def knee(front: Sequence[Point], objectives: Sequence[Objective]) -> Point:
    """Find the knee of the front: the least sum of the objectives, each divided by its worth.

    Worth says how much of an objective weighs as much as a whole unit of behaviour rate (drift: 0.5
    nats per token), so a long front of harmless edits is not cut in the middle. An objective without a
    worth is divided by its range over the front.
    """
    scales = []
    for i, objective in enumerate(objectives):
        spread = max(p.values[i] for p in front) - min(p.values[i] for p in front)
        scales.append(objective.worth or spread or 1.0)

    def cost(point: Point) -> tuple[float, int]:
        weighed = zip(objectives, point.values, scales, strict=True)
        return sum(o.sign * value / scale for o, value, scale in weighed), point.number

    return min(front, key=cost)


def hypervolume(front: Sequence[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Compute the area that a two-objective front (both minimised) dominates up to `reference`."""
    area, right = 0.0, reference[0]
    for x, y in sorted(front, reverse=True):
        if x < right and y < reference[1]:
            # Going left, each point owns the strip up to its right neighbour.
            area += (right - x) * (reference[1] - y)
            right = x
    return area
