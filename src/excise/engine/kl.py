"""KL(original || edited) of token distributions, in chunks that bound the memory for logits.

Shapes: N positions, S candidates, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from excise.model.forward import Forward


def kl(original: Tensor, edited: Tensor) -> Tensor:
    """Return KL(p || q) in nats along the last axis, from raw logits of p and q (they broadcast).

    Sums p (e^d - 1 - d) with d = log q - log p: equal to -sum p d because q and p both sum to one,
    but every term is positive and of second order, so that a small divergence is not lost in the
    rounding of large terms that cancel. Where e^d overflows float32, in float64.
    """
    found = _kl(original, edited)
    far = ~torch.isfinite(found)
    if bool(far.any()):
        found[far] = _exact(
            *(logits.expand(*found.shape, -1)[far] for logits in (original, edited))
        )
    return found


def _exact(original: Tensor, edited: Tensor) -> Tensor:
    return _kl(original.double(), edited.double()).to(original.dtype)


def _kl(original: Tensor, edited: Tensor) -> Tensor:
    log_p = original.log_softmax(-1)
    d = edited.log_softmax(-1).sub_(log_p)
    return torch.expm1(d).sub_(d).mul_(log_p.exp()).sum(-1)


def divergences(
    reference: Forward, original: Tensor, forward: Forward, edited: Tensor, chunk_bytes: int
) -> Tensor:
    """Return the KL per candidate and position (S, N), on the CPU, from final hidden states.

    Args:
        reference: gives the original's logits; the same as `forward` unless another model is measured.
        original: (N, D) the original model's states.
        forward: gives the candidates' logits.
        edited: (S, N, D) the candidates' states at the same positions.
        chunk_bytes: room for the logits of one chunk.
    """
    s, n, width = edited.shape
    # Original and edited logits, with two temporaries of the same size, in float32.
    step = max(1, chunk_bytes // (4 * forward.vocabulary * (s + 1) * 3))

    def logits(part: slice) -> tuple[Tensor, Tensor]:
        p = reference.logits(original[part])
        q = forward.logits(edited[:, part].reshape(-1, width))
        return p.to(q.device), q.view(s, -1, q.shape[-1])

    starts = range(0, n, step)
    found = torch.cat([_kl(*logits(slice(start, start + step))) for start in starts], dim=1).cpu()
    # Asked on the CPU, when all is there: a GPU would stand idle for every answer.
    for at in (~torch.isfinite(found)).any(0).nonzero().flatten().tolist():
        found[:, at] = _exact(*logits(slice(at, at + 1)))[:, 0].cpu()
    return found
