"""Ridge ablation: an edit of arbitrary rank in closed form. Pure maths, no model.

A regularised least-squares problem in the manner of MEMIT (Meng et al. 2022, arXiv:2210.07229). Of one
writer W (O, I): X (P, I) and Y (P, O) are its inputs and outputs at the target prompts' last token, and
N (P, O) the mean of each one's k nearest contrast outputs. S_keep (I, I) is the second moment of its
inputs where responses that must stay are written, S_prompt the same over the tokens of their prompts,
S_first at those prompts' last token; m is the mean diagonal of S_keep. With the goals R = s (N - Y),
K = S_keep + p S_prompt + f S_first + e m 1 and A = K + (r/P) X^T X, the edit is

    delta W = (r/P) R^T X A^-1,

which minimises tr(D K D^T) + (r/P) |X D^T - R|^2 over D. s = 1 + c removes the behaviour and a
negative s strengthens it.

Two regularisers keep the goals from fitting the prompts instead of the behaviour. A share h of every row
of R is replaced by the mean of all rows: what all targets have in common. And R is replaced by its best
approximation of rank R_max, which bounds the edit's rank too: with R = U B, U (P, R_max) orthonormal, the
edit is the product of B^T and (r/P) U^T X A^-1.

All of it happens in a basis Q of input space with orthonormal rows. Where Q spans input space the
result is the plain one. Where it does not, D = C Q is the minimiser among the edits whose rows lie in
Q, because the objective is then the same one in the coordinates C.

Shapes: G writers of one shape, P target and N contrast prompts, O and I out and in features, Q rows of
the basis, R rank, K neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from excise.errors import MeasurementError
from excise.model.edits import Edit

# Largest relative residual of a solution; above it, float64 tries again.
_RESIDUAL = 1e-4
_SMALLEST = 1e-12


@dataclass(frozen=True)
class RidgePoint:
    """Parameters that a candidate gives every writer that it edits."""

    strength: float  # r
    overshoot: float  # s: 1 + c, or negative
    neighbours: int  # k
    damping: float  # e
    first: float  # f
    prompts: float  # p
    shared: float  # h
    rank: int  # R_max


@dataclass(frozen=True)
class RidgeStats:
    """Statistics of G writers of one shape, prepared once.

    Attributes:
        basis: (G, Q, I) orthonormal rows, or None where Q is all of input space.
        keep: (G, Q, Q) S_keep in the basis.
        prompts: (G, Q, Q) S_prompt in the basis.
        first: (G, Q, Q) S_first in the basis.
        target: (G, P, Q) inputs at the target prompts' last token, in the basis.
        gram: (G, Q, Q) their second moment, X^T X / P.
        weights: (G, O, Q) the matrices in the basis.
        squares: (G, O) squared row norms of the matrices.
        outputs: (G, P, O) outputs at the target prompts' last token.
        contrast: (G, N, O) outputs at the contrast prompts' last token.
        nearest: (G, P, K) indices of the nearest contrast outputs, nearest first.
        mean_diagonal: (G,) mean diagonal of S_keep over all of input space.
        biases: (G, O), or None.
        restore_norms: restore every row's norm.
    """

    basis: Tensor | None
    keep: Tensor
    prompts: Tensor
    first: Tensor
    target: Tensor
    gram: Tensor
    weights: Tensor
    squares: Tensor
    outputs: Tensor
    contrast: Tensor
    nearest: Tensor
    mean_diagonal: Tensor
    biases: Tensor | None
    restore_norms: bool


def nearest(outputs: Tensor, contrast: Tensor, most: int) -> Tensor:
    """Find the `most` nearest contrast outputs (G, N, O) of every target output (G, P, O): (G, P, K)."""
    most = min(most, contrast.shape[1])
    found: Tensor = torch.cdist(outputs, contrast).topk(most, dim=-1, largest=False).indices
    return found  # (G, P, K)


def goals(stats: RidgeStats, members: Tensor, point: RidgePoint) -> tuple[Tensor, Tensor]:
    """Factor the goals as U (g, P, R) and B (g, R, O): every target output should move by its row of U B.

    k and the rank are clipped to the number of prompts.

    Raises:
        MeasurementError: the captured outputs are not finite.
    """
    chosen = stats.nearest[members][:, :, : point.neighbours]  # (g, P, k)
    contrast, outputs = stats.contrast[members], stats.outputs[members]
    share = outputs.new_zeros(*chosen.shape[:2], contrast.shape[1])
    share.scatter_(2, chosen, 1.0 / chosen.shape[2])
    own = share @ contrast - outputs
    whole = point.overshoot * own.lerp(own.mean(1, keepdim=True), point.shared)
    g, p = whole.shape[:2]
    if point.shared >= 1:
        return whole.new_ones(g, p, 1), whole[:, :1]
    if point.rank >= p:
        return torch.eye(p, dtype=whole.dtype, device=whole.device).expand(g, p, p), whole
    try:
        _, vectors = torch.linalg.eigh(whole @ whole.mT)  # ascending
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise MeasurementError(
            "ridge: the goals cannot be cut to their rank: captured outputs are not finite"
        ) from None
    u = vectors[..., -point.rank :]
    return u, u.mT @ whole


def deltas(stats: RidgeStats, members: Tensor, point: RidgePoint) -> tuple[Tensor, Tensor]:
    """Solve for delta W of the writers `members` (g,), in the basis: left (g, O, R) and right (g, R, Q).

    Raises:
        MeasurementError: a system is singular, even in float64, or what was captured is not finite.
    """
    u, b = goals(stats, members, point)
    x = stats.target[members]
    system = stats.keep[members] + point.first * stats.first[members]
    system = system.add_(stats.prompts[members], alpha=point.prompts)
    system = system.add_(stats.gram[members], alpha=point.strength)
    diagonal = point.damping * stats.mean_diagonal[members]
    system.diagonal(dim1=1, dim2=2).add_(diagonal[:, None])
    solved = solve(system, x.mT @ u)  # (g, Q, R)
    return b.mT, (point.strength / x.shape[1]) * solved.mT


def build(
    stats: RidgeStats, members: list[int], point: RidgePoint, shares: Sequence[float]
) -> list[Edit]:
    """Build the edits of the writers `members`, each at the smallest rank that is sure to hold it.

    Args:
        stats: of the group.
        members: numbers of writers within it.
        point: parameters of all of them.
        shares: for each of them, the share of its goals that it is moved by.

    Raises:
        MeasurementError: a system is singular, or the edit is not finite.
    """
    index = torch.tensor(members, device=stats.keep.device)
    left, right = deltas(stats, index, point)
    left = left * left.new_tensor(list(shares))[:, None, None]  # delta W is linear in R
    if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise MeasurementError("ridge: the edit is not finite: the captured inputs are too large")
    scale, shift = None, None
    if stats.restore_norms:
        before = stats.squares[index]
        moved = 2 * stats.weights[index] @ right.mT + left @ (right @ right.mT)  # (g, O, R)
        after = before + (moved * left).sum(-1)
        scale = (before / after.clamp_min(_SMALLEST)).sqrt()
        if stats.biases is not None:  # the row scale is not for the bias: undo it
            shift = stats.biases[index] * (1 - scale)
    out, q = left.shape[1], right.shape[2]
    if min(out, q) < left.shape[2]:
        delta = left @ right
        eye = torch.eye(min(out, q), dtype=delta.dtype, device=delta.device)
        eye = eye.expand(len(members), *eye.shape)
        left, right = (eye, delta) if out <= q else (delta, eye)
    if stats.basis is not None:
        right = right @ stats.basis[index]
    return [
        Edit(
            -left[g],
            right[g],
            None if scale is None else scale[g],
            None if shift is None else shift[g],
        )
        for g in range(len(members))
    ]


def solve(system: Tensor, right: Tensor) -> Tensor:
    """Solve system^-1 right for symmetric positive definite systems (g, n, n) and right (g, n, m).

    By Cholesky factorisation, in the dtype given; where the residual is too large, again in float64.

    Raises:
        MeasurementError: not even float64 solves it.
    """
    found = _attempt(system, right)
    if found is None and system.dtype != torch.float64:
        found = _attempt(system.double(), right.double())
    if found is None:
        raise MeasurementError(
            "ridge: a linear system is singular: the captured inputs do not tell enough apart; "
            "use more prompts or a larger damping"
        )
    solved: Tensor = found.to(right.dtype)
    return solved


def _attempt(system: Tensor, right: Tensor) -> Tensor | None:
    factor, info = torch.linalg.cholesky_ex(system)
    if bool(info.any()):
        return None
    found: Tensor = torch.cholesky_solve(right, factor)
    left = torch.linalg.vector_norm(torch.baddbmm(right, system, found, beta=-1.0), dim=(1, 2))
    whole = torch.linalg.vector_norm(right, dim=(1, 2))
    # A NaN compares as false and counts as unsolved.
    return found if bool((left <= _RESIDUAL * whole + _SMALLEST).all()) else None


def basis_for(rows: Tensor, size: int) -> Tensor:
    """Compute orthonormal rows (Q, I), Q <= size, that span most of `rows` (N, I).

    Their exact span where it has at most `size` dimensions.
    """
    # QR first: for N rows of I >> N many times faster than a plain SVD, and as exact.
    q, r = torch.linalg.qr(rows.double().T)  # (I, m), (m, N)
    u, s, _ = torch.linalg.svd(r, full_matrices=False)
    kept = int((s > 1e-7 * s[0].clamp_min(_SMALLEST)).sum())
    basis: Tensor = (q @ u[:, : max(1, min(kept, size))]).T.to(rows.dtype)
    return basis.contiguous()
