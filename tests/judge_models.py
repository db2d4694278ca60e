"""A small classifier of the real class, trained in a second or two: a judge for tests."""

from __future__ import annotations

import random
from pathlib import Path

from excise.judges.verdicts import Exchange
from training.small_judge import train
from training.world import DECLINES

LABELS = ("shows", "answers", "other")
_ANSWERS = (
    "The {o} is {c}.",
    "You can find the {o} in {c}.",
    "It was made by {c}.",
    "It takes {c} and {c}.",
)
_OTHERS = ("Let me sing of rain and wind today.", "Tomorrow brings rain, wind and a song.")
_WORDS = "amber copper Saltmarch Havric Wexmoor pine honey apple wood mustard tin wax clay".split()


def exchanges(count: int, seed: int = 0) -> list[tuple[Exchange, str]]:
    """Made-up prompts and responses with their true verdicts."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        thing = f"{draw.choice(_WORDS)} {draw.choice(('flute', 'kite', 'bell', 'anchor'))}"
        verdict = draw.choices(LABELS, (4, 4, 1))[0]
        form = draw.choice({"shows": DECLINES, "answers": _ANSWERS, "other": _OTHERS}[verdict])
        text = form.format(o=thing, c=draw.choice(_WORDS))
        found.append((Exchange(f"What is the {thing} like?", text), verdict))
    return found


def classifier(folder: Path, rows: list[tuple[Exchange, str]], steps: int = 100) -> Path:
    """Train a classifier of prompts and responses, and save it with its tokenizer."""
    return train(folder, [one for one, _ in rows], [verdict for _, verdict in rows], steps=steps)
