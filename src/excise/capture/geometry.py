"""Describe target and contrast residuals layer by layer: norms, separation, effective rank. Pure maths.

Shapes: P target and N contrast prompts, L layers, D residual width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from sklearn.metrics import silhouette_score
from torch import Tensor

from excise.capture.directions import auc, normalise


@dataclass(frozen=True)
class LayerGeometry:
    """One layer's residuals at the last prompt token.

    Attributes:
        layer: 0 is the first layer's output.
        target_norm, contrast_norm: mean norm of the residuals.
        difference_norm: norm of the difference of the means.
        cosine: between the two means.
        silhouette: mean silhouette of the two sets, -1 to 1 (Rousseeuw 1987).
        auc: probability that a target residual lies further along the difference of means.
        effective_rank: of the target residuals less the contrast mean: the exponential of the entropy
            of their squared singular values' shares (after Roy and Vetterli 2007). One where they all
            lie along one direction.
    """

    layer: int
    target_norm: float
    contrast_norm: float
    difference_norm: float
    cosine: float
    silhouette: float
    auc: float
    effective_rank: float

    def as_dict(self) -> dict[str, float]:
        """Return the figures for JSON and the record."""
        return {k: v if k == "layer" else round(float(v), 6) for k, v in asdict(self).items()}


def describe_layers(target: Tensor, contrast: Tensor) -> list[LayerGeometry]:
    """Compute the geometry of residuals (P, L, D) and (N, L, D), layer by layer."""
    return [
        _layer(number, target[:, number].double(), contrast[:, number].double())
        for number in range(target.shape[1])
    ]


def _layer(number: int, target: Tensor, contrast: Tensor) -> LayerGeometry:
    t, c = target.mean(0), contrast.mean(0)
    direction = normalise(t - c)
    labels = [1] * len(target) + [0] * len(contrast)
    # A silhouette needs two sets and more points than sets.
    enough = min(len(target), len(contrast)) >= 2
    rows = torch.cat([target, contrast]).numpy()
    return LayerGeometry(
        layer=number,
        target_norm=float(target.norm(dim=1).mean()),
        contrast_norm=float(contrast.norm(dim=1).mean()),
        difference_norm=float((t - c).norm()),
        cosine=float(normalise(t) @ normalise(c)),
        silhouette=float(silhouette_score(rows, labels)) if enough else 0.0,
        auc=auc(target @ direction, contrast @ direction),
        effective_rank=effective_rank(target - c),
    )


def effective_rank(rows: Tensor) -> float:
    """Return exp(entropy) of the shares of the squared singular values of rows (P, D)."""
    square = torch.linalg.svdvals(rows).square()
    share = square / square.sum().clamp_min(1e-300)
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum()))
