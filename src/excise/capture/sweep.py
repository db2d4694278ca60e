"""Run texts through the model once: all that methods ask of them is taken in one pass.

A text is a prompt, or a prompt and the response to it. Hooks on layers give the residuals at the prompt's
last token, hooks on writers show their inputs and outputs to every observer. Knows hooks and batches;
knows no method.

Shapes: B rows, T tokens, P texts, S tokens that are shown, O and I a writer's out and in features,
L layers, D residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from excise.capture.directions import Directions, winsorise
from excise.capture.residuals import Pass, last_token_residuals, residual_pass
from excise.checkpoints.loading import Loaded
from excise.errors import MemoryExhausted, is_out_of_memory
from excise.events import OnEvent, Progress, at_most_every, ignore
from excise.model.anatomy import Writer
from excise.model.experts import ExpertWatch, edited_forward
from excise.model.overrides import replaced_forward
from excise.prompts.tokens import Batch, batches, pad_token

SIDES = ("target", "contrast")
ROWS = 64  # texts of a batch
_EVERY = 1.0  # seconds between two reports of progress
RESIDUAL_BYTES = 2**30  # of both sides' residuals; more are not kept but captured anew where needed

# A prompt's last token; that and the response's, which predict the response; the prompt's before its last.
Span = Literal["last", "written", "before"]
# Called with a writer's number, its inputs (S, I) and outputs (S, O), and their flat positions in the
# batch, row * T + position (S,).
_Show = Callable[[int, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Text:
    """Token ids, of which the first `prompt` are the prompt."""

    ids: Sequence[int]
    prompt: int

    @classmethod
    def of(cls, prompt: Sequence[int], response: Sequence[int] = ()) -> Text:
        """Make a text of a prompt and its response, whose last token predicts nothing."""
        return cls([*prompt, *response[:-1]], len(prompt))


class Spans:
    """Which flat positions (B * T) of a left-padded batch are in which span."""

    def __init__(self, batch: Batch, after: Tensor) -> None:
        """`after`: how many tokens follow each row's prompt (B,)."""
        width = batch.ids.shape[1]
        self.ends = width - 1 - after.to(batch.ids.device)  # (B,) of the prompt's last token
        place = torch.arange(width, device=batch.ids.device)[None] - self.ends[:, None]
        real = batch.mask.bool()
        self._spans: dict[Span, Tensor] = {
            "last": (place == 0).flatten(),
            "written": (place >= 0).flatten(),
            "before": ((place < 0) & real).flatten(),
        }
        self._rows, self._width = batch.rows, width

    def among(self, span: Span, at: Tensor) -> Tensor:
        """Return which of the positions `at` (S,) are in a span, as truth values (S,)."""
        return self._spans[span].to(at.device)[at]

    def texts(self, at: Tensor) -> Tensor:
        """Return the number of the text that each position (S,) belongs to."""
        return self._rows[(at // self._width).cpu()]


class Observer(Protocol):
    """Reduces what it is shown of writers' inputs and outputs to what is kept."""

    def reduce(
        self, number: int, x: Tensor, y: Tensor, at: Tensor, spans: Spans
    ) -> Callable[[], None] | None:
        """Reduce inputs (S, I) and outputs (S, O) of writer `number` at flat positions `at` (S,).

        Returns what takes the result, called once all observers have theirs: where memory runs out, that
        writer is shown smaller batches instead. None where there is nothing to take.
        """


class Capture(Protocol):
    """What a method asks of the direction prompts, and what it makes of that."""

    @property
    def writers(self) -> Sequence[Writer]:
        """The writers that its observers are shown."""

    @property
    def responses(self) -> bool:
        """Whether contrast texts go on with the model's own responses."""

    def observers(self, side: str) -> Sequence[Observer]:
        """Return the observers of a side's texts."""

    def tensors(self, seen: Seen, directions: Directions) -> dict[str, Tensor]:
        """Return what is stored with the run, by names.

        Raises:
            MeasurementError: what was captured is not finite.
            MemoryExhausted: one text does not fit.
        """


@dataclass(frozen=True)
class ResidualsAlone:
    """What directions need: nothing of writers."""

    writers: Sequence[Writer] = ()
    responses: bool = False

    def observers(self, _side: str) -> Sequence[Observer]:
        """Return none."""
        return ()

    def tensors(self, _seen: Seen, _directions: Directions) -> dict[str, Tensor]:
        """Return none."""
        return {}


@dataclass(frozen=True)
class Seen:
    """What one sweep of both sides left, beside what observers took.

    Attributes:
        loaded: the model.
        capture: whose observers were shown the texts.
        texts: by side.
        residuals: by side, at the prompts' last token.
        on_event: told of progress.
    """

    loaded: Loaded
    capture: Capture
    texts: Mapping[str, Sequence[Text]]
    residuals: Mapping[str, Pass]
    on_event: OnEvent

    def again(self, side: str, observers: Sequence[Observer], name: str) -> None:
        """Show a side's texts to other observers, in a pass more."""
        one = Sweep(self.loaded, self.capture.writers, observers)
        one.over(self.texts[side], name, self.on_event)


def observe(
    loaded: Loaded,
    capture: Capture,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    responses: Sequence[Sequence[int]] | None = None,
    winsor: float | None = None,
    on_event: OnEvent = ignore,
) -> Seen:
    """Run both sides' texts through the model once, for residuals and a method's capture.

    Args:
        loaded: the model.
        capture: what is asked of the texts.
        prompts: side -> token ids of its prompts.
        responses: token ids of the responses to the contrast prompts, where `capture` asks for them.
        winsor: quantile that residuals are winsorised at.
        on_event: told of progress.

    Raises:
        MemoryExhausted: one text does not fit.
    """
    anatomy, texts = loaded.anatomy, {side: list(map(Text.of, prompts[side])) for side in SIDES}
    if responses is not None:
        texts["contrast"] = list(map(Text.of, prompts["contrast"], responses))
    count = sum(map(len, texts.values()))
    keeps = 4 * count * (len(anatomy.layers) + 1) * anatomy.width <= RESIDUAL_BYTES
    residuals: dict[str, Pass] = {}
    for side, some in texts.items():
        one = Sweep(loaded, capture.writers, capture.observers(side), winsor, keeps=keeps)
        if keeps or one.observers:
            one.over(some, f"capture {side}", on_event)
        alone = [text.ids[: text.prompt] for text in some]
        residuals[side] = (
            one.residuals if keeps else streamed(loaded, alone, winsor, side, on_event)
        )
    return Seen(loaded, capture, texts, residuals, on_event)


def streamed(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    winsor: float | None,
    side: str,
    on_event: OnEvent,
) -> Pass:
    """Return the pass over a side's prompts that captures their residuals each time it is run."""
    pad = pad_token(loaded.model, loaded.tokenizer)
    chunks = batches(prompts, ROWS, pad, loaded.device, padding=loaded.anatomy.padding)
    run = residual_pass(loaded.anatomy, chunks, winsor)

    def told() -> Iterator[tuple[Batch, Tensor]]:
        with telling(loaded.anatomy.layers, chunks, f"capture {side}", on_event):
            yield from run()

    return told


@contextmanager
def telling(
    layers: Sequence[nn.Module], chunks: Sequence[Batch], name: str, on_event: OnEvent
) -> Iterator[None]:
    """Tell how far one pass over some batches is, in tokens; within a batch, by the layers passed."""
    ends, calls = [0, *accumulate(batch.size for batch in chunks)], 0
    tell = at_most_every(_EVERY, on_event)

    def passed(*_: Any) -> None:
        nonlocal calls
        calls += 1
        batch, layer = divmod(calls, len(layers))
        done = ends[-1]
        if batch < len(chunks):
            done = ends[batch] + layer * chunks[batch].size // len(layers)
        tell(Progress(name, done, ends[-1]))

    handles = [layer.register_forward_hook(passed) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Sweep:
    """One pass over texts, for some observers of writers, and for residuals where it `keeps` them."""

    loaded: Loaded
    writers: Sequence[Writer]
    observers: Sequence[Observer]
    winsor: float | None = None
    keeps: bool = False
    _kept: list[tuple[Batch, Tensor]] = field(default_factory=list)

    def over(self, texts: Sequence[Text], name: str, on_event: OnEvent) -> None:
        """Run the texts through the model.

        Raises:
            MemoryExhausted: one text does not fit.
        """
        loaded, after = self.loaded, torch.tensor([len(text.ids) - text.prompt for text in texts])
        pad, padding = pad_token(loaded.model, loaded.tokenizer), loaded.anatomy.padding
        chunks = batches([text.ids for text in texts], ROWS, pad, loaded.device, padding=padding)
        with telling(loaded.anatomy.layers, chunks, name, on_event):
            for batch in chunks:
                self._run(batch, after, set())

    def residuals(self) -> Iterator[tuple[Batch, Tensor]]:
        """Yield the residuals (B, L+1, D) of one batch after another, on the CPU in float32."""
        return iter(self._kept)

    def _run(self, batch: Batch, after: Tensor, shown: set[int]) -> None:
        """Run one batch, in halves where memory is short.

        `shown` are the writers of which observers have taken this batch already, before memory ran out:
        what is not yet taken is then never more than one writer's.
        """
        spans, shown = Spans(batch, after[batch.rows]), set(shown)

        def show(number: int, x: Tensor, y: Tensor, at: Tensor) -> None:
            if number in shown:
                return
            for take in [one.reduce(number, x, y, at, spans) for one in self.observers]:
                if take is not None:
                    take()
            shown.add(number)

        try:
            self._pass(batch, spans, show)
            return
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        if len(batch.rows) == 1:
            raise MemoryExhausted("out of memory while capturing one prompt")
        for half in batch.halves():
            self._run(half, after, shown)

    def _pass(self, batch: Batch, spans: Spans, show: _Show) -> None:
        anatomy = self.loaded.anatomy
        with ExitStack() as hooks, torch.inference_mode():
            rows: list[Tensor] = []
            if self.keeps:
                rows = hooks.enter_context(last_token_residuals(anatomy, spans.ends))
            if self.observers:
                hooks.enter_context(_watched(self.writers, show))
            anatomy.backbone(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                position_ids=batch.positions,
                use_cache=False,
            )
        if self.keeps:
            x = torch.stack([row.float().to(rows[0].device) for row in rows], dim=1)
            x = x if self.winsor is None else winsorise(x, self.winsor)
            self._kept.append((batch, x.cpu()))


@contextmanager
def _watched(writers: Sequence[Writer], show: _Show) -> Iterator[None]:
    """Call `show` with every writer's inputs and outputs within this context.

    Each fused expert is shown the tokens that are routed to it, outputs before the routing weight.
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
    """Return a forward of fused experts that shows each expert's share; `numbers`: expert -> writer."""

    def see(expert: Tensor, token: Tensor, x: Tensor, y: Tensor) -> None:
        for one, number in numbers.items():
            mine = (expert == one).nonzero()[:, 0]
            if len(mine):
                show(number, x[mine], y[mine], token[mine])

    watch = ExpertWatch(see, module.down_proj.shape[0])

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return edited_forward(module, watch, torch.zeros(1, dtype=torch.long), *args, **kwargs)

    return forward
