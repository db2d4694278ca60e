"""Gradient refinement: from front points, strengths layer by layer are moved downhill.

The loss is drift + mu x the log-likelihood of the behaviour's own responses (its negative where the
behaviour is strengthened), with the closed form of the edit in the graph. Works on the direction prompts:
the search prompts only judge what comes of it. Knows the engine's original responses; knows no study.

Shapes: W writers, B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from excise.checkpoints.loading import Loaded
from excise.config import Config
from excise.engine.batch_sizing import usual_length, within_memory
from excise.engine.engine import Engine, Plan
from excise.errors import MeasurementError
from excise.methods.directional import DirectionalMethod
from excise.methods.profiles import Candidate, layer_key
from excise.methods.registry import Method
from excise.methods.search_space import MOST_REFINED
from excise.model.edits import Edit
from excise.model.experts import edited_forward, stack_experts
from excise.model.overrides import replaced_forward
from excise.prompts.tokens import Batch, left_pad, pad_token

STEPS = 16
_RATE = 0.04  # Adam's; strengths are about one
# How much the behaviour counts against drift: refined points take these in turn.
WEIGHTS = (3e-4, 1e-3, 3e-3, 1e-2)
# A response less likely than e^-8 is gone; to make it rarer still is worth nothing.
_FLOOR = -8.0
PROMPTS = 32
_ROWS = 8  # of one pass: with gradients, all layers' activations are held
_FARTHEST = 80.0  # log q - log p, whose exponential float32 still holds


class NothingToRefine(MeasurementError):
    """The original does not show the behaviour where refinement looks for it."""


@dataclass(frozen=True)
class Texts:
    """Prompts and responses, side by side in one batch each, and where the responses stand.

    Attributes:
        batch: left-padded prompts with their responses but for the last token.
        answers: (B, T) the token that each position should predict, -1 where no response stands.
    """

    batch: Batch
    answers: Tensor

    def parts(self, rows: int) -> list[Texts]:
        """The same in batches of so many rows."""
        return [self._part(start, start + rows) for start in range(0, len(self.answers), rows)]

    def _part(self, start: int, stop: int) -> Texts:
        batch = self.batch.part(start, stop)
        return Texts(batch, self.answers[start:stop, -batch.ids.shape[1] :])


def texts(
    loaded: Loaded, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> Texts:
    """One batch of prompts and the responses to them."""
    rows = [[*p, *r[:-1]] for p, r in zip(prompts, responses, strict=True)]
    pad = pad_token(loaded.model, loaded.tokenizer)
    batch = left_pad(rows, range(len(rows)), pad, loaded.device)
    answers = torch.full_like(batch.ids, -1)
    for row, response in zip(answers, responses, strict=True):
        row[-len(response) :] = torch.tensor(response)
    return Texts(batch, answers)


def direction_engine(
    loaded: Loaded, prompts: dict[str, list[list[int]]], config: Config, spoken: Sequence[int] = ()
) -> Engine:
    """An engine on direction prompts, for the original model's responses to them."""
    limit, usual = config.scores.max_new_tokens, Plan()
    lengths = [len(row) for rows in prompts.values() for row in rows]
    plan = Plan(rows=config.engine.rows or usual.rows)
    plan = within_memory(plan, loaded, config, usual_length(lengths))
    return Engine(loaded, (), prompts, max_new_tokens=limit, plan=plan, spoken=spoken)


