"""What flows into and out of writers, captured once: rows at the last prompt token, moments over tokens.

Rows are kept for as many prompts as there are; over all tokens only moments are kept, so memory does
not grow with the text. Knows hooks and batches; knows no method.

Shapes: B rows, T tokens, P prompts, O and I a writer's out and in features, Q rows of a basis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from excise.checkpoints.loading import Loaded
from excise.errors import MeasurementError, MemoryExhausted, is_out_of_memory
from excise.events import OnEvent, track
from excise.model.anatomy import Writer
from excise.model.experts import ExpertWatch, edited_forward
from excise.model.overrides import replaced_forward
from excise.prompts.tokens import Batch, batches, pad_token

R = TypeVar("R")

_ROWS = 64
# A writer that fewer prompts reach is left alone: an edit fitted to them would be fitted to noise.
FEWEST_PROMPTS = 8


@dataclass(frozen=True)
class LastRows:
    """One writer's inputs (P, I) and outputs (P, O) at the prompts' last token, in prompt order.

    Of an expert, only the prompts that are routed to it.
    """

    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class Text:
    """Token ids, and which of them count: those from `begin` on, but for the last `spare`."""

    ids: Sequence[int]
    begin: int = 0
    spare: int = 0


# Called with a writer's number, its inputs (S, I) and outputs (S, O), and where they stand in the batch,
# row * T + position (S,).
_Show = Callable[[int, Tensor, Tensor, Tensor], None]
# The same with its batch: gives what of them is wanted, which is small beside them.
_Reduce = Callable[[int, Tensor, Tensor, Tensor, Batch], R]
# Takes it, once the pass that it is from is through.
_Take = Callable[[int, R], None]


@contextmanager
def _watched(writers: Sequence[Writer], show: _Show) -> Iterator[None]:
    """Within this context `show` is told of every writer's inputs and outputs.

    Of fused experts, each is shown the tokens that are routed to it, outputs before the routing weight.
    """
    handles = []
    fused: dict[nn.Module, dict[int, int]] = {}
    for number, writer in enumerate(writers):
        if writer.expert is None:
            handles.append(writer.module.register_forward_hook(_hook(number, show)))
        else:
            fused.setdefault(writer.module, {})[writer.expert] = number
    watching = {module: _watching(module, numbers, show) for module, numbers in fused.items()}
    try:
        with replaced_forward(watching, fetched=True):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(number: int, show: _Show) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def look(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x, y = (t.detach().reshape(-1, t.shape[-1]) for t in (args[0], output))
        show(number, x, y, torch.arange(len(x), device=x.device))

    return look


def _watching(module: Any, numbers: dict[int, int], show: _Show) -> Callable[..., Tensor]:
    """A forward of fused experts that shows each expert's share, `numbers` being expert -> writer."""

    def see(expert: Tensor, token: Tensor, x: Tensor, y: Tensor) -> None:
        for one, number in numbers.items():
            mine = (expert == one).nonzero()[:, 0]
            if len(mine):
                show(number, x[mine], y[mine], token[mine])

    watch = ExpertWatch(see, module.down_proj.shape[0])

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return edited_forward(module, watch, torch.zeros(1, dtype=torch.long), *args, **kwargs)

    return forward


def _pass(
    loaded: Loaded,
    writers: Sequence[Writer],
    rows: Sequence[Sequence[int]],
    reduce: _Reduce[R],
    take: _Take[R],
    name: str,
    on_event: OnEvent,
) -> None:
    """Run all rows through the model; of every writer's inputs and outputs, `take` what they reduce to."""
    pad = pad_token(loaded.model, loaded.tokenizer)
    chunks = batches(rows, _ROWS, pad, loaded.device, padding=loaded.anatomy.padding)
    for batch in track(chunks, name, len(chunks), on_event):
        _run(loaded, writers, batch, reduce, take)


