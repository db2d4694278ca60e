"""From a component's few parameters to its strength at every layer: pure maths."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """Strength of one component per layer: highest at `position`, falling linearly, then zero.

    Attributes:
        max_weight: strength at the peak; negative values of the search space mean zero.
        max_weight_position: the peak's layer, a float in [0, L-1].
        min_weight: share of `max_weight` that is left at the edge, in [0, 1].
        min_weight_distance: distance from the peak beyond which the strength is zero, in layers.
    """

    max_weight: float
    max_weight_position: float
    min_weight: float
    min_weight_distance: float

    def strength(self, layer: int) -> float:
        """Strength at `layer`: max + d/distance (min - max) up to the distance d, 0 beyond."""
        peak = max(self.max_weight, 0.0)
        distance = abs(layer - self.max_weight_position)
        if peak == 0.0 or distance > self.min_weight_distance:
            return 0.0
        share = distance / self.min_weight_distance if self.min_weight_distance > 0 else 0.0
        return peak + share * (self.min_weight * peak - peak)

    def strengths(self, layers: int) -> list[float]:
        """Strength at each of `layers` layers."""
        return [self.strength(layer) for layer in range(layers)]
