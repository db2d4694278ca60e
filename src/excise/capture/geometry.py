"""Where target and contrast residuals lie, layer by layer. Pure maths, no model.

Shapes: P target and N contrast prompts, L layers, D residual width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from sklearn.metrics import silhouette_score
from torch import Tensor

from excise.capture.directions import auc, normalise
from excise.errors import ConfigError
from excise.model.overrides import threads

Projection = Literal["pca", "umap"]
_NEIGHBOURS = 15
_SEED = 0


@dataclass(frozen=True)
class LayerGeometry:
    """One layer's residuals at the last prompt token.

    Attributes:
        layer: 0 is the first layer's output.
        target_norm, contrast_norm: mean norm of the residuals.
        difference_norm: norm of the difference of the means.
        cosine: between the two means.
        silhouette: mean silhouette of the two sets, -1 to 1 (Rousseeuw 1987).
        auc: chance that a target residual lies further along the difference of means.
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
        """For JSON and the record."""
        return {k: v if k == "layer" else round(float(v), 6) for k, v in asdict(self).items()}


def describe_layers(target: Tensor, contrast: Tensor) -> list[LayerGeometry]:
    """Geometry of residuals (P, L, D) and (N, L, D), layer by layer."""
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
    """exp(entropy) of the shares of the squared singular values of rows (P, D)."""
    square = torch.linalg.svdvals(rows).square()
    share = square / square.sum().clamp_min(1e-300)
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum()))


def project(target: Tensor, contrast: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets (P, L, D), (N, L, D) on each layer's first two principal axes: (P, L, 2), (N, L, 2).

    An axis' sign is arbitrary: the target mean is put on its right, so that layers can be compared.
    """
    out: list[tuple[Tensor, Tensor]] = []
    for layer in range(target.shape[1]):
        t, c = target[:, layer].double(), contrast[:, layer].double()
        centre = torch.cat([t, c]).mean(0)
        axes = torch.linalg.svd(torch.cat([t, c]) - centre, full_matrices=False)[2][:2]
        if len(axes) < 2:
            axes = torch.cat([axes, torch.zeros_like(axes)])
        side = (axes @ (t.mean(0) - c.mean(0))).sign()
        axes = axes * torch.where(side == 0, torch.ones_like(side), side)[:, None]
        out.append(((t - centre) @ axes.T, (c - centre) @ axes.T))
    return torch.stack([t for t, _ in out], dim=1), torch.stack([c for _, c in out], dim=1)


def check_projection(name: Projection) -> None:
    """Whether residuals can be projected this way.

    Raises:
        ConfigError: the package that does it is not installed.
    """
    if name == "umap" and find_spec("umap") is None:
        raise ConfigError(
            "--projection umap needs the package umap-learn: pip install 'excise[umap]'"
        )


def embed(target: Tensor, contrast: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets (P, L, D), (N, L, D) by UMAP (McInnes et al. 2018): (P, L, 2), (N, L, 2).

    The first layer begins on its principal axes and every other one where the layer before ended, so
    that points can be followed from layer to layer. Distances between far groups say nothing.
    """
    from umap import UMAP

    split = len(target)
    rows = torch.cat([target, contrast]).double().numpy()  # (P + N, L, D)
    start = torch.cat([points[:, 0] for points in project(target[:, :1], contrast[:, :1])])
    place, out = start.numpy(), []
    neighbours = max(2, min(_NEIGHBOURS, len(rows) - 1))
    with threads(torch.get_num_threads()):  # its libraries change the number for the whole process
        for layer in range(rows.shape[1]):
            fitted = UMAP(n_neighbors=neighbours, init=place, random_state=_SEED, n_jobs=1)
            place = fitted.fit_transform(rows[:, layer])
            out.append(torch.from_numpy(place.copy()))
    both = torch.stack(out, dim=1)
    return both[:split], both[split:]
