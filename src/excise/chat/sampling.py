"""How the next token is chosen, and how likely the first ones were.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from excise.errors import ConfigError, MeasurementError

HOTTEST = 5.0
LONGEST = 1 << 15  # tokens of a response
SHOWN = 5  # tokens whose probabilities are told


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled.

    Attributes:
        temperature: 0 takes the likeliest token.
        limit: most tokens of a response.
        seed: of the noise.

    Raises:
        ConfigError: one of them is out of its range.
    """

    temperature: float = 0.0
    limit: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= HOTTEST:
            raise ConfigError(f"the temperature must be between 0 and {HOTTEST:g}")
        if not 1 <= self.limit <= LONGEST:
            raise ConfigError(f"a response can have between 1 and {LONGEST} tokens")
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError("the seed must be a number of at most 63 bits, and not below 0")


class Dice:
    """The noise of one answer: the same for every row, and a function of seed and answer alone.

    With equal noise, rows of equal logits say the same: two columns differ by their edits, never by luck,
    and what a column says does not depend on which others stand beside it.
    """

    def __init__(self, sampling: Sampling, answer: int) -> None:
        self._temperature = sampling.temperature
        self._draw = torch.Generator().manual_seed((sampling.seed * 1_000_003 + answer) % (1 << 63))

    def next(self, logits: Tensor) -> Tensor:
        """Draw the next token (B,) from softmax(logits / temperature), logits (B, V).

        By the maximum of logits with Gumbel noise (Maddison, Tarlow and Minka 2014).
        """
        if self._temperature == 0:
            return logits.argmax(-1)
        uniform = torch.rand(logits.shape[-1], generator=self._draw, dtype=torch.float64)
        noise = -(-uniform.clamp_min(1e-300).log()).log()  # (V,)
        return (logits.double() / self._temperature + noise.to(logits.device)).argmax(-1)


def check_logits(logits: Tensor) -> None:
    """Refuse logits that are not finite.

    Raises:
        MeasurementError: they are not.
    """
    if not bool(torch.isfinite(logits.max(-1).values).all()):
        raise MeasurementError("the model's logits are not finite: this edit breaks it")


def likeliest(logits: Tensor) -> list[list[tuple[int, float]]]:
    """Return per row the likeliest tokens with their probabilities, of logits (B, V)."""
    shares, tokens = logits.softmax(-1).topk(min(SHOWN, logits.shape[-1]))
    return [
        list(zip(row, some, strict=True))
        for row, some in zip(tokens.tolist(), shares.tolist(), strict=True)
    ]
