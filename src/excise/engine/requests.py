"""What scorers may ask of the engine, and what they get back.

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
    """Ask for greedy responses to a role's prompts, decoded until `decided` where that is given."""

    side: str  # "target" or "contrast"
    decided: Decided | None = None


@dataclass(frozen=True)
class Divergence:
    """Ask for KL(original || edited) at every token of the original's response to each prompt."""

    side: str = "contrast"


Request = Responses | Divergence


@dataclass
class Evidence:
    """The engine's answers for one candidate, by side: lists over the prompts of that side."""

    responses: dict[str, list[Response]] = field(default_factory=dict)
    divergence: dict[str, list[Tensor]] = field(default_factory=dict)
