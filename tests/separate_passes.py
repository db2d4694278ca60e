"""Captures by a pass for each thing that is captured: the slow reference of the sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from excise.capture.moments import LastRows
from excise.capture.sweep import _watched
from excise.checkpoints.loading import Loaded
from excise.config import Config
from excise.errors import MeasurementError, MemoryExhausted, is_out_of_memory
from excise.events import OnEvent, track
from excise.methods.ridge import joint_basis
from excise.model.anatomy import Writer
from excise.prompts.tokens import Batch, batches, pad_token

R = TypeVar("R")

_ROWS = 64


@dataclass(frozen=True)
class TokenSpan:
    """Token ids, of which those from `begin` on count, without the last `spare`."""

    ids: Sequence[int]
    begin: int = 0
    spare: int = 0


# The same with the batch; returns a small summary of them.
_Reduce = Callable[[int, Tensor, Tensor, Tensor, Batch], R]
# Receives a summary once its pass has succeeded.
_Take = Callable[[int, R], None]


def _pass(
    loaded: Loaded,
    writers: Sequence[Writer],
    rows: Sequence[Sequence[int]],
    reduce: _Reduce[R],
    take: _Take[R],
    name: str,
    on_event: OnEvent,
) -> None:
    """Run all rows through the model; pass every writer's reduced inputs and outputs to `take`."""
    pad = pad_token(loaded.model, loaded.tokenizer)
    chunks = batches(rows, _ROWS, pad, loaded.device, padding=loaded.anatomy.padding)
    for batch in track(chunks, name, len(chunks), on_event):
        _run(loaded, writers, batch, reduce, take)


def _run(
    loaded: Loaded, writers: Sequence[Writer], batch: Batch, reduce: _Reduce[R], take: _Take[R]
) -> None:
    """Run one batch, in halves where memory is short; nothing is taken before the pass has succeeded."""
    found: dict[int, R] = {}

    def show(number: int, x: Tensor, y: Tensor, at: Tensor) -> None:
        found[number] = reduce(number, x, y, at, batch)

    try:
        with _watched(writers, show), torch.inference_mode():
            loaded.anatomy.backbone(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                position_ids=batch.positions,
                use_cache=False,
            )
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        halved = True
    else:
        halved = False
    if not halved:
        for number, one in found.items():
            take(number, one)
        return
    found.clear()
    if len(batch.rows) == 1:
        raise MemoryExhausted("out of memory while capturing the writers of one prompt")
    for half in batch.halves():
        _run(loaded, writers, half, reduce, take)


