"""Search spaces as Optuna sees them: the ranges of the parameters that `profiles` reads. Pure maths.

The directional space, in ranges known to be good with N = L - 1, and the profile of methods that edit
every component alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

# Attention mediates refusal-like behaviours most, and what stands in its place in hybrid models is
# searched alike; MLP strengths below zero mean "leave alone".
_MIXERS = ("attn.o_proj", "linear_attn.out_proj", "mamba.out_proj", "conv.out_proj")
_MAX_WEIGHT = dict.fromkeys(_MIXERS, (0.8, 1.5))
_OTHER_MAX_WEIGHT = (-0.25, 1.5)
_SCOPES = ("global", "per layer")


def distributions(components: tuple[str, ...], layers: int) -> dict[str, BaseDistribution]:
    """Return the search space of a model with these edited components and L layers."""
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


def followers(components: Sequence[str]) -> tuple[str, ...]:
    """List the components that take a share of the edit of attention, or of what replaces attention.

    Empty where no component is of that kind: then all take the whole edit.
    """
    if not any(name in _MAX_WEIGHT for name in components):
        return ()
    return tuple(name for name in components if name not in _MAX_WEIGHT)


def hill(layers: int) -> dict[str, BaseDistribution]:
    """Return the space of one profile over L layers: its peak and its fall, named as in `distributions`."""
    n = layers - 1
    return {
        "max_weight_position": FloatDistribution(0.3 * n, n),
        "min_weight": FloatDistribution(0.0, 1.0),
        "min_weight_distance": FloatDistribution(min(1.0, 0.8 * n), max(1.0, 0.8 * n)),
    }
