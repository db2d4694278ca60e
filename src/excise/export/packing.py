"""Pack edited weights again as their scheme stores them: FP8, MXFP4. Pure.

What a scheme can hold is a grid: codes of a sign and a magnitude, times a scale that a block shares. Blocks
that an edit changed get the scale that the scheme's reference gives them; the others keep their bytes.

Rounding to the nearest code would undo much of an edit: the weights lie on the grid already, an edit moves
them by less than a step, and most would fall back to where they were. So the rounding of a column goes down
its rows and takes, of the two codes beside a value, the one that leaves least behind along the edit's own
output directions as well as in the value itself: error feedback, as in sigma-delta conversion, with the
edit's directions as the signal.

Shapes: O and I a writer's out and in features, R the rank of the directions, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from excise.checkpoints.quantisation import scale_layout
from excise.model.edits import Edit

_COLUMNS = 4096  # rounded at a time: a few blocks of memory, whatever the width
_FP4_GROUP = 32


@dataclass(frozen=True)
class Grid:
    """Values that a code of 8 or 4 bits stands for: a sign bit above a magnitude.

    Attributes:
        magnitudes: (N,) the finite ones, from 0 up, each the next code's.
        sign: the bit of negative values.
    """

    magnitudes: Tensor
    sign: int

    @property
    def limit(self) -> float:
        """The largest value."""
        return float(self.magnitudes[-1])

    def nearest(self, x: Tensor) -> Tensor:
        """Return the magnitudes' numbers nearest to |x|; of two as near, the even one."""
        between = (self.magnitudes[1:] + self.magnitudes[:-1]) / 2
        # A tie goes down where the lower number is even: elsewhere the boundary lies just below.
        between[1::2] = torch.nextafter(between[1::2], torch.zeros(()))
        return torch.bucketize(x.abs().contiguous(), between)

    def beside(self, number: Tensor, x: Tensor) -> Tensor:
        """Return the numbers on the other side of |x|: of the two that it lies between, the farther."""
        step = torch.where(self.magnitudes[number] < x.abs(), 1, -1)
        return (number + step).clamp(0, len(self.magnitudes) - 1)

    def codes(self, number: Tensor, x: Tensor) -> Tensor:
        """Return the codes (uint8) of the magnitudes with these numbers and the signs of x."""
        return (number + self.sign * torch.signbit(x)).to(torch.uint8)


def _fp8_grid(dtype: torch.dtype) -> Grid:
    every = torch.arange(128, dtype=torch.uint8).view(dtype).float()
    return Grid(every[every.isfinite()], 128)


_FP8 = {dtype: _fp8_grid(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}
_FP4 = Grid(torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]), 8)


@dataclass(frozen=True)
class Repacked:
    """A matrix packed again.

    Attributes:
        values: as they were stored: of the same dtype and shape.
        scales: likewise.
        squares: |error|^2 and |W'|^2 of the packed matrix.
        along: the same of the error and of the edit, along the edit's output directions.
    """

    values: Tensor
    scales: Tensor
    squares: tuple[float, float]
    along: tuple[float, float]


def output_directions(edit: Edit, weight: Tensor) -> Tensor:
    """Return an orthonormal basis (O, R) of what an edit removes from the outputs.

    Edits that keep row norms remove the directions times those norms (`methods.directional_math`), so
    both are in it.
    """
    norms = torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp_min(1e-12)
    both = torch.cat([edit.left.to(weight), edit.left.to(weight) / norms], dim=1)
    u, s, _ = torch.linalg.svd(both.double(), full_matrices=False)
    basis: Tensor = u[:, s > 1e-6 * s.max()].to(weight)
    return basis