def last_rows(
    loaded: Loaded,
    writers: Sequence[Writer],
    rows: Sequence[Sequence[int]],
    name: str,
    on_event: OnEvent,
) -> list[LastRows]:
    """Capture every writer's inputs and outputs at the last token of every prompt, on the CPU in float32.

    Outputs are as the matrix gives them, bias included.

    Raises:
        MeasurementError: they are not finite.
        MemoryExhausted: one prompt does not fit.
    """
    parts: list[list[_Last]] = [[] for _ in writers]

    def reduce(_number: int, x: Tensor, y: Tensor, at: Tensor, batch: Batch) -> _Last:
        width = batch.ids.shape[1]
        last = (at % width == width - 1).nonzero()[:, 0]
        prompts = batch.rows[(at[last] // width).cpu()]
        return prompts, x[last].float().cpu(), y[last].float().cpu()

    def take(number: int, found: _Last) -> None:
        parts[number].append(found)

    _pass(loaded, writers, rows, reduce, take, name, on_event)
    found = [_in_order(writer, some) for writer, some in zip(writers, parts, strict=True)]
    for writer, one in zip(writers, found, strict=True):
        if not bool(torch.isfinite(one.inputs).all() and torch.isfinite(one.outputs).all()):
            raise MeasurementError(
                f"{writer.key}: its inputs or outputs are not finite: try --set model.dtype=float32"
            )
    return found


_Last = tuple[Tensor, Tensor, Tensor]  # which prompts (S,), inputs (S, I), outputs (S, O)


def _in_order(writer: Writer, parts: list[_Last]) -> LastRows:
    """Sort the rows of all batches by prompt; none for an expert that no prompt is routed to."""
    if not parts:
        out, features = writer.weight.shape
        return LastRows(torch.zeros(0, features), torch.zeros(0, out))
    prompts, x, y = (torch.cat(part) for part in zip(*parts, strict=True))
    order = prompts.argsort()
    return LastRows(x[order], y[order])


@dataclass
class TokenMoments:
    """Second moment of one writer's inputs over tokens.

    Attributes:
        basis: (Q, I) orthonormal rows, or None for all of input space.
        moment: (Q, Q) float64 sum of x x^T in the basis.
        square: sum of |x|^2, in all of input space.
        tokens: number of tokens.
    """

    basis: Tensor | None
    moment: Tensor
    square: float = 0.0
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        """Add the inputs (T, I) of some tokens."""
        self.square += float(x.square().sum(dtype=torch.float64))
        self.tokens += x.shape[0]
        z = x if self.basis is None else x @ self.basis.T
        self.moment += (z.T @ z).double()

    def join(self, more: TokenMoments) -> None:
        """Add the sums over another batch's tokens; both must share the basis."""
        self.square += more.square
        self.tokens += more.tokens
        self.moment += more.moment

    def empty(self) -> TokenMoments:
        """Return the moments of no tokens, in the same basis."""
        return TokenMoments(self.basis, torch.zeros_like(self.moment))

    def mean(self) -> Tensor:
        """Return the moment per token (Q, Q), in float32; zero where there was no token."""
        return (self.moment / max(self.tokens, 1)).float()


def token_moments(
    loaded: Loaded,
    writers: Sequence[Writer],
    texts: Sequence[TokenSpan],
    bases: Sequence[Tensor | None],
    name: str,
    on_event: OnEvent,
) -> list[TokenMoments]:
    """Sum every writer's second input moment over tokens.

    Args:
        loaded: the model.
        writers: the writers to capture.
        texts: the tokens to count.
        bases: (Q, I) a basis per writer, or None.
        name: of the phase, for progress.
        on_event: told of progress.

    Raises:
        MemoryExhausted: one text does not fit.
    """
    sizes = [
        basis.shape[0] if basis is not None else writer.shape[1]
        for writer, basis in zip(writers, bases, strict=True)
    ]
    out = [
        TokenMoments(
            None if basis is None else basis.to(writer.like.device, torch.float32),
            torch.zeros(q, q, dtype=torch.float64, device=writer.like.device),
        )
        for writer, basis, q in zip(writers, bases, sizes, strict=True)
    ]
    bounds = _span_bounds(texts)

    def reduce(number: int, x: Tensor, _y: Tensor, at: Tensor, batch: Batch) -> TokenMoments:
        part = out[number].empty()
        part.add(x[_counted_positions(batch, bounds, x.device)[at]].float())
        return part

    def take(number: int, found: TokenMoments) -> None:
        out[number].join(found)

    _pass(loaded, writers, [text.ids for text in texts], reduce, take, name, on_event)
    return out


def token_sketches(
    loaded: Loaded,
    writers: Sequence[Writer],
    texts: Sequence[TokenSpan],
    size: int,
    name: str,
    on_event: OnEvent,
) -> list[Tensor]:
    """Sketch, for every writer, the range of its inputs over tokens: `size` rows (size, I).

    A randomised range sketch (Halko, Martinsson and Tropp 2011): S Omega with a random Omega (I, size),
    where S is the second moment, without ever forming S.

    Raises:
        MemoryExhausted: one text does not fit.
    """
    bounds = _span_bounds(texts)
    draws, sums = [], []
    for number, writer in enumerate(writers):
        generator = torch.Generator().manual_seed(number)
        weight = writer.weight
        draws.append(torch.randn(weight.shape[1], size, generator=generator).to(weight.device))
        sums.append(torch.zeros(size, weight.shape[1], device=weight.device))

    def reduce(number: int, x: Tensor, _y: Tensor, at: Tensor, batch: Batch) -> Tensor:
        rows = x[_counted_positions(batch, bounds, x.device)[at]].float()
        return (rows @ draws[number]).T @ rows

    def take(number: int, found: Tensor) -> None:
        sums[number] += found

    _pass(loaded, writers, [text.ids for text in texts], reduce, take, name, on_event)
    return sums


def _span_bounds(texts: Sequence[TokenSpan]) -> Tensor:
    """Return where the counted tokens of every text begin and end, in tokens from its end (N, 2)."""
    return torch.tensor([[len(text.ids) - text.begin, text.spare] for text in texts])


def _counted_positions(batch: Batch, bounds: Tensor, device: torch.device) -> Tensor:
    """Return which positions (B * T) of a left-padded batch count, by `_span_bounds` of all texts."""
    mine = bounds[batch.rows].to(device)  # (B, 2)
    left = torch.arange(batch.ids.shape[1], 0, -1, device=mine.device)[None]  # tokens to the end
    return ((left <= mine[:, :1]) & (left > mine[:, 1:])).flatten()


def ridge_capture(
    loaded: Loaded,
    writers: Sequence[Writer],
    tokens: Mapping[str, list[list[int]]],
    responses: Sequence[Sequence[int]],
    config: Config,
    on_event: OnEvent,
) -> dict[str, Tensor]:
    """Capture what ridge ablation needs of every writer, under "WRITER/what".

    S_keep is over the tokens that predict the model's own `responses` to contrast prompts, from the
    prompt's last token on; S_prompt over the tokens before that one. Where a writer has more in
    features than `ridge.basis`, everything is kept in a basis of that many dimensions.

    Raises:
        MeasurementError: inputs or outputs are not finite.
        MemoryExhausted: one prompt does not fit.
    """
    target = last_rows(loaded, writers, tokens["target"], "capture target writers", on_event)
    contrast = last_rows(loaded, writers, tokens["contrast"], "capture contrast writers", on_event)
    pairs = list(zip(tokens["contrast"], responses, strict=True))
    whole = [[*ids, *answer[:-1]] for ids, answer in pairs]
    size = config.ridge.basis
    bases = _bases(loaded, writers, target, contrast, list(map(TokenSpan, whole)), size, on_event)
    written = [
        TokenSpan(text, begin=len(ids) - 1) for text, (ids, _) in zip(whole, pairs, strict=True)
    ]
    before = [TokenSpan(ids, spare=1) for ids, _ in pairs]
    keep = token_moments(loaded, writers, written, bases, "capture responses", on_event)
    prompts = token_moments(loaded, writers, before, bases, "capture prompts", on_event)
    out: dict[str, Tensor] = {}
    for writer, x, xc, kept, read in zip(writers, target, contrast, keep, prompts, strict=True):
        basis = kept.basis.cpu() if kept.basis is not None else None
        seen = x.inputs if basis is None else x.inputs @ basis.T
        first = xc.inputs if basis is None else xc.inputs @ basis.T
        parts = {
            "keep": kept.mean().cpu(),
            "prompts": read.mean().cpu(),
            "first": first.T @ first / max(len(first), 1),
            "target": seen,
            "outputs": x.outputs,
            "contrast": xc.outputs,
            "diagonal": torch.tensor(kept.square / max(kept.tokens, 1) / writer.shape[1]),
        }
        if basis is not None:
            parts["basis"] = basis
        out |= {f"{writer.name}/{what}": t.contiguous() for what, t in parts.items()}
    return out


def _bases(
    loaded: Loaded,
    writers: Sequence[Writer],
    target: Sequence[LastRows],
    contrast: Sequence[LastRows],
    texts: Sequence[TokenSpan],
    size: int,
    on_event: OnEvent,
) -> list[Tensor | None]:
    """Choose a basis per writer; None where its input space is small enough as it is.

    It spans target rows first, then contrast rows, then where most of the tokens lie.
    """
    large = [n for n, w in enumerate(writers) if w.shape[1] > size]
    bases: list[Tensor | None] = [None] * len(writers)
    if not large:
        return bases
    chosen = [writers[n] for n in large]
    sketches = token_sketches(loaded, chosen, texts, size // 2, "capture range", on_event)
    for n, sketch in zip(large, sketches, strict=True):
        bases[n] = joint_basis([target[n].inputs, contrast[n].inputs, sketch.cpu()], size)
    return bases
