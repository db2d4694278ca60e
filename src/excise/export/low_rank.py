"""Approximate edits at low rank, for adapters of every kind.

An edit that keeps row norms scales every row of W by its own factor, so its difference has full rank,
and a low rank only approximates it; the error is stated.

Shapes: O and I a writer's out and in features, R the adapter's rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from excise.config import ExportSection
from excise.errors import ConfigError, ExportError
from excise.events import Notice, OnEvent, ignore, track
from excise.model.anatomy import Writer
from excise.model.edits import Edit

# Up to this many rows or columns the exact decomposition takes well under a second.
_EXACT_SVD = 512
# The randomised one: columns beyond the rank, and power iterations. Row scales leave a slowly
# falling tail of singular values, which is what these are for.
_OVERSAMPLE = 16
_POWER_PASSES = 4
# A bias that moves by less than this share of its largest value has moved by rounding only.
_ROUNDING = 1e-6
# A singular value below this share of the largest one is what float32 makes of zero.
_ZERO = 1e-6


@dataclass(frozen=True)
class Factors:
    """One module of an adapter: B (O, R), A (R, I), and |error|^2 and |difference|^2 of B A."""

    name: str
    b: Tensor
    a: Tensor
    squares: tuple[float, float]


@dataclass(frozen=True)
class AdapterFactors:
    """All modules, and the names of those whose edit also changes a bias, which no LoRA carries."""

    modules: tuple[Factors, ...]
    not_carried: tuple[str, ...]


def check_low_rank(name: str, writers: Sequence[Writer], rank: int | None = None) -> None:
    """Check that the format `name` can hold edits of these writers, at this rank.

    Raises:
        ConfigError: no matrix has such a rank; or some are fused experts, which share a module.
    """
    most = max((min(w.shape[-2:]) for w in writers), default=0)
    if rank is not None and rank > most:
        raise ConfigError(
            f"export.adapter_rank is {rank}, and no edited matrix has a rank above {most}: lower it, or "
            "leave it out"
        )
    fused = dict.fromkeys(w.component for w in writers if w.expert is not None)
    if fused:
        raise ConfigError(
            f"format {name}: an adapter cannot carry edits of fused experts: export "
            f"safetensors, or leave {', '.join(fused)} out of edit.components"
        )


def adapter_factors(
    edits: Mapping[str, Edit], writers: Sequence[Writer], rank: int, on_event: OnEvent = ignore
) -> AdapterFactors:
    """Return the best rank-R approximation of W' - W for each edited matrix.

    Raises:
        ExportError: there is nothing to edit, or a writer's values are not in memory.
        ConfigError: one is a fused expert.
    """
    modules = []
    for writer in writers_of(edits, writers, on_event):
        delta = weight_difference(writer, edits[writer.name])
        b, a = low_rank(delta, rank)
        modules.append(Factors(writer.name, b, a, (square(delta - b @ a), square(delta))))
    chosen = (writer for writer in writers if writer.name in edits)
    not_carried = tuple(w.name for w in chosen if moves_bias(w, edits[w.name]))
    if not_carried:
        on_event(Notice(f"the adapter does not carry the bias edits of {', '.join(not_carried)}"))
    return AdapterFactors(tuple(modules), not_carried)


def writers_of(
    edits: Mapping[str, Edit], writers: Sequence[Writer], on_event: OnEvent
) -> Iterator[Writer]:
    """Yield the writers that are edited, and tell of each.

    Raises:
        ExportError: there is nothing to edit.
        ConfigError: one is a fused expert.
    """
    if not edits:
        raise ExportError("this candidate edits nothing, and an adapter needs something to adapt")
    chosen = [writer for writer in writers if writer.name in edits]
    assert len(chosen) == len(edits), "an edit of a writer that this model does not have"
    check_low_rank("adapter", chosen)
    yield from track(chosen, "export", len(chosen), on_event)


def rank_of(section: ExportSection, edits: Mapping[str, Edit], writers: Sequence[Writer]) -> int:
    """Return the rank that the settings name, else the least that keeps to their error."""
    return section.adapter_rank or rank_for(edits, writers, section.adapter_error)


def rank_for(edits: Mapping[str, Edit], writers: Sequence[Writer], error: float) -> int:
    """Return the least rank whose relative Frobenius error over all modules is at most `error`.

    Raises:
        ExportError: a writer's values are not in memory.
    """
    tails: list[Tensor] = []  # per module: what every rank leaves out, squared, rank 0 first
    for writer in writers:
        if writer.name in edits:
            squares = _singular_squares(weight_difference(writer, edits[writer.name]))
            tails.append(squares.flip(0).cumsum(0).flip(0))
    if not tails:
        return 1
    most = max(map(len, tails))
    left = sum(torch.nn.functional.pad(tail, (0, most + 1 - len(tail))) for tail in tails)
    assert isinstance(left, Tensor)
    small = left <= error**2 * left[0]
    return max(1, int(small.nonzero()[0].item()))


def _singular_squares(delta: Tensor) -> Tensor:
    """Return the squared singular values, largest first, in float64 on the CPU."""
    if min(delta.shape) <= _EXACT_SVD:
        exact: Tensor = torch.linalg.svdvals(delta.double())
        return exact.square().cpu()
    # From the smaller Gram matrix: rounding hides parts below 1e-3 of the whole, which is enough here.
    gram = delta @ delta.mT if delta.shape[0] <= delta.shape[1] else delta.mT @ delta
    values: Tensor = torch.linalg.eigvalsh(gram.double())
    return values.flip(0).clamp_min(0).cpu()


def weight_difference(writer: Writer, edit: Edit) -> Tensor:
    """Compute W' - W (O, I) in float32, without the cancellation of subtracting the two.

    Raises:
        ExportError: the weight is offloaded.
    """
    w = values_of(writer)
    left, right = edit.left.to(w), edit.right.to(w)
    if edit.scale is None:
        return -(left @ right)
    scale = edit.scale.to(w)[:, None]
    return torch.addcmul(-((scale * left) @ right), scale - 1.0, w)


def values_of(writer: Writer) -> Tensor:
    """Return a writer's weight (O, I) in float32.

    Raises:
        ExportError: it is offloaded.
    """
    if writer.weight.is_meta:
        raise ExportError(f"{writer.name} is offloaded: an adapter is made from values in memory")
    return writer.weight.detach().float()


def low_rank(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B (O, R) and A (R, I) whose product is nearest to `delta` (O, I), with equal norms.

    A matrix with fewer than R singular values gets columns and rows of zeros.
    """
    smallest = min(delta.shape)
    if smallest <= _EXACT_SVD:
        u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    else:
        # The random start is drawn apart: the result is a function of the edit, and nobody else's
        # random numbers change.
        with _own_random_numbers(delta.device):
            torch.manual_seed(0)
            q = min(rank + _OVERSAMPLE, smallest)
            u, s, v = torch.svd_lowrank(delta, q=q, niter=_POWER_PASSES)
        vt = v.mT
    kept = min(rank, smallest)
    root = s[:kept].sqrt()
    b, a = delta.new_zeros(delta.shape[0], rank), delta.new_zeros(rank, delta.shape[1])
    b[:, :kept] = u[:, :kept] * root
    a[:kept] = root[:, None] * vt[:kept]
    return b, a