class Refiner:
    """Descends from one candidate at a time; what it finds is a function of candidate and weight."""

    def __init__(
        self, loaded: Loaded, method: DirectionalMethod, target: Texts, contrast: Texts
    ) -> None:
        self._method = method
        self._forward = loaded.forward
        rows = _ROWS if loaded.anatomy.padding else 1  # a row alone has no padding
        self._target, self._contrast = target.parts(rows), contrast.parts(rows)
        self._rows, self._tokens = len(target.answers), int((contrast.answers >= 0).sum())
        with torch.no_grad():
            self._original = [self._states(part) for part in self._contrast]

    def refine(self, candidate: Candidate, weight: float) -> dict[str, float]:
        """The parameters of the strengths that descending from `candidate` ends at.

        Raises:
            MeasurementError: the loss is not finite.
        """
        writers = self._method.writers
        start = [candidate.strength(w.component, w.layer) for w in writers]
        strengths = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.Adam([strengths], lr=_RATE)
        best, least = strengths.detach().clone(), float("inf")
        for step in range(STEPS + 1):
            optimiser.zero_grad()
            value = 0.0
            for part in self._losses(candidate.index, strengths, weight):
                value += float(part.detach())
                if step < STEPS:
                    part.backward()  # type: ignore[no-untyped-call]
            if not value == value or abs(value) == float("inf"):
                raise MeasurementError("refinement: the loss is not finite")
            if value < least:
                best, least = strengths.detach().clone(), value
            if step == STEPS:
                break
            optimiser.step()
            with torch.no_grad():
                strengths.clamp_(0.0, MOST_REFINED)
        found = {w: 0.0 for w in _every_layer(self._method)}
        for writer, strength in zip(writers, best.tolist(), strict=True):
            found[layer_key(writer.component, writer.layer)] = round(strength, 6)
        return found

    def loss(self, index: float | None, strengths: Tensor, weight: float) -> Tensor:
        """drift + weight x log-likelihood, differentiable in the strengths (W)."""
        return torch.stack(list(self._losses(index, strengths, weight))).sum()

    def _losses(self, index: float | None, strengths: Tensor, weight: float) -> Iterator[Tensor]:
        """What the loss is the sum of: a few rows each, so that little of the graph stands at once."""
        for part, original in zip(self._contrast, self._original, strict=True):
            with _edited(self._method, self._method.graded(index, strengths)):
                states = self._states(part)
            yield self._head(_divergence, original, states).sum() / self._tokens
        for part in self._target:
            with _edited(self._method, self._method.graded(index, strengths)):
                states = self._states(part)
            spoken = part.answers >= 0
            chosen = self._head(_chosen, states, part.answers[spoken])
            rows = spoken.nonzero()[:, 0].to(chosen.device)
            sums = chosen.new_zeros(len(spoken)).index_add(0, rows, chosen)
            floor = sums.new_tensor(_FLOOR)
            likelihood = torch.logaddexp(sums, floor).sum() / self._rows
            yield self._method.sign * weight * likelihood

    def _states(self, text: Texts) -> Tensor:
        """Final hidden states (N, D) at the positions that predict a response's tokens."""
        batch, spoken = text.batch, text.answers >= 0
        keep = int(spoken.any(0).sum())
        hidden = self._forward.hidden(batch.ids, batch.mask, batch.positions, keep=keep)
        return hidden[spoken[:, -keep:].to(hidden.device)]

    def _head(self, take: _Take, *each: Tensor) -> Tensor:
        """What `take` makes (N,) of tensors of N tokens each, in chunks whose logits are not kept."""
        step = max(1, self._forward.chunk_bytes // (8 * self._forward.vocabulary))
        chunks = zip(*(torch.split(tensor, step) for tensor in each), strict=True)
        logits = self._forward.logits
        return torch.cat([checkpoint(take, logits, *c, use_reentrant=False) for c in chunks])


# Of some tokens: the model's head, and tensors of their states or tokens -> a number each.
_Take = Callable[..., Tensor]


def _divergence(logits: Callable[[Tensor], Tensor], original: Tensor, edited: Tensor) -> Tensor:
    """`divergence.kl` without writing in place, for gradients to flow through."""
    log_p = logits(original).log_softmax(-1)
    d = (logits(edited).log_softmax(-1) - log_p).clamp_max(_FARTHEST)
    return (log_p.exp() * (torch.expm1(d) - d)).sum(-1)


def _chosen(logits: Callable[[Tensor], Tensor], states: Tensor, tokens: Tensor) -> Tensor:
    """Log-likelihoods of these tokens."""
    tokens = tokens.to(states.device)
    return logits(states).log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def refiner_for(
    loaded: Loaded,
    method: Method,
    tokens: Mapping[str, list[list[int]]],
    config: Config,
    shows: Callable[[str], bool],
    spoken: Sequence[int] = (),
) -> Refiner:
    """What refines candidates, on the first direction prompts and the original's responses to them.

    Raises:
        NothingToRefine: no response of the original shows the behaviour.
    """
    assert isinstance(method, DirectionalMethod)
    prompts = {side: tokens[side][:PROMPTS] for side in ("target", "contrast")}
    engine = direction_engine(loaded, prompts, config, spoken)
    found = {side: engine.original(side).responses for side in prompts}
    shown = [n for n, r in enumerate(found["target"]) if r.tokens and shows(r.text)]
    if not shown:
        raise NothingToRefine(
            f"refinement: none of the original's first {len(prompts['target'])} responses shows the "
            "behaviour, so there is nothing whose likelihood could change: no trial is refined"
        )
    target = texts(
        loaded,
        [prompts["target"][n] for n in shown],
        [found["target"][n].tokens for n in shown],
    )
    contrast = texts(loaded, prompts["contrast"], [r.tokens for r in found["contrast"]])
    return Refiner(loaded, method, target, contrast)


def refined(
    refiner: Refiner, method: Method, params: Sequence[dict[str, Any]], count: int
) -> list[dict[str, Any]]:
    """`count` refined parameter sets from those of the front, best first; the better half of it.

    Points take turns, and so do the weights of the behaviour.
    """
    starts = params[: -(-len(params) // 2)]
    out = []
    for number in range(count if starts else 0):
        at = number * len(starts) // count
        strengths = refiner.refine(method.candidate(starts[at]), WEIGHTS[number % len(WEIGHTS)])
        out.append({**starts[at], **strengths})
    return out


def _every_layer(method: DirectionalMethod) -> list[str]:
    components = dict.fromkeys(w.component for w in method.writers)
    return [layer_key(name, layer) for name in components for layer in range(method.layers)]


@contextmanager
def _edited(method: DirectionalMethod, edits: Sequence[Edit | None]) -> Iterator[None]:
    """Within this context the writers' outputs are edited, and gradients flow through the edits."""

    def hook(edit: Edit) -> Any:
        def apply(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return edit.apply_to_output(args[0], output)

        return apply

    pairs = [(w, e) for w, e in zip(method.writers, edits, strict=True) if e is not None]
    fused: dict[nn.Module, dict[int, list[Edit | None]]] = {}
    for writer, edit in pairs:
        if writer.expert is not None:
            fused.setdefault(writer.module, {})[writer.expert] = [edit]
    one = torch.zeros(1, dtype=torch.long)
    experts: dict[nn.Module, Callable[..., Any]] = {
        module: partial(edited_forward, module, stack_experts(module, each, 1), one)
        for module, each in fused.items()
    }
    handles = [w.module.register_forward_hook(hook(e)) for w, e in pairs if w.expert is None]
    try:
        with replaced_forward(experts, fetched=True):
            yield
    finally:
        for handle in handles:
            handle.remove()
