"""The region of interest, and what the sampler is told of a score. Pure maths.

A front runs from edits that change nothing to edits that leave nothing, and nobody wants either end. A
sampler that is told the scores as they are spends most of a search on the end that is easier to extend.
So it is told where in the region that people consider a trial lies, from 0 at its best edge to 1 at its
worst, KL divergence on a logarithmic scale; and what lies outside by one objective is told as so much
worse by the others. The scores that are recorded, and the front, are those that were measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from excise.search.pareto import SHARES, Objective

FLOOR, CEILING = 1e-5, 0.5  # of KL divergence, nats per token: nobody minds less, or wants more
HALF = 0.5  # of the original's behaviour rate: what leaves more is no edit
_DIVERGENCES = frozenset({"drift", "drift_first"})
_DIGITS = 6


@dataclass(frozen=True)
class Edges:
    """What counts as best and as just acceptable of one objective; beyond the best nothing is gained."""

    best: float
    worst: float
    log: bool = False

    @property
    def sound(self) -> bool:
        """Whether these can be the edges of a region."""
        numbers = math.isfinite(self.best) and math.isfinite(self.worst) and self.best != self.worst
        return numbers and (not self.log or min(self.best, self.worst) > 0)

    def place(self, value: float) -> float:
        """Return where a value lies: 0 at the best edge or beyond it, 1 at the worst, more outside."""
        best, worst = self.best, self.worst
        if self.log:
            best, worst, value = math.log(best), math.log(worst), math.log(max(value, best))
        return max(0.0, (value - best) / (worst - best))


@dataclass(frozen=True)
class Region:
    """The region of interest: edges for every objective, in their order."""

    edges: tuple[Edges, ...]

    def told(self, values: Sequence[float]) -> tuple[float, ...]:
        """Return what the sampler is told of a trial; less is better, of every objective.

        Within the region it is where the trial lies. How far it lies outside by one objective is added to
        every other: what is gained by leaving the region is lost again.
        """
        places = [edge.place(value) for edge, value in zip(self.edges, values, strict=True)]
        beyond = [max(0.0, place - 1.0) for place in places]
        outside = sum(beyond)
        return tuple(
            round(place + outside - own, _DIGITS) for place, own in zip(places, beyond, strict=True)
        )

    def holds(self, values: Sequence[float]) -> bool:
        """Return whether a trial lies in the region."""
        return all(e.place(v) <= 1.0 for e, v in zip(self.edges, values, strict=True))


def region_of(objectives: Sequence[Objective], original: Mapping[str, float]) -> Region | None:
    """Return the region of interest of a search; None where it is not known of some objective.

    Args:
        objectives: those of the search.
        original: what the original model scores, by the objectives' names.
    """
    edges = [_edges(objective, original.get(objective.name, 0.0)) for objective in objectives]
    known = [one for one in edges if one is not None]
    return Region(tuple(known)) if len(known) == len(edges) else None


def _edges(objective: Objective, original: float) -> Edges | None:
    name, least = objective.name, objective.sign > 0
    if name in _DIVERGENCES and least:
        return Edges(FLOOR, CEILING, log=True)
    if name not in SHARES:
        return None
    best, worst = (0.0, 1.0) if least else (1.0, 0.0)
    if name == "behaviour_rate":
        worst = best + HALF * (original - best)
    return None if worst == best else Edges(best, worst)
