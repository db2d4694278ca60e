"""Speed of the search, as ratios taken in one run: against a plain loop, against the arithmetic floor.

Run by `bench/run.py`; `python bench/speed.py` prints the figures alone.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import floor
import machine
import optuna
import random_model
import torch
from plain_loop import PlainLoop

from excise import events
from excise.capture.directions import Directions, normalise
from excise.checkpoints.loading import Loaded, load
from excise.config import load_config
from excise.engine.batch_sizing import Sizing, size
from excise.engine.engine import Engine, Original, Plan, Reference
from excise.engine.requests import Divergence, Responses
from excise.methods.directional_math import build, prepare
from excise.methods.profiles import from_params
from excise.methods.search_space import distributions
from excise.prompts.sets import load_prompt_sets
from excise.record import ScoreRecord
from excise.runs import setup
from excise.search.evaluation import Panel, measurer
from excise.search.journal import create_study
from excise.search.loop import Measure, Measured, Search
from excise.search.pareto import Objective
from excise.search.scoring import scoring_of

WIDE = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "global_head_dim": 256,
    "hidden_size_per_layer_input": 64,
}


class Job:
    """The demo job, set up as the pipeline sets it up."""

    def __init__(self) -> None:
        flags = {"model.source": "demo", "method": "directional"}
        self.config = load_config(behaviour="demo", flags=flags)
        self.loaded: Loaded = load(self.config.model)
        self.scoring = scoring_of(self.config)
        sets = load_prompt_sets(self.config.prompts)
        bare = setup.open_session(self.config, self.loaded, sets, self.scoring, events.ignore)
        directions, _ = setup.find_directions(bare)
        self.session = setup.prepare(bare, directions, Path(), setup.observe(bare))
        self.method = self.session.method
        self.sizing: Sizing = size(self.loaded, self.config, 32, len(sets.target_eval))

    def engine(self, plan: Plan | None = None, reference: Reference | None = None) -> Engine:
        return self.session.engine("search", plan or self.sizing.plan, reference)

    def panel(self, engine: Engine) -> Panel:
        return self.session.panel(engine, "search", self.scoring.every_trial)

    def space(self) -> dict[str, Any]:
        return distributions(
            self.loaded.anatomy.chosen(self.config.edit.components), len(self.loaded.anatomy.layers)
        )

    def candidates(self, count: int, seed: int = 5) -> list[dict[str, Any]]:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        return [study.ask(self.space()).params for _ in range(count)]


def search_seconds(job: Job, trials: int, *, whole: bool = True) -> float:
    """Seconds of a whole search, sampler and journal included.

    Without `whole`, of one whose divergence is that of first tokens alone, as the plain loop's is.
    """
    engine = job.engine()
    original = engine.original("contrast")
    if not whole:
        first = Original(
            [replace(response, tokens=response.tokens[:1]) for response in original.responses],
            [states[:1] for states in original.states],
        )
        engine = job.engine(reference=Reference({"contrast": first}, engine._forward))
    panel = job.panel(engine)
    measure = measurer(job.session.edits, panel, engine.keeping_drafts)
    return seconds_of(job, measure, trials, batch=job.sizing.batch)


def plain_seconds(job: Job, plain: PlainLoop, trials: int, *, whole: bool) -> float:
    """The same search, its candidates measured one after another by the plain loop."""

    def measure(params: list[dict[str, Any]]) -> list[Measured]:
        measured = []
        for one in params:
            rate, drift = plain.measure(job.method.edits(from_params(one)), whole=whole)
            values = {"behaviour_rate": rate, "drift": drift}
            measured.append(Measured({k: ScoreRecord(value=v, n=1) for k, v in values.items()}))
        return measured

    return seconds_of(job, measure, trials, batch=1)


def seconds_of(job: Job, measure: Measure, trials: int, *, batch: int) -> float:
    goals: list[Objective] = job.scoring.goals()
    with tempfile.TemporaryDirectory() as name:
        ways = [objective.goal for objective in job.scoring.objectives]
        study = create_study(Path(name), ways, {}, job.sizing.as_dict())
        section = job.config.search.model_copy(update={"startup_trials": trials // 3})
        search = Search(study, job.space(), goals, section, batch=batch, seed=0)
        begun = time.perf_counter()
        search.run(trials, measure, events.ignore)
        return time.perf_counter() - begun


def against_plain_loop(job: Job, trials: int) -> dict[str, Any]:
    """Trials a minute, ours over the plain loop's: whole searches of as many trials, same sampler.

    Ours is taken before the loop and after it, because a machine's speed drifts.
    """
    ours = [search_seconds(job, trials)]
    firsts = [search_seconds(job, trials, whole=False)]
    other = Job()
    prompts = other.engine().prompts
    limit = other.config.scores.max_new_tokens
    answers = [r.tokens for r in job.engine().original("contrast").responses]
    plain = PlainLoop(
        other.loaded, other.method.writers, prompts, limit, other.scoring.markers, answers
    )
    first = plain_seconds(other, plain, trials, whole=False)
    whole = plain_seconds(other, plain, trials, whole=True)
    ours.append(search_seconds(job, trials))
    firsts.append(search_seconds(job, trials, whole=False))
    return {
        "first_tokens": first / mean(firsts),
        "whole_responses": whole / mean(ours),
        "first_tokens_over_ours_of_whole_responses": first / mean(ours),
        "trials": trials,
    }


def against_floor(job: Job, count: int = 32) -> dict[str, Any]:
    """Time of a trial over the time of its unavoidable arithmetic, and where the rest goes."""
    engine = job.engine()
    edits = [job.method.edits(from_params(p)) for p in job.candidates(count)]
    pilots = [job.method.edits(from_params(p)) for p in job.candidates(job.sizing.batch, seed=6)]
    requests: list[Responses | Divergence] = [
        Responses("target", job.scoring.markers.found),
        Divergence(),
    ]
    with engine.keeping_drafts():  # of a search's first batch: other candidates than those timed
        engine.measure(pilots, requests)
    batch = job.sizing.batch
    found = floor_ratio(job.loaded, engine, edits, requests, batch, drafted=True)
    return {**found, "where": where_time_goes(job, engine, edits, requests)}


def wide_model(alike: int = 0) -> random_model.Setup:
    """Random weights of a width where matrix products dominate, as in real models."""
    return random_model.setup(
        random_model.gemma4,
        WIDE,
        "cpu",
        torch.float32,
        Plan(64, 8, 512),
        prompts=32,
        length=32,
        limit=16,
        candidates=8,
        alike=alike,
    )


def at_realistic_width() -> dict[str, Any]:
    """Time over the floor on the wide model."""
    made = wide_model()
    batch = len(made.edits)
    found = floor_ratio(made.loaded, made.engine, made.edits, random_model.REQUESTS, batch)
    return {**found, "shape": WIDE}


def beginnings() -> dict[str, float]:
    """What it saves to read once what all prompts begin with: time without over time with, by tokens."""
    ratios = {}
    for alike in (24, 64):
        made, best = wide_model(alike), {True: float("inf"), False: float("inf")}
        made.engine.original("contrast")
        known = made.engine._prefixes
        for shared in (True, False, True, False):
            made.engine._prefixes = known if shared else []
            begun = time.perf_counter()
            made.engine.measure(made.edits, random_model.REQUESTS)
            best[shared] = min(best[shared], time.perf_counter() - begun)
        ratios[str(alike)] = round(best[False] / best[True], 2)
    return ratios


def floor_ratio(
    loaded: Loaded,
    engine: Engine,
    edits: Sequence[Any],
    requests: Sequence[Any],
    batch: int,
    *,
    drafted: bool = False,
) -> dict[str, float]:
    """Best of three passes over all candidates, against `floor.trial` at a large product's rate.

    Candidates are measured `batch` at a time, as in a search: of more, those alike would share stacks.
    """
    device = loaded.device.type
    engine.original("contrast")
    costs, best, evidence = floor.Costs(loaded), float("inf"), []
    for _ in range(3):
        engine._trees.clear()
        machine.sync(device)
        begun = time.perf_counter()
        parts = [edits[start : start + batch] for start in range(0, len(edits), batch)]
        evidence = [one for part in parts for one in engine.measure(part, requests)]
        machine.sync(device)
        best = min(best, time.perf_counter() - begun)
    pairs = zip(edits, evidence, strict=True)
    work = sum(floor.trial(costs, engine, edit, found, drafted=drafted) for edit, found in pairs)
    rate = machine.matmul_rate(loaded.dtype, device)
    return {
        "time_over_floor": best / (work / rate),
        "gigaflop_per_trial": work / len(edits) / 1e9,
        "rate_gigaflop_per_second": rate / 1e9,
    }


_KINDS = {
    "matrix products": ("addmm", "mm", "bmm", "linear", "baddbmm"),
    "fused attention kernels": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_efficient_attention_forward",
        "_flash_attention_forward",
        "_scaled_dot_product_attention_math",
    ),
    "copies": ("copy_", "cat", "index", "index_select", "clone", "repeat", "gather"),
    "sums of squares and softmax": (
        "linalg_vector_norm",
        "mean",
        "pow",
        "_log_softmax",
        "sum",
        "_softmax",
        "rsqrt_",
        "rsqrt",
    ),
}


def where_time_goes(
    job: Job, engine: Engine, edits: Sequence[Any], requests: Sequence[Any]
) -> dict[str, float]:
    """Share of time by kind of operation, from torch's profiler; the rest is elementwise or Python."""
    from torch.profiler import ProfilerActivity, profile

    engine._trees.clear()
    begun = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        engine.measure(edits[: job.sizing.batch], requests)
    total = (time.perf_counter() - begun) * 1e6
    shares = dict.fromkeys([*_KINDS, "other operations"], 0.0)
    for row in profiler.key_averages():
        if not row.key.startswith("aten::"):
            continue
        name = row.key.removeprefix("aten::")
        kind = next((k for k, names in _KINDS.items() if name in names), "other operations")
        shares[kind] += row.self_cpu_time_total / total
    shares["Python and waiting"] = max(0.0, 1.0 - sum(shares.values()))
    return {kind: round(share, 3) for kind, share in shares.items()}