def _run(
    loaded: Loaded, writers: Sequence[Writer], batch: Batch, reduce: _Reduce[R], take: _Take[R]
) -> None:
    """One batch, in halves where memory is short: nothing is taken before the pass is through."""
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
    """Every writer's inputs and outputs at the last token of every prompt, on the CPU in float32.

    Outputs are as the matrix gives them, bias included.

    Raises:
        MeasurementError: they are not finite. MemoryExhausted: one prompt does not fit.
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
    """Rows of all batches in the order of their prompts; none for an expert that no prompt reaches."""
    if not parts:
        out, features = writer.weight.shape
        return LastRows(torch.zeros(0, features), torch.zeros(0, out))
    prompts, x, y = (torch.cat(part) for part in zip(*parts, strict=True))
    order = prompts.argsort()
    return LastRows(x[order], y[order])


@dataclass
class TokenMoments:
    """Second moment of one writer's inputs over tokens: in a basis, and its mean diagonal in full.

    Attributes:
        basis: (Q, I) orthonormal rows, or None for all of input space.
        moment: (Q, Q) float64 sum of x x^T in the basis.
        square: sum of |x|^2.
        tokens: how many there were.
    """

    basis: Tensor | None
    moment: Tensor
    square: float = 0.0
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        """Inputs (T, I) of some tokens."""
        self.square += float(x.square().sum(dtype=torch.float64))
        self.tokens += x.shape[0]
        z = x if self.basis is None else x @ self.basis.T
        self.moment += (z.T @ z).double()

    def join(self, more: TokenMoments) -> None:
        """Those of other tokens."""
        self.square += more.square
        self.tokens += more.tokens
        self.moment += more.moment

    def empty(self) -> TokenMoments:
        """Moments of no token, in the same basis."""
        return TokenMoments(self.basis, torch.zeros_like(self.moment))

    def mean(self) -> Tensor:
        """The moment per token (Q, Q), in float32; zero where there was no token."""
        return (self.moment / max(self.tokens, 1)).float()


def token_moments(
    loaded: Loaded,
    writers: Sequence[Writer],
    texts: Sequence[Text],
    bases: Sequence[Tensor | None],
    name: str,
    on_event: OnEvent,
) -> list[TokenMoments]:
    """Every writer's input moments over tokens.

    Args:
        loaded: the model.
        writers: which writers.
        texts: whose tokens.
        bases: (Q, I) a basis per writer, or None.
        name: of the phase, for progress.
        on_event: told of progress.
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
    bounds = _from_the_end(texts)

    def reduce(number: int, x: Tensor, _y: Tensor, at: Tensor, batch: Batch) -> TokenMoments:
        part = out[number].empty()
        part.add(x[_counted(batch, bounds, x.device)[at]].float())
        return part

    def take(number: int, found: TokenMoments) -> None:
        out[number].join(found)

    _pass(loaded, writers, [text.ids for text in texts], reduce, take, name, on_event)
    return out


def token_sketches(
    loaded: Loaded,
    writers: Sequence[Writer],
    texts: Sequence[Text],
    size: int,
    name: str,
    on_event: OnEvent,
) -> list[Tensor]:
    """For every writer `size` rows (size, I) that span most of where its inputs over tokens lie.

    A range sketch (Halko, Martinsson and Tropp 2011): S Omega with a random Omega (I, size), where S is
    the second moment, without ever forming S.
    """
    bounds = _from_the_end(texts)
    draws, sums = [], []
    for number, writer in enumerate(writers):
        generator = torch.Generator().manual_seed(number)
        weight = writer.weight
        draws.append(torch.randn(weight.shape[1], size, generator=generator).to(weight.device))
        sums.append(torch.zeros(size, weight.shape[1], device=weight.device))

    def reduce(number: int, x: Tensor, _y: Tensor, at: Tensor, batch: Batch) -> Tensor:
        rows = x[_counted(batch, bounds, x.device)[at]].float()
        return (rows @ draws[number]).T @ rows

    def take(number: int, found: Tensor) -> None:
        sums[number] += found

    _pass(loaded, writers, [text.ids for text in texts], reduce, take, name, on_event)
    return sums


def _from_the_end(texts: Sequence[Text]) -> Tensor:
    """Where what counts begins and ends in every text, in tokens from its end (N, 2)."""
    return torch.tensor([[len(text.ids) - text.begin, text.spare] for text in texts])


def _counted(batch: Batch, bounds: Tensor, device: torch.device) -> Tensor:
    """Which positions (B * T) of a left-padded batch count, by `_from_the_end` of all texts."""
    mine = bounds[batch.rows].to(device)  # (B, 2)
    left = torch.arange(batch.ids.shape[1], 0, -1, device=mine.device)[None]  # tokens to the end
    return ((left <= mine[:, :1]) & (left > mine[:, 1:])).flatten()


def few_prompts(
    writers: Sequence[Writer], captured: Mapping[str, Tensor]
) -> tuple[set[int], tuple[str, ...]]:
    """Which writers too few prompts reach, as experts may be, and what to say of them.

    Where there are only a few prompts in all, as many as there are will do.
    """
    counts = [
        min(len(captured[f"{w.name}/{side}"]) for side in ("target", "contrast")) for w in writers
    ]
    enough = min(FEWEST_PROMPTS, max(counts, default=0))
    few = {number for number, count in enumerate(counts) if count < enough}
    if not few:
        return few, ()
    names = [writers[number].key for number in sorted(few)]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return few, (f"left alone, as fewer than {enough} prompts reach them: {shown}",)


def stacked_biases(writers: Sequence[Writer]) -> Tensor | None:
    """The writers' biases (G, O) in float32, zeros for those without; None where none has one."""
    if all(w.bias is None for w in writers):
        return None
    zeros = torch.zeros(writers[0].shape[0], device=writers[0].like.device)
    return torch.stack([zeros if w.bias is None else w.bias.float() for w in writers])
