"""What a figure was taken on, and how fast that machine multiplies."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """The machine, in the words that stand beside every figure."""
    cuda = torch.cuda.is_available()
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations per second of a large matrix product: the best of several."""
    n = 8192 if device == "cuda" else 3072
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        sync(device)
        begun = time.perf_counter()
        a @ b
        sync(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * n**3 / best


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
