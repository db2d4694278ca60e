"""Fused experts, computed with each token's own edit at each of its experts.

The experts of a layer are one module with 3-D weights: (E, O, I), or (E, I, O) as in gpt-oss and
Llama 4. Their own code sums over experts, so an edit of one expert's output must happen inside:
`edited_forward` repeats the computation of Transformers' `use_experts_implementation` modules (and of
Llama 4's, which routes by zeros) with y' = s * (y - left (right . h)) + shift per pair of a token and
an expert, before the routing weights. Equal to merging the edits into the weights.

Shapes: N tokens, K experts per token, S = N K pairs, C candidates, E experts, B rows, R rank,
D residual width, O and I out and in features of an expert's down-projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from excise.model.anatomy import experts_transposed
from excise.model.edits import Edit, PackedEdits, pack
from excise.model.parameters import device_of, present

# Edits are gathered for as many pairs at a time as fit in this many bytes.
_GATHER_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ExpertEdits(PackedEdits):
    """All candidates' edits of one module's experts; matrix c * E + e is candidate c's of expert e."""

    experts: int

    def apply(self, which: Tensor, _token: Tensor, inner: Tensor, y: Tensor) -> Tensor:
        """Return the edited outputs (S, O) for inputs `inner` (S, I) and original outputs `y` (S, O)."""
        per_pair = self.left[0].numel() + self.right[0].numel() + 2 * y.shape[-1]
        step = max(1, _GATHER_BYTES // (per_pair * y.element_size()))
        parts = []
        for start in range(0, len(y), step):
            part = slice(start, start + step)
            rows = which[part]
            coefficients = torch.bmm(inner[part][:, None], self.right[rows])  # (S, 1, R)
            out = y[part] - torch.bmm(coefficients, self.left[rows])[:, 0]
            if self.scale is not None:
                out = out * self.scale[rows]
            parts.append(out if self.shift is None else out + self.shift[rows])
        return torch.cat(parts)


@dataclass(frozen=True)
class ExpertWatch:
    """An observer in place of edits: reports each expert's inputs and outputs, and changes nothing.

    `see` gets the expert (S,), the token (S,), the input (S, I) and the output (S, O) of every pair
    that was routed.
    """

    see: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    experts: int

    def apply(self, which: Tensor, token: Tensor, inner: Tensor, y: Tensor) -> Tensor:
        """Report the routed pairs; return the outputs unchanged."""
        routed = inner.any(-1)  # Llama 4 gives every expert every token, zeros where not routed
        self.see(which[routed], token[routed], inner[routed], y[routed])
        return y


def stack_experts(
    module: Any, edits: Mapping[int, Sequence[Edit | None]], candidates: int
) -> ExpertEdits:
    """Pack the edits of C candidates, given by expert, in the module's dtype and on its device."""
    weight: Tensor = module.down_proj
    experts = weight.shape[0]
    o, i = (
        weight.shape[1:] if not experts_transposed(module) else (weight.shape[2], weight.shape[1])
    )
    like = torch.empty(0, dtype=weight.dtype, device=device_of(module, "down_proj"))
    flat = [
        edits[expert][candidate] if expert in edits else None
        for candidate in range(candidates)
        for expert in range(experts)
    ]
    return ExpertEdits(**vars(pack(flat, (o, i), like)), experts=experts)


def edited_forward(
    module: Any,
    edits: ExpertEdits | ExpertWatch,
    rows: Tensor,
    hidden_states: Tensor,
    *routing: Any,
    **more: Any,
) -> Tensor:
    """Run the module's forward with candidate rows[b]'s edits on the tokens of row b.

    `routing` are the experts (N, K) and their weights (N, K) of every token; Llama 4 has none.
    """
    with present(module, "down_proj"):
        return _edited(module, edits, rows, hidden_states, *routing, **more)


def _edited(
    module: Any,
    edits: ExpertEdits | ExpertWatch,
    rows: Tensor,
    hidden_states: Tensor,
    *routing: Any,
    **more: Any,
) -> Tensor:
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    if not routing and not more:
        return _every_expert(module, edits, rows, x).view(hidden_states.shape)
    index, weights = routing if routing else (more["top_k_index"], more["top_k_weights"])
    n, k = index.shape
    assert len(x) == n, "one routing per token"
    assert n % len(rows) == 0, "tokens are not whole rows"
    order = index.flatten().argsort(stable=True)
    expert, token = index.flatten()[order], order // k
    ends = torch.bincount(expert, minlength=edits.experts).cumsum(0).tolist()
    inner = _inner(module, x[token], expert, ends)
    y = _linear(module, "down_proj", inner, expert, ends)
    candidate = rows.to(x.device).repeat_interleave(n // len(rows))[token]
    y = edits.apply(candidate * edits.experts + expert, token, inner, y)
    y = y * weights.flatten()[order][:, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    total: Tensor = y[back].view(n, k, -1).sum(1).to(hidden_states.dtype)
    return total.view(*hidden_states.shape[:-1], total.shape[-1])


def _inner(module: Any, x: Tensor, expert: Tensor, ends: list[int]) -> Tensor:
    """Return the inputs of the down-projections (S, I), pairs sorted by expert."""
    if module.has_gate:
        gated: Tensor = module._apply_gate(_linear(module, "gate_up_proj", x, expert, ends))
        return gated
    activated: Tensor = module.act_fn(_linear(module, "up_proj", x, expert, ends))
    return activated


def _linear(module: Any, name: str, x: Tensor, expert: Tensor, ends: list[int]) -> Tensor:
    """Multiply each pair by its expert's matrix; `ends` are where each expert's pairs stop."""
    weight: Tensor = getattr(module, name)  # (E, out, in), or (E, in, out) where transposed
    matrices = weight if module.is_transposed else weight.mT
    spans = zip([0, *ends], ends, strict=False)
    parts = [x[a:b] @ matrices[number] for number, (a, b) in enumerate(spans) if b > a]
    out = torch.cat(parts)
    return out + getattr(module, f"{name}_bias")[expert] if module.has_bias else out


def _every_expert(module: Any, edits: ExpertEdits | ExpertWatch, rows: Tensor, x: Tensor) -> Tensor:
    """Run Llama 4's experts: all tokens for each (E N, D), zeros where not routed."""
    experts = edits.experts
    gate, up = torch.bmm(x.view(experts, -1, x.shape[-1]), module.gate_up_proj).chunk(2, dim=-1)
    inner = up * module.act_fn(gate)  # (E, N, I)
    y = torch.bmm(inner, module.down_proj)
    n = y.shape[1]
    candidate = rows.to(x.device).repeat_interleave(n // len(rows)).repeat(experts)
    expert = torch.arange(experts, device=x.device).repeat_interleave(n)
    token = torch.arange(n, device=x.device).repeat(experts)
    which = candidate * experts + expert
    return edits.apply(which, token, inner.flatten(0, 1), y.flatten(0, 1))
