"""Peak memory over the weights, with a vocabulary of Gemma 4's size: capture, responses, whole drift.

    python bench/large_vocab.py [--vocabulary 262144] [--prompts 100] [--candidates 8]

A random Gemma 4 text model of small width (per-layer embeddings, shared keys and values, soft caps) in
a process of its own. The peak is the kernel's high-water mark of resident memory, set back before each
part. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

WIDTH, LAYERS = 64, 6


def resident(field: str) -> int:
    """Bytes of /proc/self/status: VmRSS now, VmHWM at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {field} here: this bench needs Linux")


class Peak:
    """Bytes that a block takes at its highest, over what was resident when it began."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
        self.before = resident("VmRSS")
        self.bytes = 0
        return self

    def __exit__(self, *_: Any) -> None:
        self.bytes = resident("VmHWM") - self.before


def measure(
    vocabulary: int, prompts: int, candidates: int, length: int, limit: int
) -> dict[str, Any]:
    """The figures, in this process."""
    import random_model
    import torch

    from excise.capture.residuals import mean, residual_pass
    from excise.engine.engine import Plan
    from excise.engine.requests import Divergence, Responses
    from excise.prompts.tokens import batches

    shape = {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 16,
    }
    plan = Plan(rows=256, stack=candidates, decode=candidates * prompts)
    made = random_model.setup(
        random_model.gemma4,
        shape,
        "cpu",
        torch.bfloat16,
        plan,
        prompts=prompts,
        length=length,
        limit=limit,
        candidates=candidates,
    )
    loaded, engine = made.loaded, made.engine
    warm = torch.ones(1, 4, dtype=torch.long)  # buffers that any pass at all sets aside
    with torch.inference_mode():
        loaded.model(input_ids=warm)
    chunks = batches(engine.prompts["contrast"], 64, 0, loaded.device)
    with Peak() as capture:
        mean(residual_pass(loaded.anatomy, chunks, None))
    with Peak() as original:
        engine.original("contrast")
    with Peak() as drift:
        engine.measure(made.edits, [Divergence("contrast")])
    with Peak() as answers:
        engine.measure(made.edits, [Responses("target")])
    tokens = sum(len(r.tokens) for r in engine.original("contrast").responses)
    return {
        "vocabulary": vocabulary,
        "prompts": prompts,
        "candidates_of_a_stack": candidates,
        "response_tokens": tokens,
        "weights_gigabytes": round(sum(p.nbytes for p in loaded.model.parameters()) / 1e9, 3),
        "logits_of_all_positions_gigabytes": round(
            4 * vocabulary * tokens * (1 + candidates) / 1e9, 3
        ),
        "capture_gigabytes": round(capture.bytes / 1e9, 3),
        "original_responses_gigabytes": round(original.bytes / 1e9, 3),
        "whole_drift_gigabytes": round(drift.bytes / 1e9, 3),
        "responses_gigabytes": round(answers.bytes / 1e9, 3),
    }


def main(**sizes: int) -> dict[str, Any]:
    """The same in a process of its own, so that nothing else counts."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    command = [sys.executable, str(Path(__file__)), *words]
    # A malloc that gives freed memory back, so that one part's leavings are not the next one's peak.
    environment = {
        **os.environ,
        "MALLOC_TRIM_THRESHOLD_": "1048576",
        "MALLOC_MMAP_THRESHOLD_": "1048576",
    }
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--limit", type=int, default=24)
    print(json.dumps(measure(**vars(parser.parse_args())), indent=1))
