"""The edit of one writer, and many edits packed for batched products. Pure.

Shapes: N matrices of one shape, O and I their out and in features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Edit:
    """One writer's edit: W' = diag(scale) (W - left right), and the bias b' = scale * b + shift.

    Attributes:
        left: (O, R) float32.
        right: (R, I) float32.
        scale: (O,) float32, or None for ones.
        shift: (O,) float32, or None for zeros; only a writer with a bias has one.
    """

    left: Tensor
    right: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None

    def apply_to_weight(self, weight: Tensor) -> Tensor:
        """Return the edited matrix (O, I) in float32 (float64 stays)."""
        w = weight if weight.dtype == torch.float64 else weight.float()
        edited = w - self.left.to(w) @ self.right.to(w)
        return edited if self.scale is None else self.scale.to(w)[:, None] * edited

    def apply_to_bias(self, bias: Tensor) -> Tensor:
        """Return the edited bias (O,) in float32 (float64 stays)."""
        b = bias if bias.dtype == torch.float64 else bias.float()
        if self.scale is not None:
            b = b * self.scale.to(b)
        return b if self.shift is None else b + self.shift.to(b)

    def apply_to_output(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the edited writer's outputs for inputs x (..., I) and original outputs y (..., O)."""
        out = y - (x @ self.right.to(x).T) @ self.left.to(x).T
        if self.scale is not None:
            out = out * self.scale.to(out)
        return out if self.shift is None else out + self.shift.to(out)


@dataclass(frozen=True)
class PackedEdits:
    """Edits of N matrices of one shape, padded to one rank and transposed for products on activations."""

    left: Tensor  # (N, R, O)
    right: Tensor  # (N, I, R)
    scale: Tensor | None  # (N, O)
    shift: Tensor | None  # (N, O)

    @property
    def row_bytes(self) -> int:
        """Bytes of one matrix's edit."""
        tensors = (self.left, self.right, self.scale, self.shift)
        return sum(t[0].numel() * t.element_size() for t in tensors if t is not None)

    def between(self, low: int, high: int) -> PackedEdits:
        """Return the edits of the matrices low <= n < high, as views."""
        return self._of(slice(low, high))

    def take(self, which: Tensor) -> PackedEdits:
        """Return copies of the edits of these matrices, one per entry of `which`."""
        return self._of(which)

    def _of(self, which: Tensor | slice) -> PackedEdits:
        return PackedEdits(
            self.left[which],
            self.right[which],
            None if self.scale is None else self.scale[which],
            None if self.shift is None else self.shift[which],
        )


def pack(edits: Sequence[Edit | None], shape: tuple[int, ...], like: Tensor) -> PackedEdits:
    """Pack edits of matrices (O, I), in the dtype and on the device of `like`; None changes nothing."""
    some = [edit for edit in edits if edit is not None]
    rank = max(edit.left.shape[1] for edit in some)
    n, (o, i) = len(edits), shape
    left = like.new_zeros(n, rank, o)
    right = like.new_zeros(n, i, rank)
    scale = like.new_ones(n, o) if any(e.scale is not None for e in some) else None
    shift = like.new_zeros(n, o) if any(e.shift is not None for e in some) else None
    for row, edit in enumerate(edits):
        if edit is None:
            continue
        r = edit.left.shape[1]
        left[row, :r] = edit.left.T
        right[row, :, :r] = edit.right.T
        if scale is not None and edit.scale is not None:
            scale[row] = edit.scale
        if shift is not None and edit.shift is not None:
            shift[row] = edit.shift
    return PackedEdits(left, right, scale, shift)
