"""Directional ablation in closed form: statistics prepared once, then any candidate's edits. Pure maths.

Shapes: G writers of one shape, U distinct bases, O and I out and in features, L layers, R rank.

With n = row norms of W, W^ = W / n, u the unit vector removed from the writer's output,
a = u^T W^ (I), p = W^ a (O), l the strength:

    none   W' = W - l u (u^T W)
    pre    W' = W - l (n*u) a^T
    full   W' = diag(s) (W - l (n*u) a^T),   s = (1 - 2 l u*p + l^2 u*u |a|^2)^(-1/2)

"full" equals normalising the rows of W^ - l u a^T and restoring their norms. Where the output passes
an RMS norm with gain g before it is added, u = normalise(g*v), because
v . (g*y/rms) = (g*v) . y / rms. Because u, a and p are linear in the direction, statistics prepared
once for every layer's direction give any candidate's edits in O(O + I) per writer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from excise.capture.directions import Directions, mixture
from excise.config import RowNorms
from excise.model.edits import Edit

_SMALLEST = 1e-12


@dataclass(frozen=True)
class GroupStats:
    """Statistics of G writers of one shape, prepared once.

    Row i < L of a basis belongs to layer i's direction, row L to the contrast mean of the writer's
    own layer; both carry the post-norm gain.

    Attributes:
        layers: (G,) the writers' layers.
        shared: (G,) which of the U bases is the writer's; experts of a layer share one.
        basis: (U, L+1, O).
        images: (G, L+1, I) basis @ W^, or basis @ W for row norms "none".
        returns: (G, L+1, O) images @ W^^T.
        gram: (U, L+1, L+1) float64 Gram matrices of the bases.
        image_gram: (G, L+1, L+1) float64 Gram matrices of the images.
        norms: (G, O) row norms of W.
        bias: (G, O), or None.
    """

    layers: Tensor
    shared: Tensor
    basis: Tensor
    images: Tensor
    returns: Tensor
    gram: Tensor
    image_gram: Tensor
    norms: Tensor
    bias: Tensor | None
    row_norms: RowNorms
    directions: Directions


@dataclass(frozen=True)
class GroupEdits:
    """Edits of G writers of one shape: `left` (G, O), `right` (G, I), `scale` and `shift` (G, O)."""

    left: Tensor
    right: Tensor
    scale: Tensor | None
    shift: Tensor | None

    def one(self, g: int) -> Edit:
        """Return the g-th writer's edit."""
        scale = None if self.scale is None else self.scale[g]
        shift = None if self.shift is None else self.shift[g]
        return Edit(self.left[g][:, None], self.right[g][None, :], scale, shift)


def prepare(
    weights: list[Tensor],
    layers: list[int],
    directions: Directions,
    *,
    row_norms: RowNorms = "full",
    gains: list[Tensor | None] | None = None,
    biases: list[Tensor | None] | None = None,
) -> GroupStats:
    """Prepare the statistics of G writers of one shape.

    Args:
        weights: (O, I) each.
        layers: each writer's layer.
        directions: of all layers.
        row_norms: "none", "pre" or "full", as above.
        gains: (O,) of each writer's post-norms, or None.
        biases: (O,) each, or None.
    """
    bases: dict[tuple[int, int], Tensor] = {}
    shared, parts = [], []
    for g, (weight, layer) in enumerate(zip(weights, layers, strict=True)):
        gain = gains[g] if gains else None
        key = (layer, id(gain))
        if key not in bases:
            bases[key] = _basis(weight, layer, directions, gain)
        shared.append(list(bases).index(key))
        parts.append(_prepare_one(weight, bases[key], row_norms))
    basis = torch.stack(list(bases.values()))
    images, returns, norms = (torch.stack(part) for part in zip(*parts, strict=True))
    bias = None
    if biases and any(b is not None for b in biases):
        bias = torch.stack(
            [
                torch.zeros_like(n) if b is None else b.to(n)
                for b, n in zip(biases, norms, strict=True)
            ]
        )
    return GroupStats(
        layers=torch.tensor(layers),
        shared=torch.tensor(shared),
        basis=basis,
        images=images,
        returns=returns,
        gram=_gram(basis),
        image_gram=_gram(images),
        norms=norms,
        bias=bias,
        row_norms=row_norms,
        directions=directions,
    )


