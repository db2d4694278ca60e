"""Ridge and ARA at the shape of Gemma 4 E4B: preparation, one candidate's edits, memory, solver.

    python bench/method_speed.py

42 layers, O = 2560, I = 2048 (attention) and 10240 (MLP), P = 400 prompts a side, 20,000 kept tokens.
Random inputs: only shapes matter for time. On a CPU `LAYERS` layers are measured, and times and bytes
are scaled to 42; every layer is the same work. Writes `bench/method_speed.json`.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from torch import Tensor

from excise.config import RidgeSection
from excise.methods import ara_math
from excise.methods.ridge import joint_basis
from excise.methods.ridge_math import RidgePoint, RidgeStats, basis_for, build, nearest

OUT = Path(__file__).resolve().parent / "method_speed.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = 42
LAYERS = ALL if DEVICE == "cuda" else 1
WIDTH, P, TOKENS, BASIS = 2560, 400, 20_000, RidgeSection().basis
FEATURES = {"attn.o_proj": 2048, "mlp.down_proj": 10240}
RANKS = (1, 8, P)  # the least, the default's largest, and all there is
EVALUATIONS = 3


def timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    machine.sync(DEVICE)
    begun = time.perf_counter()
    found = work(*arguments)
    machine.sync(DEVICE)
    return time.perf_counter() - begun, found


def inputs(seed: int, rows: int, features: int) -> Tensor:
    """Random inputs whose spectrum falls, as real ones do."""
    draw = torch.Generator(DEVICE).manual_seed(seed)
    scale = torch.linspace(0, -3, features, device=DEVICE).exp()
    return torch.randn(rows, features, generator=draw, device=DEVICE) * scale


def prepare(weight: Tensor, seed: int) -> dict[str, Tensor]:
    """One writer's statistics, from its captured rows and tokens, as the capture makes them."""
    features = weight.shape[1]
    x, xc = inputs(seed, P, features), inputs(seed + 1, P, features)
    tokens = inputs(seed + 2, TOKENS, features)
    draw = torch.randn(features, BASIS // 2, device=DEVICE)
    basis = joint_basis([x.cpu(), xc.cpu(), ((tokens @ draw).T @ tokens).cpu()], BASIS).to(DEVICE)
    z, half = tokens @ basis.T, TOKENS // 2
    written, read = z[:half], z[half:]
    first, target = xc @ basis.T, x @ basis.T
    return {
        "basis": basis,
        "keep": written.T @ written / len(written),
        "prompts": read.T @ read / len(read),
        "first": first.T @ first / P,
        "target": target,
        "gram": target.T @ target / P,
        "weights": weight @ basis.T,
        "squares": weight.square().sum(1),
        "outputs": x @ weight.T,
        "contrast": xc @ weight.T,
        "diagonal": tokens[:half].square().mean(),
    }


def ridge(features: int) -> dict[str, float]:
    """Seconds and bytes of all layers of one component."""
    weight = torch.randn(WIDTH, features, device=DEVICE) / features**0.5
    seconds, parts = timed(lambda: [prepare(weight, 10 * n) for n in range(LAYERS)])
    stacked = {key: torch.stack([p[key] for p in parts]) for key in parts[0]}
    mean = stacked.pop("diagonal")
    near = nearest(stacked["outputs"], stacked["contrast"], 60)
    stats = RidgeStats(**stacked, nearest=near, mean_diagonal=mean, biases=None, restore_norms=True)
    members, shares = list(range(LAYERS)), [1.0] * LAYERS
    scale = ALL / LAYERS
    out = {"prepare_seconds": seconds * scale}
    for rank in RANKS:
        point = RidgePoint(1.0, 2.0, 10, 1e-2, 0.1, prompts=0.1, shared=0.3, rank=rank)
        build(stats, members, point, shares)
        spent, edits = timed(build, stats, members, point, shares)
        made = sum(e.left.nbytes + e.right.nbytes for e in edits)
        out[f"rank_{rank}_edit_seconds"] = spent * scale
        out[f"rank_{rank}_edits_gb"] = made * scale / 1e9
    out["held_gb"] = sum(t.nbytes for t in stacked.values()) * scale / 1e9
    return out


def solver() -> dict[str, float]:
    """ARA on one MLP writer: reduced coordinates against the plain full matrix, the same evaluations."""
    features = FEATURES["mlp.down_proj"]
    weight = torch.randn(WIDTH, features, device=DEVICE) / features**0.5
    x, xc = inputs(1, P, features) + 0.1, inputs(2, P, features)
    basis_seconds, basis = timed(lambda: basis_for(torch.cat([x, xc]), 2 * P))
    point = ara_math.AraPoint(0.5, 0.01, 0.5, 10)
    out = {"basis_seconds": basis_seconds}
    for name, q in (("reduced", basis[None]), ("full", None)):
        stats = ara_math.prepare(weight[None], x[None], xc[None], q, None, keep_norms=True)
        ara_math.solve(stats, point, 1)
        seconds, found = timed(ara_math.solve, stats, point, EVALUATIONS)
        out[f"{name}_seconds_per_evaluation"] = seconds / found.evaluations
    for count in (40,):
        reduced = basis_seconds + count * out["reduced_seconds_per_evaluation"]
        out[f"ratio_{count}"] = count * out["full_seconds_per_evaluation"] / reduced
    out["ratio_per_evaluation"] = (
        out["full_seconds_per_evaluation"] / out["reduced_seconds_per_evaluation"]
    )
    return out


def main() -> dict[str, Any]:
    found: dict[str, Any] = {
        "machine": machine.describe(),
        "layers_measured": LAYERS,
        "basis": BASIS,
    }
    found |= {name: ridge(features) for name, features in FEATURES.items()}
    found["ara"] = solver()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else peak
    OUT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
