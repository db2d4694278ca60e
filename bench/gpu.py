"""The plain loop against ours on a GPU, with a model of about a billion random parameters."""

from __future__ import annotations

import json
import time
from typing import Any

import machine
import random_model
import torch
from plain_loop import PlainLoop
from speed import floor_ratio

from excise.engine.engine import Plan

PLAIN_CANDIDATES = 6
SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def main(device: str = "cuda") -> dict[str, Any]:
    made = random_model.setup(
        random_model.qwen3,
        SHAPE,
        device,
        torch.bfloat16,
        Plan(800, 8, 1600),
        prompts=100,
        length=48,
        limit=64,
        candidates=16,
    )
    requests, batch = random_model.REQUESTS, len(made.edits)
    ratio = floor_ratio(made.loaded, made.engine, made.edits, requests, batch)
    begun = time.perf_counter()
    made.engine.measure(made.edits, random_model.REQUESTS)
    machine.sync(device)
    ours = (time.perf_counter() - begun) / len(made.edits)
    engine = made.engine
    answers = [r.tokens for r in engine.original("contrast").responses]
    writers, prompts, limit = engine.writers, engine.prompts, made.limit
    plain = PlainLoop(made.loaded, writers, prompts, limit, random_model.MARKERS, answers)

    def theirs(*, whole: bool) -> float:
        begun = time.perf_counter()
        for one in made.edits[:PLAIN_CANDIDATES]:
            plain.measure(one, whole=whole)
        machine.sync(device)
        return (time.perf_counter() - begun) / PLAIN_CANDIDATES

    return {
        "parameters": sum(p.numel() for p in made.loaded.model.parameters()),
        "plain_over_ours": theirs(whole=False) / ours,
        "plain_with_whole_drift_over_ours": theirs(whole=True) / ours,
        "time_over_floor": ratio["time_over_floor"],
        "peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9,
    }


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
