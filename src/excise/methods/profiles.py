"""Profiles and candidates: from a trial's parameters to the edit's strength at every layer. Pure maths.

Knows neither Optuna nor torch, so reports can load it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SHARE = ".share"


@dataclass(frozen=True)
class Profile:
    """Strength of one component per layer: highest at the peak, falling linearly, then zero.

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
        """Return the strength at `layer`: max + d/distance (min - max) up to the distance d, 0 beyond."""
        peak = max(self.max_weight, 0.0)
        distance = abs(layer - self.max_weight_position)
        if peak == 0.0 or distance > self.min_weight_distance:
            return 0.0
        share = distance / self.min_weight_distance if self.min_weight_distance > 0 else 0.0
        return peak + share * (self.min_weight * peak - peak)

    def strengths(self, layers: int) -> list[float]:
        """Return the strength at each of `layers` layers."""
        return [self.strength(layer) for layer in range(layers)]


@dataclass(frozen=True)
class Candidate:
    """One point of the directional search space.

    Attributes:
        index: float direction index; None means that every layer uses its own direction.
        profiles: component -> its profile.
    """

    index: float | None
    profiles: dict[str, Profile]

    def strength(self, component: str, layer: int) -> float:
        """Return the strength of the edit of `component` at `layer`."""
        return self.profiles[component].strength(layer)


def from_params(params: Mapping[str, Any]) -> Candidate:
    """Make the candidate that these parameters name."""
    components = dict.fromkeys(key.rpartition(".")[0] for key in params if "." in key)
    return Candidate(
        index=float(params["direction_index"]) if params["direction_scope"] == "global" else None,
        profiles={
            name: Profile(
                max_weight=float(params[f"{name}.max_weight"]),
                max_weight_position=float(params[f"{name}.max_weight_position"]),
                min_weight=float(params[f"{name}.min_weight"]),
                min_weight_distance=float(params[f"{name}.min_weight_distance"]),
            )
            for name in components
        },
    )


def share_key(component: str) -> str:
    """Return the name of the parameter that holds a component's share."""
    return component + _SHARE


def shares_of(params: Mapping[str, Any]) -> dict[str, float]:
    """Read the components' shares, component -> share; below 0 means 0."""
    found = {key: float(value) for key, value in params.items() if key.endswith(_SHARE)}
    return {key.removesuffix(_SHARE): max(0.0, share) for key, share in found.items()}


def hill_of(params: Mapping[str, Any]) -> Profile:
    """Read the profile, of peak 1, that parameters of `hill` name."""
    return Profile(
        max_weight=1.0,
        max_weight_position=float(params["max_weight_position"]),
        min_weight=float(params["min_weight"]),
        min_weight_distance=float(params["min_weight_distance"]),
    )
