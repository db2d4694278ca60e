"""Several directions per layer, found in residuals and removed together. Pure maths, no model.

The first direction of a layer is its difference of means, so a subspace of rank one is that direction.
The others are of one of two kinds. *Principal* ones are the axes along which target residuals vary more
than contrast residuals do: eigenvectors of the difference of the two covariances. *Prototypes* are the
cells of a self-organising map of the target residuals, less the contrast mean (Kohonen 1982). Each is
orthogonalised against the earlier ones.

With U (K, O) orthonormal rows, l (K) strengths, n the row norms of W and W^ = W / n:

    none   W' = W - U^T diag(l) U W
    pre    W' = W - (n*U^T) diag(l) U W^
    full   pre, with every row's norm restored

Shapes: G writers of one shape, P target and N contrast prompts, L layers, K directions, D residual
width, O and I out and in features of a writer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from excise.capture.directions import normalise
from excise.config import RowNorms
from excise.model.edits import Edit

_SMALLEST = 1e-12
_EPOCHS = 30


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormalise rows (..., K, D) by Gram-Schmidt: row j loses its components along the rows before it.

    A row that lies in their span becomes zero, and so removes nothing.
    """
    out: list[Tensor] = []
    for j in range(rows.shape[-2]):
        size = rows[..., j, :].norm(dim=-1, keepdim=True)
        row = normalise(rows[..., j, :])
        for _ in range(2 if out else 0):  # twice, against rounding
            for other in out:
                row = row - (row * other).sum(-1, keepdim=True) * other
        left = row.norm(dim=-1, keepdim=True)
        lost = (left < 1e-5) | (size < _SMALLEST)
        out.append(torch.where(lost, torch.zeros_like(row), row / left.clamp_min(_SMALLEST)))
    return torch.stack(out, dim=-2)


def principal(target: Tensor, contrast: Tensor, first: Tensor, rank: int) -> Tensor:
    """Find principal directions (rank, D) of target (P, D) against contrast (N, D) residuals.

    `first` (D,) comes first; the others are orthogonal to it.
    """
    t, c = (_without(x.double() - x.double().mean(0), first.double()) for x in (target, contrast))
    # Eigenvectors of Ct - Cc lie in the span of the rows: solve there, not in D dimensions.
    basis = torch.linalg.svd(torch.cat([t, c]), full_matrices=False)[2]  # (Q, D)
    t, c = t @ basis.T, c @ basis.T
    difference = t.T @ t / len(t) - c.T @ c / len(c)
    vectors = torch.linalg.eigh(difference)[1].flip(1).T[: rank - 1] @ basis
    # An eigenvector's sign is arbitrary: take the side that target residuals lie on.
    side = (vectors @ (target.double().mean(0) - contrast.double().mean(0))).sign()
    vectors = vectors * torch.where(side == 0, torch.ones_like(side), side)[:, None]
    return orthonormal(torch.cat([first[None].double(), vectors]))


def prototypes(target: Tensor, contrast: Tensor, first: Tensor, rank: int) -> Tensor:
    """Find directions (rank, D) from the contrast mean to the cells of a map of target residuals (P, D).

    The map has `rank` cells, and those that more prompts belong to come first. One cell is left out:
    together the cells make up the mean, which the first direction has already.
    """
    cells, owners = self_organising_map(target.double(), rank)
    hits = torch.bincount(owners, minlength=len(cells))
    order = torch.argsort(hits, descending=True, stable=True)[: rank - 1]
    rows = cells[order] - contrast.double().mean(0)
    return orthonormal(torch.cat([first[None].double(), rows]))


def self_organising_map(points: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Fit a self-organising map to points (P, D): its cells (cells, D), and each point's cell (P,).

    Batch updates on a line of cells laid along the first principal axis. In each pass every cell becomes
    the mean of the points, weighted by how near on the line their own cell is; the width of that
    neighbourhood shrinks from half the line to less than a step. Deterministic.
    """
    centre = points.mean(0)
    axis = torch.linalg.svd(points - centre, full_matrices=False)
    spread = axis[1][0] / len(points) ** 0.5
    ticks = torch.linspace(-1.5, 1.5, cells, dtype=points.dtype) if cells > 1 else torch.zeros(1)
    grid = centre + ticks.to(points)[:, None] * spread * axis[2][0]
    steps = torch.arange(cells, dtype=points.dtype)
    owners = torch.cdist(points, grid).argmin(1)
    for epoch in range(_EPOCHS):
        width = max(cells / 2 * (0.3 / max(cells / 2, 0.3)) ** (epoch / (_EPOCHS - 1)), 0.3)
        near = torch.exp(-((steps[:, None] - steps[owners][None]) ** 2) / (2 * width**2))
        total = near.sum(1, keepdim=True)
        moved = near @ points / total.clamp_min(_SMALLEST)
        grid = torch.where(total > _SMALLEST, moved, grid)
        owners = torch.cdist(points, grid).argmin(1)
    return grid, owners


def _without(rows: Tensor, direction: Tensor) -> Tensor:
    return rows - (rows @ direction)[:, None] * direction


def remove(
    weight: Tensor,
    bias: Tensor | None,
    directions: Tensor,
    strengths: Sequence[float],
    row_norms: RowNorms,
) -> Edit:
    """Build the edit that removes `strengths` (K) of orthonormal `directions` (K, O) from W (O, I)."""
    w = weight if weight.dtype == torch.float64 else weight.float()
    u = directions.to(w)
    lam = torch.tensor(strengths, dtype=w.dtype, device=w.device)
    shift = None if bias is None else -((lam * (u @ bias.to(w))) @ u)
    if row_norms == "none":
        return Edit((lam[:, None] * u).T, u @ w, None, shift)
    n = w.norm(dim=1).clamp_min(_SMALLEST)
    a = (u / n) @ w  # (K, I)
    left = (lam[:, None] * u).T  # (O, K)
    if row_norms == "pre":
        return Edit(n[:, None] * left, a, None, shift)
    p = (w @ a.T) / n[:, None]  # (O, K)
    square = 1 - 2 * (left * p).sum(1) + ((left @ (a @ a.T)) * left).sum(1)
    scale = square.clamp_min(_SMALLEST).rsqrt()
    if bias is not None:
        assert shift is not None
        b = bias.to(w)
        shift = shift + b - scale * b
    return Edit(n[:, None] * left, a, scale, shift)
