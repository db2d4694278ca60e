"""What the sampler is told, compared where trials cost nothing: made-up worlds of twelve parameters.

    python bench/samplers.py [--told scores region few] [--seeds 0 1] [--trials 200]

A world says for any parameters which behaviour rate and KL divergence they have: how far the edits of all
layers move together decides the rate, in hundredths, as prompts turn one by one; what they disturb, and
how well the other parameters suit the world, decides the divergence. Worlds differ in all of it, and in
how many random trials lie in the region of interest. The search is the package's own, told

    scores    scores as they are, of all trials
    region    where in the region of interest a trial lies, of all trials
    few       the same of few trials, as runs are

Volume is the share of the region that the front beats: rate from half of the original's to 0, divergence
from 0.5 to 0.00001, logarithmic. Milliseconds are of the process's own time.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from long_search import BATCH, GOALS, space

from excise import events
from excise.config import SearchSection
from excise.methods.profiles import hill_of
from excise.record import ScoreRecord
from excise.search import sampler
from excise.search.journal import create_study
from excise.search.loop import Measured, Search
from excise.search.pareto import Objective, Point, hypervolume, pareto
from excise.search.region import Region, region_of

LAYERS = 30
WORLDS = 5
ORIGINAL = 0.76
SUITED = ("damping", "first_token", "prompt_tokens", "rank", "shared", "neighbours")
HOWS = ("scores", "region", "few")


class World:
    """One made-up world."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        centre, width = draw.uniform(0.35, 0.85) * (LAYERS - 1), draw.uniform(3, 8)
        self._where = [math.exp(-(((n - centre) / width) ** 2)) for n in range(LAYERS)]
        self._costs = [math.exp(draw.gauss(0, 0.8)) for _ in range(LAYERS)]
        self._mlp, self._mlp_cost = draw.uniform(0, 0.6), draw.uniform(0.5, 3)
        middle = draw.uniform(0.8, 1.2)
        self._turns = [draw.gauss(middle, 0.35) for _ in range(100)]
        self._best = {name: draw.uniform(0.15, 0.85) for name in SUITED}
        self._weights = {name: draw.uniform(0.4, 5) for name in SUITED}
        self._aim = {name: draw.gauss(0, 0.5) for name in SUITED}
        self._reach = (0.6, 0.35, 0.22, 0.16, 0.12)[seed % 5]
        self._half = 10 ** draw.uniform(-0.3, 0.8)
        self._scale = 10 ** draw.uniform(-5.0, -4.0)

    def measure(self, params: list[dict[str, Any]]) -> list[Measured]:
        """Measure candidates as a search asks it."""
        out = []
        for one in params:
            rate, drift = self._scores(one)
            values = {"behaviour_rate": rate, "drift": drift}
            out.append(Measured({k: ScoreRecord(value=v, n=100) for k, v in values.items()}))
        return out

    def _scores(self, one: dict[str, Any]) -> tuple[float, float]:
        shares = hill_of(one).strengths(LAYERS)
        mlp = max(0.0, one["mlp.down_proj.share"])
        off = {name: _unit(name, one[name]) - best for name, best in self._best.items()}
        half = self._half * math.exp(2 * (_unit("damping", one["damping"]) - 0.5))
        force = (1 + one["overshoot"]) * one["strength"] / (one["strength"] + half)
        reached = sum(w * s for w, s in zip(self._where, shares, strict=True))
        aimed = math.exp(-sum(self._aim[name] * far for name, far in off.items()))
        effect = self._reach * force * reached * (1 + self._mlp * mlp) * aimed
        left = sum(turn > effect for turn in self._turns) / 100
        disturbed = sum(c * s * s for c, s in zip(self._costs, shares, strict=True))
        suits = math.exp(sum(self._weights[name] * far**2 for name, far in off.items()))
        drift = self._scale * force**2 * disturbed * (1 + self._mlp_cost * mlp**2) * suits
        return round(ORIGINAL * left, 2), min(20.0, drift * (1 + 3 * drift))


def _unit(name: str, value: float) -> float:
    """Return where a parameter lies in its range, 0 to 1."""
    known: Any = space()[name]
    low, high = known.low, 1.0 if name == "shared" else known.high
    value = min(value, high)
    if known.log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return float((value - low) / (high - low))


def study(world: World, how: str, seed: int, trials: int) -> dict[str, Any]:
    """One search: what lies in the region, what its front beats of it, and what asking took."""
    region = region_of(GOALS, {"behaviour_rate": ORIGINAL})
    assert region is not None
    usual = sampler.MOST
    sampler.MOST = usual if how == "few" else trials
    try:
        with tempfile.TemporaryDirectory(prefix="excise-bench-") as folder:
            made = create_study(Path(folder), ["minimize", "minimize"], {}, {})
            search = Search(made, space(), GOALS, SearchSection(), batch=BATCH, seed=seed)
            search.aim(None if how == "scores" else region)
            search.run(60, world.measure, events.ignore)
            begun = time.process_time()
            search.run(trials, world.measure, events.ignore)
            took = time.process_time() - begun
            points = [point.values for point in search.points()]
    finally:
        sampler.MOST = usual
    late = points[60:]
    return {
        "inside": sum(map(region.holds, late)) / len(late),
        "volume": [volume(points[:n], region) for n in range(60, trials + 1, 20)],
        "milliseconds": 1e3 * took / len(late),
    }


def volume(points: Sequence[Sequence[float]], region: Region) -> float:
    """The share of the region that points beat."""
    within = [Point(n, region.told(one)) for n, one in enumerate(points) if region.holds(one)]
    front = pareto(within, [Objective(goal.name) for goal in GOALS])
    return hypervolume([(one.values[0], one.values[1]) for one in front], (1.0, 1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--worlds", type=int, nargs="+", default=list(range(WORLDS)))
    parser.add_argument("--told", nargs="+", choices=HOWS, default=HOWS)
    arguments = parser.parse_args()
    for how in arguments.told:
        found = [
            study(World(number), how, seed, arguments.trials)
            for number in arguments.worlds
            for seed in arguments.seeds
        ]
        volumes = [[round(v, 3) for v in one["volume"]] for one in found]
        row = {
            "told": how,
            "inside": [round(one["inside"], 2) for one in found],
            "volume": [one[-1] for one in volumes],
            "volume by trials": [round(mean(at), 3) for at in zip(*volumes, strict=True)],
            "milliseconds": round(mean(one["milliseconds"] for one in found), 1),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
