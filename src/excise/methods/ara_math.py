"""Arbitrary-rank ablation (ARA): the published objective, solved in reduced coordinates. Pure maths.

Of one writer W (O, I), with X_c and X_t its inputs at the contrast and target prompts' last token and
Y = X W^T, minimise over W'

    w_p mean((X_c W'^T - Y_c)^2) + w_s [D_k(X_t W'^T, Y_c) - c D_k(X_t W'^T, Y_t)]

where D_k is the mean Euclidean distance to the k nearest rows. Where a keep set's inputs X_k and outputs
Y_k stand beside the contrast prompts', the first mean is half of each set's. W' = M, or
W' = n * rownormalise(M) with n the row norms of W. The gradient in M lies in the span of the captured
inputs, apart from each row's own direction where norms are kept, which changes nothing. So with Q (S, I)
orthonormal rows that span the inputs, M = W_perp + C Q with W_perp fixed: outputs need only C and
Z = X Q^T, and the rows' norms only |W_perp|^2 + |C|^2. S is at most the number of prompts where plain
coordinates have I.

For c > 1 without kept norms the target term is unbounded below: edits that diverge are refused with a
reason.

Shapes: G writers of one shape, P target, N contrast and K' keep prompts, O and I out and in features, S the
span's dimensions, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from excise.errors import MeasurementError
from excise.methods.lbfgs import Minimum, minimise
from excise.model.edits import Edit

_SMALLEST = 1e-12
# An edit has diverged where its norm is this many times that of the matrix.
RUNAWAY = 10.0


@dataclass(frozen=True)
class AraPoint:
    """Parameters that a candidate gives every writer that it edits."""

    preserve: float  # w_p
    steer: float  # w_s
    overshoot: float  # c
    neighbours: int  # k


@dataclass(frozen=True)
class AraStats:
    """Statistics of G writers of one shape, prepared once.

    Attributes:
        basis: (G, S, I) orthonormal rows that span the inputs, or None where they span everything.
        start: (G, O, S) W in the basis.
        outside: (G, O) squared norms of the rows' parts outside the basis; zeros without a basis.
        norms: (G, O) row norms of W.
        target, contrast: (G, P, S) and (G, N, S) inputs in the basis.
        target_out, contrast_out: (G, P, O) and (G, N, O) outputs without bias, less `centre`.
        centre: (G, 1, O) mean contrast output: distances do not change with it, and rounding is less.
        biases: (G, O), or None.
        keep_norms: W' has the row norms of W.
        keep: (G, K', S) inputs of the keep set in the basis, or None.
        keep_out: (G, K', O) outputs of the keep set, as the others are, or None.
    """

    basis: Tensor | None
    start: Tensor
    outside: Tensor
    norms: Tensor
    target: Tensor
    contrast: Tensor
    target_out: Tensor
    contrast_out: Tensor
    centre: Tensor
    biases: Tensor | None
    keep_norms: bool
    keep: Tensor | None = None
    keep_out: Tensor | None = None

    def take(self, members: Tensor) -> AraStats:
        """Select the statistics of some of the writers."""

        def of(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[members]

        return AraStats(
            of(self.basis),
            self.start[members],
            self.outside[members],
            self.norms[members],
            self.target[members],
            self.contrast[members],
            self.target_out[members],
            self.contrast_out[members],
            self.centre[members],
            of(self.biases),
            self.keep_norms,
            of(self.keep),
            of(self.keep_out),
        )


def prepare(
    weights: Tensor,
    target: Tensor,
    contrast: Tensor,
    basis: Tensor | None,
    biases: Tensor | None,
    *,
    keep_norms: bool,
    keep: Tensor | None = None,
) -> AraStats:
    """Prepare the statistics of weights (G, O, I) with inputs (G, P, I), (G, N, I) and `keep` (G, K', I).

    `basis` (G, S, I) must span the inputs; None works in plain coordinates, S = I.
    """
    squares = weights.square().sum(-1)
    start = weights if basis is None else weights @ basis.mT
    outside = (squares - start.square().sum(-1)).clamp_min(0)
    t, c = ((x if basis is None else x @ basis.mT) for x in (target, contrast))
    target_out, contrast_out = t @ start.mT, c @ start.mT
    centre = contrast_out.mean(1, keepdim=True)
    if keep is not None and basis is not None:
        keep = keep @ basis.mT
    return AraStats(
        basis,
        start,
        torch.zeros_like(outside) if basis is None else outside,
        squares.sqrt(),
        t,
        c,
        target_out - centre,
        contrast_out - centre,
        centre,
        biases,
        keep_norms,
        keep,
        None if keep is None else keep @ start.mT - centre,
    )


def objective(stats: AraStats, c: Tensor, point: AraPoint) -> Tensor:
    """Evaluate the objective (G,) at coordinates c (G, O, S); differentiable."""
    matrix = scales(stats, c)[..., None] * c
    kept = stats.contrast @ matrix.mT - stats.centre
    moved = stats.target @ matrix.mT - stats.centre
    preserve = (kept - stats.contrast_out).square().mean((1, 2))
    if stats.keep is not None and stats.keep_out is not None:
        others = stats.keep @ matrix.mT - stats.centre
        preserve = (preserve + (others - stats.keep_out).square().mean((1, 2))) / 2
    away = nearest_distance(moved, stats.contrast_out, point.neighbours)
    home = nearest_distance(moved, stats.target_out, point.neighbours)
    return point.preserve * preserve + point.steer * (away - point.overshoot * home)


def scales(stats: AraStats, c: Tensor) -> Tensor:
    """Return the row scales of M (G, O): ones, or those that restore the row norms of W."""
    if not stats.keep_norms:
        return torch.ones_like(stats.norms)
    return stats.norms / (stats.outside + c.square().sum(-1)).clamp_min(_SMALLEST).sqrt()


def nearest_distance(rows: Tensor, others: Tensor, k: int) -> Tensor:
    """Return the mean Euclidean distance (G,) of rows (G, P, O) to their k nearest of others (G, N, O)."""
    sizes = rows.square().sum(-1)[:, :, None] + others.square().sum(-1)[:, None]
    squares = torch.baddbmm(sizes, rows, others.mT, alpha=-2.0)  # (G, P, N)
    near = squares.topk(min(k, others.shape[1]), dim=-1, largest=False).values
    # At distance 0, that of a row that has not moved, the root has no gradient.
    floor = 1e-6 * others.detach().square().sum(-1).mean(1)[:, None, None] + _SMALLEST
    return (near.clamp_min(0) + floor).sqrt().mean((1, 2))


def solve(stats: AraStats, point: AraPoint, iterations: int) -> Minimum:
    """Minimise the objective, starting from W: coordinates (G, O * S), one problem per writer."""
    shape = stats.start.shape[1:]

    def evaluate(flat: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        part = stats if len(numbers) == len(stats.start) else stats.take(numbers)
        with torch.enable_grad():
            c = flat.view(-1, *shape).detach().requires_grad_()
            values = objective(part, c, point)
            (gradient,) = torch.autograd.grad(values.sum(), c)
        return values.detach(), gradient.flatten(1)

    return minimise(evaluate, stats.start.flatten(1), iterations=iterations)


def build(
    stats: AraStats, members: list[int], point: AraPoint, iterations: int, names: list[str]
) -> list[Edit]:
    """Build the edits of the writers `members`; `names` are theirs, for messages.

    Raises:
        MeasurementError: an edit diverged.
    """
    part = stats.take(torch.tensor(members, device=stats.start.device))
    with torch.inference_mode(mode=False):
        found = solve(part, point, iterations)
    c = found.points.view_as(part.start)
    change = c - part.start
    factor = scales(part, c)
    moved = torch.linalg.vector_norm((factor[..., None] * c - part.start).flatten(1), dim=1)
    whole = torch.linalg.vector_norm(part.norms, dim=1)
    for name, share in zip(names, (moved / whole.clamp_min(_SMALLEST)).tolist(), strict=True):
        if not share <= RUNAWAY:  # true for NaN
            raise MeasurementError(
                f"ara: the edit of {name} diverged: its change is {share:.3g} times the matrix "
                f"(overshoot {point.overshoot:.3g}; above 1 the objective has no least value)"
            )
    out, span = change.shape[1:]
    eye = torch.eye(min(out, span), dtype=c.dtype, device=c.device)
    if out <= span:  # factors of the smaller rank
        left = eye.expand(len(c), *eye.shape)
        right = -change if part.basis is None else -change @ part.basis
    else:
        left = -change
        right = part.basis if part.basis is not None else eye.expand(len(c), *eye.shape)
    edits = []
    for g in range(len(c)):
        scale = factor[g] if part.keep_norms else None
        shift = None
        if scale is not None and part.biases is not None:
            shift = part.biases[g] * (1 - scale)
        edits.append(Edit(left[g], right[g], scale, shift))
    return edits
