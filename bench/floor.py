"""The arithmetic that a trial cannot avoid: floating-point operations of its matrix products.

Counted per token that must pass a layer: 2 per weight of every linear map, 4 x context x heads x head
width for attention; per logit row 2 x D x V. Not counted, because avoidable: padding, layers below
a candidate's first edited one and what stands in that layer before the first edited matrix (their result
is known: in prompts and in what is read, not where tokens are decoded one by one),
what all prompts of a side begin with (once per candidate is nothing), all but keys and values at the
positions that no layer above looks at, and tokens after a verdict is settled. Sliding windows are
ignored, and so are what per-layer embeddings cost in prompts and the edits' own thin products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from excise.engine.stacking import first_edited
from excise.prompts.tokens import beginning


class Costs:
    """Operations per token of one model, by layer."""

    def __init__(self, loaded: Any) -> None:
        self.layers = [_linear(layer) for layer in loaded.anatomy.layers]  # keys and values, others
        # What is left of a layer after its attention, and after the first half of its MLP.
        self.ends = [
            (_after(layer, _MLP), _after(layer, _GATED)) for layer in loaded.anatomy.layers
        ]
        self.attention = [_attention(layer) for layer in loaded.anatomy.layers]
        self.head: int = 2 * loaded.model.get_output_embeddings().weight.numel()
        self.embedding: int = sum(
            2 * m.weight.numel()
            for name, m in loaded.anatomy.backbone.named_children()
            if isinstance(m, nn.Linear)
        )
        config = loaded.model.config
        shared = getattr(config, "num_kv_shared_layers", 0) or 0
        self.trimmed = len(self.layers) - shared

    def prompt(self, length: int, needed: int, first: tuple[int, bool], begun: int) -> float:
        """One row of `length` tokens of which only the last `needed` matter at the end.

        Args:
            length: tokens of the row.
            needed: how many of them matter.
            first: the first edited layer, and whether only what ends its MLP is edited there.
            begun: how many tokens are known, with what the layers make of them.
        """
        total, (lowest, late) = 0.0, first
        for index in range(lowest, len(self.layers)):
            known, others = self.layers[index]
            # Above the last layer with keys and values of its own, no token looks at another's state.
            tokens = needed if index >= self.trimmed - 1 else length - begun
            if index == lowest:
                total += tokens * self.ends[index][late]
            else:
                attention = self.attention[index] * (length - tokens / 2)
                total += (length - begun) * known + tokens * (others + attention)
        return total + needed * self.head

    def step(self, context: int) -> float:
        """One more token at this context length."""
        layers = sum(
            sum(linear) + attention * context
            for linear, attention in zip(self.layers, self.attention, strict=True)
        )
        return self.embedding + layers + self.head


def trial(
    costs: Costs, engine: Any, edits: Sequence[Any], evidence: Any, *, drafted: bool
) -> float:
    """Operations of one candidate's trial, given what it answered.

    `drafted`: its responses were known from other candidates, so they had to be read, not decoded.
    """
    lowest = first_edited(engine.writers, edits)
    begins = [
        w.component for w, e in zip(engine.writers, edits, strict=True) if e and w.layer == lowest
    ]
    first = (lowest, all(component.startswith("mlp.") for component in begins))
    total = 0.0
    begun = {side: len(beginning(prompts)) for side, prompts in engine.prompts.items()}
    for ids, response in zip(engine.prompts["target"], evidence.responses["target"], strict=True):
        # The first token comes with the prompt; the last one is never put in.
        n = len(response.tokens)
        if drafted:
            total += costs.prompt(len(ids) + n - 1, n, first, begun["target"])
        else:
            total += costs.prompt(len(ids), 1, first, begun["target"])
            total += sum(costs.step(len(ids) + i) for i in range(1, n))
    original = engine.original("contrast").responses
    for ids, response in zip(engine.prompts["contrast"], original, strict=True):
        n = len(response.tokens)
        total += costs.prompt(len(ids) + n - 1, n, first, begun["contrast"])
    return total


_MLP = ("self_attn.",)  # what stands before the MLP
_GATED = ("self_attn.", "gate_proj", "up_proj")  # what stands before the matrix that ends it


def _linear(layer: nn.Module) -> tuple[int, int]:
    """Operations of a layer's matrices: of those that make keys and values, of the others."""
    known = sum(
        2 * m.weight.numel() for n, m in _matrices(layer) if n.endswith(("k_proj", "v_proj"))
    )
    return known, _after(layer, ()) - known


def _after(layer: nn.Module, left_out: tuple[str, ...]) -> int:
    """Operations of a layer's matrices whose names hold none of these."""
    return sum(
        2 * m.weight.numel() for n, m in _matrices(layer) if not any(part in n for part in left_out)
    )


def _matrices(layer: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, m) for name, m in layer.named_modules() if isinstance(m, nn.Linear)]


def _attention(layer: nn.Module) -> int:
    """Operations per token of context: scores and weighted values."""
    for module in layer.modules():
        output = getattr(module, "o_proj", None)
        if isinstance(output, nn.Linear):
            return 4 * output.in_features
    return 0
