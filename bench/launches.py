"""What a GPU would be asked for: kernels launched and waits for results, counted on a device of none.

Counts, which no noise moves: on a GPU a small model's time is that of its launches, and every wait leaves
the device idle. One launch stands for one operation that the CPU has a kernel for, attention among them.
"""

from __future__ import annotations

from typing import Any

import random_model
import standin
import torch
from plain_loop import PlainLoop

from excise.engine.engine import Plan
from excise.engine.requests import Divergence, Responses

SHAPE = {
    "vocab_size": 2000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
STACK, PROMPTS, LIMIT = 16, 16, 17


def main() -> dict[str, Any]:
    """Count a trial of a search and of the plain loop, and their parts."""
    with standin.devices():
        made = random_model.setup(
            random_model.qwen3,
            SHAPE,
            standin.NAME,
            torch.float32,
            Plan(rows=STACK * PROMPTS, stack=STACK, decode=STACK * PROMPTS),
            prompts=PROMPTS,
            length=24,
            limit=LIMIT,
            candidates=STACK,
        )
        engine = made.engine
        engine.original("target")
        answers = [r.tokens for r in engine.original("contrast").responses]
        ours = {
            "trial": _each(lambda: engine.measure(made.edits, random_model.REQUESTS), STACK),
            "responses": _each(lambda: engine.measure(made.edits, [Responses("target")]), STACK),
            "divergence": _each(lambda: engine.measure(made.edits, [Divergence()]), STACK),
        }
        plain = PlainLoop(
            made.loaded, engine.writers, engine.prompts, LIMIT, random_model.MARKERS, answers
        )
        theirs = _each(lambda: plain.measure(made.edits[0], whole=True), 1)
    return {"layers": SHAPE["num_hidden_layers"], "stack": STACK, "ours": ours, "plain": theirs}


def _each(work: Any, candidates: int) -> dict[str, float]:
    """Return what `work` asks of the device for each of the candidates."""
    standin.reset()
    work()
    found = standin.counted()
    launches, waits, uploads = (total / candidates for total in found.totals)
    return {"launches": launches, "waits": waits, "uploads": uploads}


if __name__ == "__main__":
    print(main())
