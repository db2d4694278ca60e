"""Matrix products in bfloat16 over float32 on one CPU core, at the shapes of a small real model.

    python bench/bfloat16.py

Why a CPU searches in float32 (docs/models.md): only where this prints figures well above 1 would bfloat16
be worth a probe when a model is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import machine
import torch
from torch import Tensor, nn

SHAPES = ((576, 1536), (1536, 576), (576, 576))  # in and out features: SmolLM2-135M
ROWS = (16, 256, 2048)
WORK = 4e9  # floating-point operations of one timing
FLAGS = ("avx512_bf16", "amx_bf16")


def seconds(run: Callable[[Tensor], Tensor], x: Tensor, repeats: int) -> float:
    """CPU seconds of one product, which other work on the machine does not lengthen."""
    run(x)
    begun = time.process_time()
    for _ in range(repeats):
        run(x)
    return (time.process_time() - begun) / repeats


def speedup(rows: int, wide: int, out: int) -> tuple[float, float]:
    """The rate in float32, and that of bfloat16 over it: medians of interleaved timings."""
    x, plain = torch.randn(rows, wide), nn.Linear(wide, out, bias=False)
    short = nn.Linear(wide, out, bias=False).to(torch.bfloat16)
    operations = 2.0 * rows * wide * out
    repeats = max(5, int(WORK / operations))
    pairs = [
        (seconds(plain, x, repeats), seconds(short, x.to(torch.bfloat16), repeats))
        for _ in range(5)
    ]
    ours, theirs = (median(times) for times in zip(*pairs, strict=True))
    return operations / ours, ours / theirs


def main() -> None:
    torch.set_num_threads(1)
    words = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    print(machine.describe(), {flag: flag in words for flag in FLAGS})
    with torch.inference_mode():
        for rows in ROWS:
            for wide, out in SHAPES:
                rate, ratio = speedup(rows, wide, out)
                print(
                    f"{rows} rows, {wide} -> {out}: float32 {rate / 1e9:.0f} GFLOP/s, x {ratio:.2f}"
                )


if __name__ == "__main__":
    main()