def repack_fp8(
    edited: Tensor, values: Tensor, scales: Tensor, block: tuple[int, int] | None, basis: Tensor
) -> Repacked:
    """Pack an edited matrix as FP8, with scales of the layout that it had.

    Args:
        edited: W' (O, I) float32.
        values: (O, I) FP8, as stored before.
        scales: of it, as `checkpoints.dequantise.fp8` takes them.
        block: (b, c), where the configuration gives it.
        basis: (O, R) from `output_directions`.
    """
    o, i = edited.shape
    layout = scale_layout(values.shape, scales.shape, block)
    sides = {"one": (o, i), "rows": (1, i), "blocks": block}[layout or "one"]
    assert sides is not None
    grid = _FP8[values.dtype]
    old = scales.float().reshape(-(-o // sides[0]), -(-i // sides[1]))
    before = values.float() * _spread(old, sides, (o, i))
    changed = _of_blocks(edited != before, sides, torch.any)
    new = _of_blocks(edited.abs(), sides, torch.amax) / grid.limit
    new = _like(scales, torch.where(new > 0, new, old))
    kept = torch.where(changed, new, old)
    spread = _spread(kept, sides, (o, i))
    again = _spread(changed, sides, (o, i))
    codes, found = _rounded(grid, edited, spread, basis)
    stored = torch.where(again, codes, values.view(torch.uint8))
    return Repacked(
        stored.view(values.dtype),
        kept.to(scales.dtype).reshape(scales.shape),
        *_errors(torch.where(again, found, before), edited, before, basis),
    )


def repack_mxfp4(edited: Tensor, blocks: Tensor, scales: Tensor, basis: Tensor) -> Repacked:
    """Pack an edited matrix as MXFP4 (OCP Microscaling Formats 1.0).

    The exponent of a group of 32 is that of the specification, floor(log2(largest)) - 2, or the next one
    where the largest would be cut and rounding is nearer with it.

    Args:
        edited: W' (O, 32 G) float32.
        blocks: (O, G, 16) bytes of two values each, as stored before, the low half first.
        scales: (O, G) exponents of two with bias 127.
        basis: (O, R) from `output_directions`.
    """
    o, i = edited.shape
    sides = (1, _FP4_GROUP)
    pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1).reshape(o, i)
    table = torch.cat([_FP4.magnitudes, -_FP4.magnitudes])
    before = table[pairs.int()] * _spread(_power(scales), sides, (o, i))
    changed = _of_blocks(edited != before, sides, torch.any)
    largest = _of_blocks(edited.abs(), sides, torch.amax)
    low = (torch.frexp(largest).exponent - 3).clamp(-127, 127)
    apart = [_nearest_error(edited, low + more, sides) for more in (0, 1)]
    best = low + (apart[1] < apart[0]).int()
    exponents = torch.where(largest > 0, best.clamp(-127, 127) + 127, scales.int())
    kept = torch.where(changed, exponents, scales.int()).to(torch.uint8)
    again = _spread(changed, sides, (o, i))
    codes, found = _rounded(_FP4, edited, _spread(_power(kept), sides, (o, i)), basis)
    stored = torch.where(again, codes, pairs).reshape(o, -1, 16, 2)
    return Repacked(
        stored[..., 0] | stored[..., 1] << 4,
        kept,
        *_errors(torch.where(again, found, before), edited, before, basis),
    )


def _rounded(grid: Grid, edited: Tensor, scales: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix with error feedback; return its codes and what they stand for (O, I).

    What is left behind along the directions counts as much as what is left in the values: a row's share
    of a direction is about one in O, so the former is weighed by O / R.
    """
    codes = torch.empty(edited.shape, dtype=torch.uint8)
    found = torch.empty_like(edited)
    weight = len(basis) / max(1, basis.shape[1])
    for first in range(0, edited.shape[1], _COLUMNS):
        span = slice(first, first + _COLUMNS)
        w, s = edited[:, span], scales[:, span]
        x = w / s
        near = grid.nearest(x)
        beside = grid.beside(near, x)
        sign = torch.where(torch.signbit(x), -s, s)
        reached = [grid.magnitudes[number] * sign for number in (near, beside)]
        left = [w - values for values in reached]
        behind = basis.new_zeros(basis.shape[1], w.shape[1])
        for row, share in enumerate(basis):
            now, other = left[0][row], left[1][row]
            # |behind + share d|^2 weight + d^2, compared for the two d.
            slope = 2 * (share @ behind) * weight
            bend = float(share @ share) * weight + 1
            take = slope * other + bend * other.square() < slope * now + bend * now.square()
            behind += share[:, None] * torch.where(take, other, now)
            near[row] = torch.where(take, beside[row], near[row])
            reached[0][row] = torch.where(take, reached[1][row], reached[0][row])
        codes[:, span] = grid.codes(near, x)
        found[:, span] = reached[0]
    return codes, found


def _nearest_error(x: Tensor, exponents: Tensor, sides: tuple[int, int]) -> Tensor:
    """Return the squared error (O, G) of the nearest FP4 values under these exponents."""
    scale = _spread(_two_to(exponents), sides, tuple(x.shape))
    reached = _FP4.magnitudes[_FP4.nearest(x / scale)] * scale
    return _of_blocks((x.abs() - reached).square(), sides, torch.sum)


def _errors(
    found: Tensor, edited: Tensor, before: Tensor, basis: Tensor
) -> tuple[tuple[float, float], tuple[float, float]]:
    def square(x: Tensor) -> float:
        return float(x.double().square().sum())

    error = found - edited
    return (
        (square(error), square(edited)),
        (square(basis.mT @ error), square(basis.mT @ (edited - before))),
    )


def _power(exponents: Tensor) -> Tensor:
    return _two_to(exponents.int() - 127)


def _two_to(exponents: Tensor) -> Tensor:
    return torch.ldexp(torch.ones(exponents.shape), exponents)


def _like(scales: Tensor, new: Tensor) -> Tensor:
    """Return new scales as numbers that the old ones' dtype holds; powers of two where those were."""
    old = scales.float()
    if bool((torch.frexp(old).mantissa == 0.5).all()):
        new = _two_to(torch.ceil(torch.log2(new)).int())
    floor = torch.finfo(scales.dtype).tiny
    return new.clamp_min(floor).to(scales.dtype).float()


def _of_blocks(x: Tensor, sides: tuple[int, int], reduce: Callable[..., Tensor]) -> Tensor:
    """Reduce a matrix (O, I) to one value for each block, the last of which may be cut."""
    o, i = x.shape
    b, c = sides
    whole = torch.nn.functional.pad(x, (0, -i % c, 0, -o % b))
    tiles = whole.view(-(-o // b), b, -(-i // c), c)
    return reduce(reduce(tiles, 3), 1)


def _spread(scales: Tensor, sides: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """Repeat one value of each block over the matrix (O, I)."""
    wide = scales.repeat_interleave(sides[0], 0).repeat_interleave(sides[1], 1)
    return wide[: shape[0], : shape[1]]
