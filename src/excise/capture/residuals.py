"""Stream residuals at the last prompt token: memory does not grow with the number of prompts.

Hooks sit on the layers, so the last row is the residual stream before any final norm (a model's own
`hidden_states[-1]` is after it). Shapes: B rows, P prompts, L layers, D residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from excise.capture.directions import winsorise
from excise.errors import MemoryExhausted, is_out_of_memory
from excise.model.anatomy import Anatomy
from excise.prompts.tokens import Batch

_WEISZFELD_PASSES = 12
_WEISZFELD_TOLERANCE = 1e-4

# A pass yields the residuals (B, L+1, D) of one batch after another.
Pass = Callable[[], Iterator[tuple[Batch, Tensor]]]


@contextmanager
def last_token_residuals(anatomy: Anatomy, ends: Tensor | None = None) -> Iterator[list[Tensor]]:
    """Collect a token's residual in each forward pass: embedding, then each layer's output.

    `ends`: that token's position in every row (B,); None takes the last.
    """
    rows: list[Tensor] = []

    def collect(hidden: Tensor) -> None:
        x = anatomy.residual(hidden)
        places = torch.full((len(x),), -1) if ends is None else ends
        each = torch.arange(len(x), device=x.device)
        rows.append(x.detach()[each, places.to(x.device)])  # a copy

    def before_first(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        collect(args[0] if args else kwargs["hidden_states"])

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        collect(output[0] if isinstance(output, tuple) else output)

    hooks = [anatomy.layers[0].register_forward_pre_hook(before_first, with_kwargs=True)]
    hooks += [layer.register_forward_hook(after) for layer in anatomy.layers]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def residual_pass(anatomy: Anatomy, batches: Sequence[Batch], winsor: float | None) -> Pass:
    """Return a pass over `batches` that can be run again; each residual is winsorised on its own."""

    def run() -> Iterator[tuple[Batch, Tensor]]:
        for batch in batches:
            x = _residuals(anatomy, batch)
            yield batch, x if winsor is None else winsorise(x, winsor)

    return run


def _residuals(anatomy: Anatomy, batch: Batch) -> Tensor:
    """Return the last-token residuals (B, L+1, D) of one batch, in halves where memory is short."""
    try:
        with last_token_residuals(anatomy) as rows, torch.inference_mode():
            anatomy.backbone(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                position_ids=batch.positions,
                use_cache=False,
            )
        return torch.stack([row.float().to(rows[0].device) for row in rows], dim=1)
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if len(batch.rows) == 1:
        raise MemoryExhausted("out of memory while capturing the residuals of one prompt")
    return torch.cat([_residuals(anatomy, half) for half in batch.halves()])


def mean(run: Pass) -> Tensor:
    """Compute the mean residual (L+1, D) in float64, in one pass."""
    total, count = torch.zeros(()), 0
    for _, x in run():
        total = total + x.double().sum(0).cpu()
        count += x.shape[0]
    return total / count


def geometric_median(run: Pass) -> Tensor:
    """Compute the geometric median (L+1, D) by Weiszfeld's iteration, one pass over the prompts each.

    It is more robust to a few extreme prompts than the mean. It stops when no layer moves by more than 1e-4
    of its norm, or after 12 passes.
    """
    centre = mean(run)
    for _ in range(_WEISZFELD_PASSES):
        total = torch.zeros_like(centre)
        weights = torch.zeros(centre.shape[0], 1, dtype=torch.float64)
        for _, x in run():
            residual = x.double().cpu()
            # The clamp keeps the weight of a prompt that lies on the centre finite.
            w = 1.0 / (residual - centre).norm(dim=-1, keepdim=True).clamp_min(1e-8)
            total += (w * residual).sum(0)
            weights += w.sum(0)
        moved = total / weights
        done = ((moved - centre).norm(dim=-1) <= _WEISZFELD_TOLERANCE * moved.norm(dim=-1)).all()
        centre = moved
        if bool(done):
            break
    return centre


def projections(run: Pass, unit: Tensor) -> Tensor:
    """Project each prompt's residual after layer l on unit[l] (L, D): (P, L), rows in no set order."""
    return torch.cat([torch.einsum("bld,ld->bl", x[:, 1:].cpu(), unit) for _, x in run()])
