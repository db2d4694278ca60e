"""Many candidates' edits on one untouched model, in one batch.

Rows of a batch belong to candidates; a hook on every edited writer gives each row its own
candidate's output, y' = s * (y - left (right . x)) + shift. Fused experts compute their tokens in
`experts`, with each token's own candidate's edit at each of its experts. The weights are never
written, so leaving the context restores the model exactly, whatever ended it.

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

# Edits gathered per row are kept between decode steps while all of them fit in this many bytes.
_GATHER_BYTES = 256 * 2**20
# Above this rank a copy of the edit for every row costs more than a product per candidate.
_GATHER_RANK = 4


def first_edited(writers: Sequence[Writer], edits: CandidateEdits) -> int:
    """The lowest layer that a candidate edits; a large number when it edits none."""
    layers = (w.layer for w, e in zip(writers, edits, strict=True) if e is not None)
    return min(layers, default=1 << 30)


class Stack:
    """The edits of C candidates, and which candidate each row of the next forward pass carries."""

    def __init__(self, writers: Sequence[Writer], candidates: Sequence[CandidateEdits]) -> None:
        self.size = len(candidates)
        self._writers = writers
        touched = [
            index
            for index in range(len(writers))
            if any(edits[index] is not None for edits in candidates)
        ]
        self._firsts = [first_edited(writers, edits) for edits in candidates]
        self._parts = {
            index: pack(
                [edits[index] for edits in candidates], writers[index].shape, writers[index].like
            )
            for index in touched
            if writers[index].expert is None
        }
        fused: dict[nn.Module, dict[int, list[Edit | None]]] = {}
        for index in touched:
            expert = writers[index].expert
            if expert is not None:
                experts = fused.setdefault(writers[index].module, {})
                experts[expert] = [edits[index] for edits in candidates]
        self._experts: dict[nn.Module, ExpertEdits] = {
            module: stack_experts(module, experts, len(candidates))
            for module, experts in fused.items()
        }
        self._gathered: dict[int, PackedEdits] = {}
        self._rows: Tensor | None = None
        self._blocks: tuple[int, int] | None = None
        self._segments: list[tuple[int, int, int]] = []
        self._keep = False
        self._paused = False

    def first_of(self, candidate: int) -> int:
        """The lowest layer that a candidate edits; a large number when it edits none."""
        return self._firsts[candidate]

    def select(self, rows: Sequence[int]) -> None:
        """Row b of the following passes carries candidate rows[b]; rows are sorted by candidate."""
        self._gathered.clear()
        self._rows = torch.tensor(rows)
        first, last = rows[0], rows[-1]
        count, extra = divmod(len(rows), last - first + 1)
        even = not extra and all(r == first + b // count for b, r in enumerate(rows))
        self._blocks = (first, last + 1) if even else None
        # (candidate, first row, end) of each candidate's rows.
        ends = [n for n in range(1, len(rows)) if rows[n] != rows[n - 1]] + [len(rows)]
        self._segments = [
            (rows[start], start, stop) for start, stop in zip([0, *ends], ends, strict=False)
        ]
        self._keep = len(rows) * sum(p.row_bytes for p in self._parts.values()) <= _GATHER_BYTES

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the writers' outputs are the candidates'."""
        hooks = {self._writers[index].module: self._hook(index) for index in self._parts}
        experts = {module: self._expert_forward(module) for module in self._experts}
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
            self._gathered.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context, inside `applied`, the model is the original again."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _expert_forward(self, module: nn.Module) -> Any:
        def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
            if self._paused:
                original: Tensor = type(module).forward(module, *args, **kwargs)
                return original
            assert self._rows is not None
            return edited_forward(module, self._experts[module], self._rows, *args, **kwargs)

        return forward

    def _hook(self, index: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output if self._paused else self._apply(index, args[0], output)

        return hook

    def _apply(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        part = self._parts[index]
        if self._blocks is not None:
            low, high = self._blocks
            n = high - low
            return edit_output(
                part.between(low, high),
                x.reshape(n, -1, x.shape[-1]),
                y.reshape(n, -1, y.shape[-1]),
            ).view(y.shape)
        rows = len(part.left) if self._rows is None else len(self._rows)
        by_row = (x.reshape(rows, -1, x.shape[-1]), y.reshape(rows, -1, y.shape[-1]))
        if part.left.shape[1] > _GATHER_RANK:
            return self._by_candidate(part, *by_row).view(y.shape)
        return edit_output(self._gather(index, part, x.device), *by_row).view(y.shape)

    def _by_candidate(self, part: PackedEdits, x: Tensor, y: Tensor) -> Tensor:
        """One product per candidate, over the rows that it has in this pass."""
        out = torch.empty_like(y)
        for candidate, start, stop in self._segments:
            out[start:stop] = edit_output(
                part.between(candidate, candidate + 1),
                x[start:stop].reshape(1, -1, x.shape[-1]),
                y[start:stop].reshape(1, -1, y.shape[-1]),
            ).view_as(out[start:stop])
        return out

    def _gather(self, index: int, part: PackedEdits, device: torch.device) -> PackedEdits:
        found = self._gathered.get(index)
        if found is None:
            assert self._rows is not None
            found = part.take(self._rows.to(device))
            if self._keep:
                self._gathered[index] = found
        return found


def edit_output(part: PackedEdits, x: Tensor, y: Tensor) -> Tensor:
    """Edited outputs of blocks: x (N, T, I), y (N, T, O), and one edit per block."""
    # So transposed, a thin product per block is several times faster on a CPU.
    coefficients = torch.bmm(part.right.mT, x.mT).mT  # (N, T, R)
    if part.left.shape[1] == 1:
        out = torch.addcmul(y, coefficients, part.left, value=-1.0)
    else:
        out = torch.baddbmm(y, coefficients, part.left, alpha=-1.0)
    if part.scale is not None:
        out.mul_(part.scale[:, None])
    return out if part.shift is None else out.add_(part.shift[:, None])
