"""A run's work with the shapes of Gemma 4 E4B and random weights: seconds a trial, where they go, memory.

    python bench/gpu_e4b.py                       on a GPU
    python bench/gpu_e4b.py --tiny --device cpu   the same code on a model of nothing

L = 42, D = 2560, V = 262144, with per-layer embeddings, shared keys and values and soft caps. Random
weights never end a response, so every response runs to its limit: real ones are shorter.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import contextmanager
from typing import Any

import machine
import random_model
import torch

from excise.capture.residuals import mean, residual_pass
from excise.engine.engine import Plan
from excise.engine.requests import Divergence, Responses
from excise.prompts.tokens import batches

E4B = {
    "vocab_size": 262_144,
    "hidden_size": 2560,
    "intermediate_size": 10_240,
    "num_hidden_layers": 42,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_size_per_layer_input": 256,
    "sliding_window": 512,
    "num_kv_shared_layers": 18,
}
TINY = E4B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 12,
    "head_dim": 16,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 4,
}


def gemma4_e4b(**shape: Any) -> Any:
    """Five sliding layers to a full one, as Gemma 4 has them; the last layer is a full one."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    layers = shape["num_hidden_layers"]
    kinds = ["full_attention" if n % 6 == 5 else "sliding_attention" for n in range(layers)]
    config = Gemma4TextConfig(
        **shape,
        vocab_size_per_layer_input=shape["vocab_size"],
        layer_types=kinds,
        final_logit_softcapping=30.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return Gemma4ForCausalLM(config)


class Clock:
    """Seconds by part."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Any:
        machine.sync(self.device)
        begun = time.perf_counter()
        yield
        machine.sync(self.device)
        self.seconds[name] = round(time.perf_counter() - begun, 3)


def peak(device: str) -> float | None:
    return round(torch.cuda.max_memory_allocated() / 1e9, 2) if device == "cuda" else None


def main(device: str = "cuda", *, tiny: bool = False) -> dict[str, Any]:
    prompts, length, limit, candidates = (4, 8, 4, 4) if tiny else (100, 48, 64, 16)
    made = random_model.setup(
        gemma4_e4b,
        TINY if tiny else E4B,
        device,
        torch.bfloat16,
        Plan(400, 8, 800),
        prompts=prompts,
        length=length,
        limit=limit,
        candidates=candidates,
    )
    loaded, engine, clock = made.loaded, made.engine, Clock(device)
    weights = sum(p.nbytes for p in loaded.model.parameters()) / 1e9
    chunks = batches(engine.prompts["contrast"], 64, 0, loaded.device)
    with clock.part("capture, one side"):
        mean(residual_pass(loaded.anatomy, chunks, None))
    with clock.part("the original's responses"):
        engine.original("contrast")
    engine.measure(made.edits[:1], random_model.REQUESTS)  # warm: kernels are chosen at first use
    with clock.part("responses"):
        engine.measure(made.edits, [Responses("target")])
    with clock.part("whole drift"):
        engine.measure(made.edits, [Divergence("contrast")])
    trial = (clock.seconds["responses"] + clock.seconds["whole drift"]) / candidates
    return {
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "weights_gigabytes": round(weights, 2),
        "prompts_of_a_side": prompts,
        "response_limit": limit,
        "candidates": candidates,
        "seconds_a_trial": round(trial, 3),
        "seconds": clock.seconds,
        "peak_gigabytes": peak(device),
        "shares": shares(made, device),
    }


def shares(made: random_model.Setup, device: str) -> dict[str, float]:
    """Where the time of a stack goes, by operation: the largest shares."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=kinds) as found:
        made.engine.measure(made.edits[: made.engine.fitted_plan.stack], random_model.REQUESTS)
    field = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    times = {event.key: float(getattr(event, field)) for event in found.key_averages()}
    total = sum(times.values()) or 1.0
    largest = sorted(times, key=lambda key: -times[key])[:8]
    return {key: round(times[key] / total, 3) for key in largest}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of nothing, to try this code")
    arguments = parser.parse_args()
    print(json.dumps(main(arguments.device, tiny=arguments.tiny), indent=1))
