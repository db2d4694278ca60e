"""What each of the engine's mechanisms saves: trials a minute without it, as a share of those with all.

Run by `bench/run.py`; `python bench/mechanisms.py` prints the figures alone. Candidates are drawn at random
from the default method's space, in batches as a search asks them; the first batch teaches drafts and is not
timed. Nothing here is an option of the engine's users: a mechanism is switched off on its own engine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import optuna

from excise import events
from excise.checkpoints.loading import load
from excise.config import load_config
from excise.engine import passes
from excise.engine.batch_sizing import size, usual_length
from excise.engine.engine import Engine
from excise.engine.requests import Divergence, Responses
from excise.named_models import DEMO, SMOLLM2
from excise.prompts.sets import load_prompt_sets
from excise.runs import setup
from excise.search.scoring import scoring_of

ALL = "all of them"
# Sizes that a few minutes suffice for: the prompts of a side, the directions' prompts, candidates timed.
MODELS: dict[str, dict[str, Any]] = {
    DEMO: {"behaviour": "demo", "prompts": 100, "directions": 200, "batch": 16, "batches": 1},
    SMOLLM2: {
        "behaviour": "disclaimers",
        "prompts": 20,
        "directions": 32,
        "batch": 8,
        "batches": 1,
    },
}


class Job:
    """A model set up for its search, as the pipeline does it, and batches of random candidates."""

    def __init__(self, model: str, sizes: dict[str, Any]) -> None:
        flags = {
            "model.source": model,
            "prompts.eval_size": sizes["prompts"],
            "prompts.direction_size": sizes["directions"],
            "search.batch": sizes["batch"],
        }
        config = load_config(behaviour=sizes["behaviour"], flags=flags)
        loaded, scoring = load(config.model), scoring_of(config)
        bare = setup.open_session(
            config, loaded, load_prompt_sets(config.prompts), scoring, events.ignore
        )
        bare = setup.open_responses(bare, None)
        seen = setup.observe(bare)
        directions, _ = setup.find_directions(bare, seen)
        with tempfile.TemporaryDirectory() as folder:
            self.session = setup.prepare(bare, directions, Path(folder), seen)
        sides = [one.ids for one in self.session.sets.part("search").values()]
        usual = usual_length([len(ids) for side in sides for ids in side])
        self.plan = size(loaded, self.session.config, usual, max(map(len, sides))).plan
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=5))
        space = self.session.method.space()
        count = sizes["batch"] * (1 + sizes["batches"])
        edits = [self.session.edits(study.ask(space).params) for _ in range(count)]
        batches = [edits[at : at + sizes["batch"]] for at in range(0, count, sizes["batch"])]
        self.taught, self.timed = batches[0], batches[1:]
        self.requests: list[Responses | Divergence] = [
            Divergence(),
            Responses("target", scoring.markers.found),
        ]

    def seconds(self, without: str) -> tuple[float, float]:
        """Seconds of a taught engine for the timed batches without one mechanism: CPU time, wall time."""
        with switched_off(without):
            engine = self.session.engine("search", self.plan)
            prepare(engine, without)
            engine.original("contrast")
            with engine.keeping_drafts():
                engine.measure(self.taught, self.requests[1:])
            begun, spent = time.perf_counter(), time.process_time()
            for batch in self.timed:
                for request in self.requests:
                    engine.measure(batch, [request])
            return time.process_time() - spent, time.perf_counter() - begun


def prepare(engine: Engine, without: str) -> None:
    """Switch a mechanism off that is a fact of one engine."""
    if without == "drafts":
        engine._follows = False
    if without == "shared prefixes":
        engine._prefixes = []
    if without == "reuse of lower layers":
        engine._plan = replace(engine._plan, reuse=False)
    if without == "fused layers":
        engine._forward._fused = None


@contextmanager
def switched_off(without: str) -> Iterator[None]:
    """Switch a mechanism off that every engine shares."""
    schedule = passes.join_schedule

    def together(starts: Sequence[int]) -> list[tuple[int, int]]:
        return [(starts[0], len(starts))]

    if without == "joins per candidate":
        passes.join_schedule = together
    try:
        yield
    finally:
        passes.join_schedule = schedule


WITHOUT = (
    "fused layers",
    "drafts",
    "joins per candidate",
    "shared prefixes",
    "reuse of lower layers",
)


def table(
    model: str, repeats: int = 3, names: Sequence[str] = WITHOUT, **sizes: Any
) -> dict[str, Any]:
    """Trials a minute with everything, and without each mechanism; medians of interleaved repeats."""
    sizes = {**MODELS[model], **sizes}
    job = Job(model, sizes)
    fused = job.session.loaded.forward._fused
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in (ALL, *names)}
    for _ in range(repeats):
        for name, times in found.items():
            times.append(job.seconds(name))
            job.session.loaded.forward._fused = fused
    count = sum(map(len, job.timed))
    return {
        "sizes": {key: value for key, value in sizes.items() if key != "behaviour"},
        "plan": vars(job.plan),
        "trials_a_minute": {n: 60 * count / median(cpu for cpu, _ in t) for n, t in found.items()},
        "by_wall_time": {n: 60 * count / median(wall for _, wall in t) for n, t in found.items()},
    }


def main() -> dict[str, Any]:
    return {model: table(model) for model in MODELS}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(MODELS), nargs="+", default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, help="of a side, in place of the usual number")
    parser.add_argument("--without", nargs="+", default=list(WITHOUT), help="by name")
    arguments = parser.parse_args()
    for model in arguments.model:
        sizes = {"prompts": arguments.prompts} if arguments.prompts else {}
        found = table(model, arguments.repeats, arguments.without, **sizes)
        print(json.dumps({model: found}, indent=1), flush=True)
