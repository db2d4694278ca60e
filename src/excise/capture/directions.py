"""Directions from residuals: pure maths, no model.

Shapes: L layers, D residual width. Means are over prompts, of the residual stream after each layer at
the last prompt token. Method: difference of means, Arditi et al. 2024 (arXiv:2406.11717). The projected
form removes the component along the contrast mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from excise.errors import MeasurementError

_TINY = 1e-12
_ROUNDING = 1e-5  # share of a residual's norm by which means of equal tokens differ at most


@dataclass(frozen=True)
class Boundary:
    """Halfway between two sets of prompts, on the direction of the layer that separates them most.

    Attributes:
        layer: the one where their means lie furthest apart, in standard deviations.
        at: the projection halfway between the means there; target prompts lie above.
    """

    layer: int
    at: float


@dataclass(frozen=True)
class Directions:
    """Unit difference of means and unit contrast mean of every layer.

    Attributes:
        unit: (L, D) float32, normalised target mean - contrast mean after each layer.
        contrast: (L, D) float32, normalised contrast mean after each layer.
        projected: remove the component along the contrast mean of the layer that is edited.
        boundary: between the direction prompts; None where they were not captured in this process.
    """

    unit: Tensor
    contrast: Tensor
    projected: bool = False
    boundary: Boundary | None = None

    def at(self, layer: int, index: float | None) -> Tensor:
        """Return the direction (D,) used at `layer`: its own, or the one at a float `index`.

        A float index f takes normalise(lerp(unit[floor f], unit[ceil f], frac f)).
        """
        weights = mixture(layer if index is None else index, self.unit.shape[0])
        v = sum(weight * self.unit[row] for row, weight in weights)
        assert isinstance(v, Tensor)
        v = normalise(v)
        if self.projected:
            m = self.contrast[layer]
            v = normalise(v - (v @ m) * m)
        return v


def mixture(index: float, layers: int) -> list[tuple[int, float]]:
    """Split a float index into (row, weight) pairs: one pair at a whole number, else two."""
    low = min(max(int(index), 0), layers - 1)
    high, fraction = min(low + 1, layers - 1), float(index) - low
    if fraction <= 0.0 or high == low:
        return [(low, 1.0)]
    return [(low, 1.0 - fraction), (high, fraction)]


def from_means(target: Tensor, contrast: Tensor, *, projected: bool = False) -> Directions:
    """Compute directions from the mean residuals (L, D) of target and contrast prompts.

    Layers whose means differ by no more than rounding (a short convolution sees only the template's last
    tokens) take the direction of the next layer above whose means do differ.

    Raises:
        MeasurementError: a mean is not finite, or the two sets do not differ after the last layer.
    """
    if not bool(torch.isfinite(target).all() and torch.isfinite(contrast).all()):
        raise MeasurementError(
            "residuals are not finite: the model overflows in this dtype; try --set model.dtype=float32"
        )
    difference = target.double() - contrast.double()
    sizes = difference.norm(dim=-1)
    equal = sizes <= (_ROUNDING * contrast.double().norm(dim=-1)).clamp_min(_TINY)
    if bool(equal[-1]):
        layer = int(equal.nonzero()[0])
        raise MeasurementError(
            f"target and contrast residuals are equal after layer {layer}: no direction separates them"
        )
    for layer in reversed(range(len(sizes) - 1)):
        if equal[layer]:
            difference[layer] = difference[layer + 1]
    return Directions(
        normalise(difference).float(), normalise(contrast.double()).float(), projected
    )


def boundary_of(target: Tensor, contrast: Tensor) -> Boundary:
    """Find the boundary between projections (P, L) and (N, L) on each layer's direction."""
    means = [side.double().mean(0) for side in (target, contrast)]
    spread = sum(side.double().var(0, correction=0) for side in (target, contrast))
    assert isinstance(spread, Tensor)
    apart = (means[0] - means[1]) / (spread / 2).sqrt().clamp_min(_TINY)
    layer = int(apart.argmax())
    return Boundary(layer, float(means[0][layer] + means[1][layer]) / 2)


def normalise(x: Tensor) -> Tensor:
    """Return x / |x| along the last axis."""
    size: Tensor = x.norm(dim=-1, keepdim=True)
    return x / size.clamp_min(_TINY)


def winsorise(x: Tensor, quantile: float) -> Tensor:
    """Clamp each row's |x| at its own `quantile`. x: (..., D)."""
    size = x.shape[-1]
    rank = min(max(round(quantile * (size - 1)), 0), size - 1)
    limit = x.abs().kthvalue(rank + 1, dim=-1, keepdim=True).values
    return x.clamp(-limit, limit)


def auc(target: Tensor, contrast: Tensor) -> float:
    """Compute the area under the ROC curve: the probability that a target value exceeds a contrast value.

    Ties count half. Both are one-dimensional.
    """
    wins = (target[:, None] > contrast[None, :]).double()
    ties = (target[:, None] == contrast[None, :]).double()
    return float((wins + 0.5 * ties).mean())
