"""Search spaces: candidate <-> parameters, as Optuna sees them. Pure.

The directional one in ranges known to be good, with N = L - 1, and the profile of methods that
edit every component alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from excise.methods.profiles import Profile

# Attention mediates refusal-like behaviours most, and what stands in its place in hybrid models is
# searched alike; MLP strengths below zero mean "leave alone".
_MIXERS = ("attn.o_proj", "linear_attn.out_proj", "mamba.out_proj", "conv.out_proj")
_MAX_WEIGHT = dict.fromkeys(_MIXERS, (0.8, 1.5))
_OTHER_MAX_WEIGHT = (-0.25, 1.5)
_SCOPES = ("global", "per layer")
MOST_REFINED = 2.0
_SHARE = ".share"


@dataclass(frozen=True)
class Candidate:
    """One point of the space. `index` None means that every layer uses its own direction.

    `refined` holds strengths layer by layer, component -> (L), in place of the profiles'.
    """

    index: float | None
    profiles: dict[str, Profile]
    refined: dict[str, tuple[float, ...]] | None = None

    def strength(self, component: str, layer: int) -> float:
        """Strength of the edit of `component` at `layer`."""
        if self.refined is not None:
            return self.refined[component][layer]
        return self.profiles[component].strength(layer)


def distributions(components: tuple[str, ...], layers: int) -> dict[str, BaseDistribution]:
    """The space of a model with these edited components and L layers."""
    n = layers - 1
    space: dict[str, BaseDistribution] = {
        "direction_scope": CategoricalDistribution(_SCOPES),
        "direction_index": FloatDistribution(0.4 * n, 0.9 * n),
    }
    for name in components:
        low, high = _MAX_WEIGHT.get(name, _OTHER_MAX_WEIGHT)
        space[f"{name}.max_weight"] = FloatDistribution(low, high)
        space[f"{name}.max_weight_position"] = FloatDistribution(0.6 * n, n)
        space[f"{name}.min_weight"] = FloatDistribution(0.0, 1.0)
        space[f"{name}.min_weight_distance"] = FloatDistribution(
            min(1.0, 0.6 * n), max(1.0, 0.6 * n)
        )
    return space


def from_params(params: Mapping[str, Any]) -> Candidate:
    """The candidate that these parameters name."""
    components = dict.fromkeys(key.rpartition(".")[0] for key in params if "." in key)
    refined = {name: _refined(params, name) for name in components}
    return Candidate(
        refined=refined if all(refined.values()) else None,
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


def layer_key(component: str, layer: int) -> str:
    """The parameter that holds a refined strength."""
    return f"{component}.layer_{layer}"


def refined_distribution() -> BaseDistribution:
    """What a refined strength may be."""
    return FloatDistribution(0.0, MOST_REFINED)


def _refined(params: Mapping[str, Any], component: str) -> tuple[float, ...]:
    layers: list[float] = []
    while (key := layer_key(component, len(layers))) in params:
        layers.append(float(params[key]))
    return tuple(layers)


def followers(components: Sequence[str]) -> tuple[str, ...]:
    """The components that go a share of the way of attention, or of what stands in its place.

    None where nothing stands there: then all go the whole way.
    """
    if not any(name in _MAX_WEIGHT for name in components):
        return ()
    return tuple(name for name in components if name not in _MAX_WEIGHT)


def share_key(component: str) -> str:
    """The parameter that holds a follower's share."""
    return component + _SHARE


def shares_of(params: Mapping[str, Any]) -> dict[str, float]:
    """Follower -> its share of the way; below 0 means 0."""
    found = {key: float(value) for key, value in params.items() if key.endswith(_SHARE)}
    return {key.removesuffix(_SHARE): max(0.0, share) for key, share in found.items()}


def hill(layers: int) -> dict[str, BaseDistribution]:
    """Where over L layers one profile peaks, and how it falls, in the names of `distributions`."""
    n = layers - 1
    return {
        "max_weight_position": FloatDistribution(0.3 * n, n),
        "min_weight": FloatDistribution(0.0, 1.0),
        "min_weight_distance": FloatDistribution(min(1.0, 0.8 * n), max(1.0, 0.8 * n)),
    }


def hill_of(params: Mapping[str, Any]) -> Profile:
    """The profile, of peak 1, that parameters of `hill` name."""
    return Profile(
        max_weight=1.0,
        max_weight_position=float(params["max_weight_position"]),
        min_weight=float(params["min_weight"]),
        min_weight_distance=float(params["min_weight_distance"]),
    )