def own_rank(edits: Iterable[Edit]) -> int:
    """Return the least rank at which each of these edits is exact, but for its row scale."""
    return max((len(_singular(edit)[1]) for edit in edits), default=1) or 1


def factors_of_product(edit: Edit, rank: int) -> tuple[Tensor, Tensor]:
    """Return B (O, R) and A (R, I) with B A nearest to -left right, and equal to it from its rank on."""
    u, s, vt = _singular(edit)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    b = edit.left.new_zeros(len(edit.left), rank)
    a = edit.right.new_zeros(rank, edit.right.shape[1])
    b[:, :kept] = -u[:, :kept] * root
    a[:kept] = root[:, None] * vt[:kept]
    return b, a


def _singular(edit: Edit) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (O, R), s (R,) and Vt (R, I) of left right in float64, without what is zero.

    From the QR decompositions of both factors: their product, which may be large, is never formed.
    """
    q_left, r_left = torch.linalg.qr(edit.left.double())
    q_right, r_right = torch.linalg.qr(edit.right.double().mT)
    u, s, vt = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    kept = int((s > _ZERO * s.max()).sum())
    return q_left @ u[:, :kept], s[:kept], vt[:kept] @ q_right.mT


def moves_bias(writer: Writer, edit: Edit) -> bool:
    """Return whether an edit changes a writer's bias by more than rounding."""
    bias = writer.bias
    if bias is None:
        return edit.shift is not None and bool(edit.shift.any())
    before = bias.detach().float()
    change = edit.apply_to_bias(before) - before
    return bool(change.abs().max() > _ROUNDING * before.abs().max())


def square(x: Tensor) -> float:
    """Return |x|^2."""
    return float(x.double().square().sum())


def relative_error(squares: list[tuple[float, float]]) -> float:
    """Return the relative error of these parts together; 0 where nothing changes."""
    error, size = (sum(part) for part in zip(*squares, strict=True))
    return math.sqrt(error / size) if size else 0.0


def _own_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """Return a context whose random numbers are nobody else's, on the CPU and on this device."""
    others = [] if device.type == "cpu" else [device]
    return torch.random.fork_rng(others, device_type=device.type)
