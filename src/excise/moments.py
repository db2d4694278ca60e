"""What flows into and out of writers, captured once: rows at the last prompt token, moments over tokens.

Rows are kept for as many prompts as there are; over all tokens only moments are kept, so memory does
not grow with the text. Knows hooks and batches; knows no method.

Shapes: B rows, T tokens, P prompts, O and I a writer's out and in features, Q rows of a basis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from excise.anatomy import Writer
from excise.errors import ConfigError, MeasurementError, MemoryExhausted, is_out_of_memory
from excise.events import OnEvent, track
from excise.loading import Loaded
from excise.tokens import Batch, batches, end_tokens, pad_token

_ROWS = 64
# A writer that fewer prompts reach is left alone: an edit fitted to them would be fitted to noise.
FEWEST_PROMPTS = 8


@dataclass(frozen=True)
class LastRows:
    """One writer's inputs (P, I) and outputs (P, O) at the prompts' last token, in prompt order."""

    inputs: Tensor
    outputs: Tensor


def refuse_experts(method: str, writers: Sequence[Writer]) -> None:
    """Fused experts' inputs are not captured, so methods that need them cannot edit experts.

    Raises:
        ConfigError: one of the writers is a fused expert.
    """
    names = dict.fromkeys(w.component for w in writers if w.expert is not None)
    if names:
        raise ConfigError(
            f"method {method} needs what goes into every writer, and that is not captured for fused "
            f"experts: leave {', '.join(names)} out of edit.components, or use --method directional"
        )


# Called with a writer's number, its inputs and outputs (B, T, .) of a batch, and the batch.
_See = Callable[[int, Tensor, Tensor, Batch], None]


@contextmanager
def _watched(
    writers: Sequence[Writer], see: Callable[[int, Tensor, Tensor], None]
) -> Iterator[None]:
    def hook(number: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def look(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            see(number, args[0].detach(), output.detach())

        return look

    handles = [w.module.register_forward_hook(hook(n)) for n, w in enumerate(writers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass(
    loaded: Loaded,
    writers: Sequence[Writer],
    rows: Sequence[Sequence[int]],
    see: _See,
    name: str,
    on_event: OnEvent,
) -> None:
    """Run all rows through the model; `see` is shown every writer's inputs and outputs."""
    pad = pad_token(loaded.tokenizer, end_tokens(loaded.model, loaded.tokenizer))
    chunks = batches(rows, _ROWS, pad, loaded.device, padding=loaded.anatomy.padding)
    for batch in track(chunks, name, len(chunks), on_event):
        _run(loaded, writers, batch, see)


def _run(loaded: Loaded, writers: Sequence[Writer], batch: Batch, see: _See) -> None:
    """One batch, in halves where memory is short: nothing is shown before the pass is through."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def by_row(states: Tensor) -> Tensor:  # shared experts see all tokens in one row
        return states.reshape(*batch.ids.shape, states.shape[-1])

    try:
        with (
            _watched(writers, lambda n, x, y: seen.__setitem__(n, (by_row(x), by_row(y)))),
            torch.inference_mode(),
        ):
            loaded.anatomy.backbone(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                position_ids=batch.positions,
                use_cache=False,
            )
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        seen.clear()
        halved = True
    else:
        halved = False
    if not halved:
        for number in list(seen):
            see(number, *seen.pop(number), batch)
        return
    if len(batch.rows) == 1:
        raise MemoryExhausted("out of memory while capturing the writers of one prompt")
    for half in batch.halves():
        _run(loaded, writers, half, see)


def last_rows(
    loaded: Loaded,
    writers: Sequence[Writer],
    rows: Sequence[Sequence[int]],
    name: str,
    on_event: OnEvent,
) -> list[LastRows]:
    """Every writer's inputs and outputs at the last token of every prompt, on the CPU in float32.

    Raises:
        MeasurementError: they are not finite. MemoryExhausted: one prompt does not fit.
    """
    inputs = [torch.empty(0)] * len(writers)
    outputs = [torch.empty(0)] * len(writers)

    def see(number: int, x: Tensor, y: Tensor, batch: Batch) -> None:
        if not inputs[number].numel():
            inputs[number] = torch.empty(len(rows), x.shape[-1])
            outputs[number] = torch.empty(len(rows), y.shape[-1])
        inputs[number][batch.rows] = x[:, -1].float().cpu()
        outputs[number][batch.rows] = y[:, -1].float().cpu()

    _pass(loaded, writers, rows, see, name, on_event)
    for writer, x, y in zip(writers, inputs, outputs, strict=True):
        if not bool(torch.isfinite(x).all() and torch.isfinite(y).all()):
            raise MeasurementError(
                f"{writer.key}: its inputs or outputs are not finite: try --set model.dtype=float32"
            )
    return [LastRows(x, y) for x, y in zip(inputs, outputs, strict=True)]


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


def token_moments(
    loaded: Loaded,
    writers: Sequence[Writer],
    texts: Sequence[tuple[Sequence[int], int]],
    bases: Sequence[Tensor | None],
    name: str,
    on_event: OnEvent,
) -> list[TokenMoments]:
    """Every writer's input moments over tokens.

    Args:
        loaded: the model.
        writers: which writers.
        texts: token ids, and how many at the end of them are left out.
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
    left_out = torch.tensor([spare for _, spare in texts])

    def see(number: int, x: Tensor, _y: Tensor, batch: Batch) -> None:
        out[number].add(x[_counted(batch, left_out)].float())

    _pass(loaded, writers, [ids for ids, _ in texts], see, name, on_event)
    return out


def token_sketches(
    loaded: Loaded,
    writers: Sequence[Writer],
    texts: Sequence[tuple[Sequence[int], int]],
    size: int,
    name: str,
    on_event: OnEvent,
) -> list[Tensor]:
    """For every writer `size` rows (size, I) that span most of where its inputs over tokens lie.

    A range sketch (Halko, Martinsson and Tropp 2011): S Omega with a random Omega (I, size), where S is
    the second moment, without ever forming S.
    """
    left_out = torch.tensor([spare for _, spare in texts])
    draws, sums = [], []
    for number, writer in enumerate(writers):
        generator = torch.Generator().manual_seed(number)
        weight = writer.weight
        draws.append(torch.randn(weight.shape[1], size, generator=generator).to(weight.device))
        sums.append(torch.zeros(size, weight.shape[1], device=weight.device))

    def see(number: int, x: Tensor, _y: Tensor, batch: Batch) -> None:
        rows = x[_counted(batch, left_out)].float()
        sums[number] += (rows @ draws[number]).T @ rows

    _pass(loaded, writers, [ids for ids, _ in texts], see, name, on_event)
    return sums


def _counted(batch: Batch, left_out: Tensor) -> Tensor:
    """Which positions (B, T) of a left-padded batch count: real ones but the last of each text."""
    mask = batch.mask.bool()
    width = mask.shape[1]
    ends = (width - left_out[batch.rows]).to(mask.device)  # (B,)
    return mask & (torch.arange(width, device=mask.device)[None] < ends[:, None])


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