def _basis(weight: Tensor, layer: int, directions: Directions, gain: Tensor | None) -> Tensor:
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows = torch.cat([directions.unit, directions.contrast[layer][None]])  # (L+1, O)
    rows = rows.to(weight.device, dtype)
    return rows if gain is None else rows * gain.to(rows)


def _prepare_one(
    weight: Tensor, basis: Tensor, row_norms: RowNorms
) -> tuple[Tensor, Tensor, Tensor]:
    w = weight.to(basis)
    norms = w.norm(dim=1)
    unit = w if row_norms == "none" else w / norms.clamp_min(_SMALLEST)[:, None]
    images = basis @ unit
    return images, images @ unit.T, norms


def _gram(rows: Tensor) -> Tensor:
    return torch.stack([r @ r.T for r in rows.cpu().double()])


def build(stats: GroupStats, index: float | None, strengths: Tensor) -> GroupEdits:
    """Build the edits that remove `strengths` (G,) of the direction at `index` (None: each layer's own)."""
    coefficients = _coefficients(stats, index)  # (G, L+1) float64, at most three per row
    c = coefficients[:, None, :]
    gram = stats.gram[stats.shared]
    size = (c @ gram @ c.mT).flatten().clamp_min(_SMALLEST).to(stats.basis)  # (G,) |g*v|^2
    raw_u = _mix(stats.basis, stats.shared, stats, index, coefficients)  # (G, O), |.|^2 = size
    own = torch.arange(len(stats.layers))
    raw_a = _mix(stats.images, own, stats, index, coefficients)  # (G, I)
    lam = strengths.to(stats.basis)
    if stats.row_norms == "none":
        left = (lam / size)[:, None] * raw_u
        return GroupEdits(left, raw_a, None, _bias_shift(stats, raw_u, size, lam, None))
    left = (lam / size)[:, None] * (stats.norms * raw_u)
    if stats.row_norms == "pre":
        return GroupEdits(left, raw_a, None, _bias_shift(stats, raw_u, size, lam, None))
    raw_p = _mix(stats.returns, own, stats, index, coefficients)  # (G, O)
    a_squared = (c @ stats.image_gram @ c.mT).flatten().to(size)  # (G,) times size
    square = 1.0 - (2.0 * lam / size)[:, None] * raw_u * raw_p
    square = square + (lam * lam * a_squared / (size * size))[:, None] * raw_u * raw_u
    scale = square.clamp_min(_SMALLEST).rsqrt()
    return GroupEdits(left, raw_a, scale, _bias_shift(stats, raw_u, size, lam, scale))


def _bias_shift(
    stats: GroupStats, raw_u: Tensor, size: Tensor, lam: Tensor, scale: Tensor | None
) -> Tensor | None:
    """Remove a bias's component along u; undo the row scale for it, which is for the matrix."""
    b = stats.bias
    if b is None:
        return None
    shift = -((lam / size) * (raw_u * b).sum(-1))[:, None] * raw_u
    return shift if scale is None else shift + b - scale * b


def _coefficients(stats: GroupStats, index: float | None) -> Tensor:
    """Return each writer's direction as weights over its basis (G, L+1)."""
    writers, rows = len(stats.layers), stats.basis.shape[1]
    out = torch.zeros(writers, rows, dtype=torch.float64)
    for g, layer in enumerate(stats.layers.tolist()):
        for row, weight in mixture(layer if index is None else index, rows - 1):
            out[g, row] = weight
    if stats.directions.projected:
        unit, contrast = (
            stats.directions.unit.double().cpu(),
            stats.directions.contrast.double().cpu(),
        )
        own = contrast[stats.layers]  # (G, D)
        out[:, -1] = -((out[:, :-1] @ unit) * own).sum(-1)  # v - (v . m) m, m a unit vector
    return out


def _mix(
    rows: Tensor, which: Tensor, stats: GroupStats, index: float | None, coefficients: Tensor
) -> Tensor:
    """Compute coefficients @ rows[which] from the rows that count alone: (U, L+1, X) -> (G, X)."""
    if index is None:
        out = rows[which, stats.layers]
    else:
        (low, _), *high = mixture(index, rows.shape[1] - 1)
        out = rows[which, low]
        if high:
            out = torch.lerp(out, rows[which, high[0][0]], high[0][1])
    if stats.directions.projected:
        out = out + coefficients[:, -1:].to(rows) * rows[which, -1]
    return out