def growth(job: Job) -> dict[str, dict[str, float]]:
    """How time grows: each row's seconds over the first row's."""

    def relative(times: dict[str, float]) -> dict[str, float]:
        first = next(iter(times.values()))
        return {key: round(value / first, 2) for key, value in times.items()}

    trials = {str(n): search_seconds(job, n) for n in (32, 64, 128)}
    params = job.candidates(32)
    edits = [job.method.edits(from_params(p)) for p in params]
    requests: list[Responses | Divergence] = [
        Responses("target", job.scoring.markers.found),
        Divergence(),
    ]

    def seconds(stack: int, prompts: int, tokens: int, count: int = 16) -> float:
        engine = job.engine(replace(job.sizing.plan, stack=stack))
        engine.limit = tokens
        engine.original("contrast")
        with engine.keeping_drafts():
            engine.measure(edits[count:], requests)
        best = float("inf")
        for _ in range(3):
            engine._trees.clear()
            begun = time.perf_counter()
            engine.measure(edits[:count], requests, {"target": prompts, "contrast": prompts})
            best = min(best, time.perf_counter() - begun)
        return best

    return {
        "trials": relative(trials),
        "C in one stack (16 candidates in all)": relative(
            {str(c): seconds(c, 100, 32) for c in (1, 2, 4, 8, 16)}
        ),
        "prompts": relative({str(p): seconds(4, p, 32) for p in (25, 50, 100)}),
        "response length": relative({str(t): seconds(4, 100, t) for t in (4, 8, 16, 32)}),
    }


def edit_building(width: int = 2560, inner: int = 10240, layers: int = 42) -> dict[str, float]:
    """Milliseconds to build one candidate's edits at the shape of Gemma 4 E4B, down-projections."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(width, inner, device=device)
    unit = normalise(torch.randn(layers, width))
    directions = Directions(unit, normalise(torch.randn(layers, width)))
    stats = prepare([weight] * layers, list(range(layers)), directions)
    strengths = torch.ones(layers, dtype=torch.float64)
    out = {}
    for name, index in (("global index", 20.3), ("per layer", None)):
        times = []
        for _ in range(30):
            machine.sync(device)
            begun = time.perf_counter()
            build(stats, index, strengths)
            machine.sync(device)
            times.append(time.perf_counter() - begun)
        out[name] = round(1e3 * sorted(times)[len(times) // 2], 3)
    return out


def main(trials: int = 200) -> dict[str, Any]:
    job = Job()
    return {
        "sizing": job.sizing.as_dict(),
        "plain_loop": against_plain_loop(job, trials),
        "floor": against_floor(job),
        "floor_at_realistic_width": at_realistic_width(),
        "beginnings": beginnings(),
        "growth": growth(job),
        "edit_building_ms": edit_building(),
    }


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
