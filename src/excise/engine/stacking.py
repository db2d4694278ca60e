"""The edits of many candidates on one untouched model, in one batch.

Each row of a batch carries one candidate's edits: a forward hook on every edited writer replaces the
row's output by y' = s * (y - left (right . x)) + shift. Fused experts are computed in `model.experts`,
each token with its own candidate's edit at each of its experts. Weights are never written, so leaving
the context restores the model exactly, whatever ended it.

Shapes: B rows, C candidates, T tokens, O and I a writer's out and in features, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from excise.model.anatomy import Writer
from excise.model.edits import Edit, PackedEdits, pack
from excise.model.experts import ExpertEdits, edited_forward, stack_experts
from excise.model.overrides import replaced_forward

# One candidate: an edit per writer of the anatomy, None where it leaves the writer alone.
CandidateEdits = Sequence[Edit | None]
ORIGINAL: CandidateEdits = ()  # the candidate without edits: the original model, whatever its writers

# Edits gathered per row are kept between decode steps while all of them fit in this many bytes.
_GATHER_BYTES = 256 * 2**20
# Above this rank a copy of the edit for every row costs more than a product per candidate.
_GATHER_RANK = 4


def first_edited(writers: Sequence[Writer], edits: CandidateEdits) -> int:
    """Return the lowest layer that a candidate edits; a large number when it edits none."""
    pairs = zip(writers, edits, strict=True) if edits else ()
    return min((w.layer for w, e in pairs if e is not None), default=1 << 30)


class Stack:
    """The edits of C candidates, packed by writer. Immutable: each batch says what its rows carry."""

    def __init__(self, writers: Sequence[Writer], candidates: Sequence[CandidateEdits]) -> None:
        self.size = len(candidates)
        self._firsts = [first_edited(writers, edits) for edits in candidates]
        self._parts: dict[nn.Module, PackedEdits] = {}
        fused: dict[nn.Module, dict[int, list[Edit | None]]] = {}
        for index, writer in enumerate(writers):
            column = [edits[index] if edits else None for edits in candidates]
            if not any(edit is not None for edit in column):
                continue
            if writer.expert is None:
                self._parts[writer.module] = pack(column, writer.shape, writer.like)
            else:
                fused.setdefault(writer.module, {})[writer.expert] = column
        self._experts: dict[nn.Module, ExpertEdits] = {
            module: stack_experts(module, experts, len(candidates))
            for module, experts in fused.items()
        }

    def first_of(self, candidate: int) -> int:
        """Return the lowest layer that a candidate edits; a large number when it edits none."""
        return self._firsts[candidate]

    @contextmanager
    def applied(self, rows: Sequence[int]) -> Iterator[None]:
        """Run the forward passes in this context with candidate rows[b]'s edits on row b of the batch.

        Outside of it the model is the original. `rows` is sorted.
        """
        batch = _Batch(self._parts, rows)
        hooks = {module: batch.hook(module) for module in self._parts}
        experts = {
            module: _expert_forward(module, edits, batch.rows)
            for module, edits in self._experts.items()
        }
        try:
            for module, hook in hooks.items():
                module.register_forward_hook(hook)
            with replaced_forward(experts, fetched=True):
                yield
        finally:
            # Found by identity, not by handle: an interrupt may strike before a handle is kept.
            for module, hook in hooks.items():
                for key in [k for k, h in module._forward_hooks.items() if h is hook]:
                    del module._forward_hooks[key]


class _Batch:
    """Rows of one batch: which candidate each carries, and the edits gathered for them."""

    def __init__(self, parts: dict[nn.Module, PackedEdits], rows: Sequence[int]) -> None:
        self.rows = torch.tensor(rows)
        self._parts = parts
        first, last = rows[0], rows[-1]
        count, extra = divmod(len(rows), last - first + 1)
        even = not extra and all(r == first + b // count for b, r in enumerate(rows))
        # A range of candidates with as many rows each: their edits are a view.
        self._even = (first, last + 1) if even else None
        # (candidate, first row, end) of each candidate's rows.
        ends = [n for n in range(1, len(rows)) if rows[n] != rows[n - 1]] + [len(rows)]
        self._segments = [
            (rows[start], start, stop) for start, stop in zip([0, *ends], ends, strict=False)
        ]
        self._gathered: dict[nn.Module, PackedEdits] = {}
        self._keep = len(rows) * sum(p.row_bytes for p in parts.values()) <= _GATHER_BYTES

    def hook(self, module: nn.Module) -> Any:
        """Return the forward hook of one writer."""

        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return self._edit(module, args[0], output)

        return hook

    def _edit(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        part = self._parts[module]
        if self._even is not None:
            low, high = self._even
            n = high - low
            return edit_output(
                part.between(low, high),
                x.reshape(n, -1, x.shape[-1]),
                y.reshape(n, -1, y.shape[-1]),
            ).view(y.shape)
        rows = len(self.rows)
        by_row = (x.reshape(rows, -1, x.shape[-1]), y.reshape(rows, -1, y.shape[-1]))
        if part.left.shape[1] > _GATHER_RANK:
            return self._edit_by_candidate(part, *by_row).view(y.shape)
        return edit_output(self._gather(module, x.device), *by_row).view(y.shape)

    def _edit_by_candidate(self, part: PackedEdits, x: Tensor, y: Tensor) -> Tensor:
        """Compute one product per candidate, over its rows of this batch."""
        out = torch.empty_like(y)
        for candidate, start, stop in self._segments:
            out[start:stop] = edit_output(
                part.between(candidate, candidate + 1),
                x[start:stop].reshape(1, -1, x.shape[-1]),
                y[start:stop].reshape(1, -1, y.shape[-1]),
            ).view_as(out[start:stop])
        return out

    def _gather(self, module: nn.Module, device: torch.device) -> PackedEdits:
        found = self._gathered.get(module)
        if found is None:
            found = self._parts[module].take(self.rows.to(device))
            if self._keep:
                self._gathered[module] = found
        return found


def _expert_forward(module: nn.Module, edits: ExpertEdits, rows: Tensor) -> Any:
    def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
        return edited_forward(module, edits, rows, *args, **kwargs)

    return forward


def edit_output(part: PackedEdits, x: Tensor, y: Tensor) -> Tensor:
    """Return the edited outputs of N blocks: x (N, T, I), y (N, T, O), and one edit per block."""
    # So transposed, a thin product per block is several times faster on a CPU.
    coefficients = torch.bmm(part.right.mT, x.mT).mT  # (N, T, R)
    if part.left.shape[1] == 1:
        out = torch.addcmul(y, coefficients, part.left, value=-1.0)
    else:
        out = torch.baddbmm(y, coefficients, part.left, alpha=-1.0)
    if part.scale is not None:
        out.mul_(part.scale[:, None])
    return out if part.shift is None else out.add_(part.shift[:, None])
