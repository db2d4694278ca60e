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
        p, q = (logits.expand(*found.shape, -1)[far].double() for logits in (original, edited))
        found[far] = _kl(p, q).to(found.dtype)
    return found


def _kl(original: Tensor, edited: Tensor) -> Tensor:
    log_p = original.log_softmax(-1)
    d = edited.log_softmax(-1).sub_(log_p)
    return torch.expm1(d).sub_(d).mul_(log_p.exp()).sum(-1)


def divergences(
    reference: Forward, original: Tensor, forward: Forward, edited: Tensor, chunk_bytes: int
) -> Tensor:
    """Return the KL per candidate and position (S, N), from final hidden states.

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
    out = []
    for start in range(0, n, step):
        p = reference.logits(original[start : start + step])
        q = forward.logits(edited[:, start : start + step].reshape(-1, width))
        out.append(kl(p.to(q.device), q.view(s, -1, q.shape[-1])))
    return torch.cat(out, dim=1)
