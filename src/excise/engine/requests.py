"""Requests that scorers make of the engine, and the evidence that answers them.

Shapes: P prompts; a response has its own number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

# Whether a response that begins with this text has a verdict that no further text can change.
Decided = Callable[[str], bool]


@dataclass(frozen=True)
class Response:
    """One greedy response. `ended` is False where it was cut: decided, or at the token limit."""

    tokens: tuple[int, ...]
    text: str
    ended: bool


@dataclass(frozen=True)
class Responses:
    """Request for greedy responses to a side's prompts, decoded until `decided` where that is given."""

    side: str  # "target" or "contrast"
    decided: Decided | None = None


@dataclass(frozen=True)
class Divergence:
    """Request for KL(original || edited), in nats, at every token of the original's responses."""

    side: str = "contrast"


Request = Responses | Divergence


@dataclass
class Evidence:
    """The engine's answers for one candidate, by side: lists over the prompts of that side."""

    responses: dict[str, list[Response]] = field(default_factory=dict)
    divergence: dict[str, list[Tensor]] = field(default_factory=dict)
