"""Observers of writers: rows at the prompt's last token, second moments over tokens, range sketches.

Rows are kept per prompt; over all tokens only sums are kept, so memory does not grow with the text.
Knows no method.

Shapes: B rows, T tokens, P prompts, S tokens that are shown, O and I a writer's out and in features, Q rows
of a basis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from excise.capture.sweep import Span, Spans
from excise.errors import MeasurementError
from excise.model.anatomy import Writer

# Fewest prompts that an edit is fitted to: with fewer it would fit noise.
FEWEST_PROMPTS = 8


@dataclass(frozen=True)
class LastRows:
    """One writer's inputs (P, I) and outputs (P, O) at the last prompt token, in prompt order.

    For an expert, only the prompts that are routed to it.
    """

    inputs: Tensor
    outputs: Tensor


_Last = tuple[Tensor, Tensor, Tensor]  # which prompts (S,), inputs (S, I), outputs (S, O)


class RowObserver:
    """Keeps every writer's inputs and outputs at the prompts' last token, on the CPU in float32.

    Outputs are as the matrix gives them, bias included.
    """

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = writers
        self._parts: list[list[_Last]] = [[] for _ in writers]

    def reduce(
        self, number: int, x: Tensor, y: Tensor, at: Tensor, spans: Spans
    ) -> Callable[[], None]:
        """Copy the rows of this batch."""
        last = spans.among("last", at).nonzero()[:, 0]
        found = spans.texts(at[last]), x[last].float().cpu(), y[last].float().cpu()
        return lambda: self._parts[number].append(found)

    def rows(self) -> list[LastRows]:
        """Return the rows of every writer.

        Raises:
            MeasurementError: they are not finite.
        """
        found = [_in_order(*pair) for pair in zip(self._writers, self._parts, strict=True)]
        for writer, one in zip(self._writers, found, strict=True):
            if not bool(torch.isfinite(one.inputs).all() and torch.isfinite(one.outputs).all()):
                raise MeasurementError(
                    f"{writer.key}: its inputs or outputs are not finite: try --set model.dtype=float32"
                )
        return found


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

    @classmethod
    def none(cls, writer: Writer, basis: Tensor | None) -> TokenMoments:
        """Return the moments of no tokens, on the writer's device."""
        device, size = writer.like.device, writer.shape[1] if basis is None else len(basis)
        own = None if basis is None else basis.to(device, torch.float32)
        return cls(own, torch.zeros(size, size, dtype=torch.float64, device=device))

    def adding(self, x: Tensor) -> Callable[[], None]:
        """Reduce the inputs (S, I) of some tokens; return what adds them."""
        square, tokens = float(x.square().sum(dtype=torch.float64)), len(x)
        z = x if self.basis is None else x @ self.basis.T
        product = z.T @ z

        def add() -> None:
            self.square += square
            self.tokens += tokens
            self.moment += product  # in float64

        return add

    def within(self, basis: Tensor) -> TokenMoments:
        """Return moments in all of input space as they are in a basis (Q, I)."""
        rows = basis.to(self.moment)
        own = basis.to(self.moment.device, torch.float32)
        return TokenMoments(own, rows @ self.moment @ rows.T, self.square, self.tokens)

    def mean(self) -> Tensor:
        """Return the moment per token (Q, Q), in float32; zero where there was no token."""
        return (self.moment / max(self.tokens, 1)).float()


class MomentObserver:
    """Sums some writers' second input moments over the tokens of a span.

    Attributes:
        sums: by the writer's number.
    """

    def __init__(
        self, writers: Sequence[Writer], span: Span, bases: Mapping[int, Tensor | None]
    ) -> None:
        """`bases`: writer's number -> basis (Q, I), or None for all of input space."""
        self.span: Span = span
        self.sums = {n: TokenMoments.none(writers[n], basis) for n, basis in bases.items()}

    def reduce(
        self, number: int, x: Tensor, _y: Tensor, at: Tensor, spans: Spans
    ) -> Callable[[], None] | None:
        """Reduce this batch's tokens to their moment."""
        if number not in self.sums:
            return None
        return self.sums[number].adding(x[spans.among(self.span, at)].float())


class SketchObserver:
    """Sketches the range of some writers' inputs over all tokens: `size` rows (size, I) each.

    A randomised range sketch (Halko, Martinsson and Tropp 2011): S Omega with a random Omega (I, size),
    where S is the second moment, without ever forming S.

    Attributes:
        sums: by the writer's number.
    """

    def __init__(self, writers: Sequence[Writer], numbers: Sequence[int], size: int) -> None:
        self._draws = sketch_draws(writers, numbers, size)
        self.sums = {n: torch.zeros_like(omega.T) for n, omega in self._draws.items()}

    def reduce(
        self, number: int, x: Tensor, _y: Tensor, at: Tensor, spans: Spans
    ) -> Callable[[], None] | None:
        """Reduce this batch's tokens to their sketch."""
        if number not in self.sums:
            return None
        counted = spans.among("written", at) | spans.among("before", at)
        rows = x[counted].float()
        found = (rows @ self._draws[number]).T @ rows

        def add() -> None:
            self.sums[number] += found

        return add


def sketch_draws(writers: Sequence[Writer], numbers: Sequence[int], size: int) -> dict[int, Tensor]:
    """Draw Omega (I, size) for each of these writers; the same each time."""
    found = {}
    for seed, number in enumerate(numbers):
        like, generator = writers[number].like, torch.Generator().manual_seed(seed)
        omega = torch.randn(writers[number].shape[1], size, generator=generator)
        found[number] = omega.to(like.device)
    return found


def rarely_reached(
    writers: Sequence[Writer], captured: Mapping[str, Tensor]
) -> tuple[set[int], tuple[str, ...]]:
    """Find the writers, such as experts, that too few prompts reach; return their numbers and a note.

    Where there are only a few prompts in all, that number is enough.
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
    """Stack the writers' biases (G, O) in float32, zeros for those without; None where none has one."""
    if all(w.bias is None for w in writers):
        return None
    zeros = torch.zeros(writers[0].shape[0], device=writers[0].like.device)
    return torch.stack([zeros if w.bias is None else w.bias.float() for w in writers])
