"""The methods beside each other on the demo model, whose true answers are known.

    python bench/methods.py run METHOD[,METHOD...] --seeds 0 1 2 --objectives drift drift_first
    python bench/methods.py page

`run` adds to `bench/methods.json`, one entry per study, so that studies can be run one at a time; `page`
writes `docs/methods.md` and its plot from whatever is there. A variant is METHOD+NAME (see VARIANTS).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import ridge_variants

from excise import events, stage
from excise.config import Config, load_config
from excise.front import hypervolume
from excise.loading import load
from excise.panel import Panel
from excise.pipeline import run
from excise.planning import from_dict
from excise.prompts import load_prompt_sets
from excise.record import Record, Scores

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "methods.json"
UNSEEN = "unseen objects"
LEAST = 1e-5  # drifts below this are as good as none

# Settings of a study beyond its method's name. Refinement is part of the 200 trials, not on top.
VARIANTS: dict[str, dict[str, Any]] = {
    "refine": {"search.refine": 8},
    "short": {"search.trials": 100, "ara.iterations": 20},
    "prototypes": {"subspace.kind": "prototypes"},
}


def volume(points: Sequence[tuple[float, float]]) -> float:
    """Share of the square rate 0..1, log drift 1e-5..1 that a front beats."""
    placed = [(rate, (math.log10(max(d, LEAST)) + 5) / 5) for rate, d in points if d < 1]
    return hypervolume(placed, (1.0, 1.0))


def job(name: str, seed: int, objective: str, trials: int) -> Config:
    method, _, variant = name.partition("+")
    flags: dict[str, Any] = {
        "method": method,
        "model.source": "demo",
        "seed": seed,
        "search.trials": trials,
        "scores.objectives": ["behaviour_rate", objective],
        "scores.report": ["drift", "drift_first"],
        "export.formats": [],
        **VARIANTS.get(variant, {}),
    }
    flags["search.trials"] -= int(flags.get("search.refine", 0))
    return load_config(behaviour="demo", flags=flags)


def study(name: str, seed: int, objective: str, trials: int) -> dict[str, Any]:
    """One search; its front measured again on the holdout, truth included."""
    variant = name.partition("+")[2]
    if variant in ridge_variants.NAMES:
        ridge_variants.install(variant)
    config = job(name, seed, objective, trials)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        record = run(config, out)
        spent = time.perf_counter() - begun
        held = on_holdout(record, out, config)
    front = [record.trial(n) for n in record.front]
    at = record.front.index(record.chosen().number)
    return {
        "trials": len(record.trials),
        "failed": sum(t.state == "failed" for t in record.trials),
        "seconds": round(spent),
        "edits_ms": round(
            1e3 * sum(t.seconds["edits"] for t in record.trials) / len(record.trials), 2
        ),
        "front": [values(t.scores) for t in front],
        "holdout": [values(s) for s in held],
        "chosen": at,
        "final": {k: record.final[k].value for k in ("restored", "kept")},
        "original": values(record.holdout_baseline),
    }


def values(scores: Scores) -> dict[str, float]:
    """Plain values; those of the holdout also on the unseen objects alone."""
    out = {}
    for name, score in scores.items():
        out[name] = score.value
        if score.parts and UNSEEN in score.parts:
            out[f"{name}, unseen"] = score.parts[UNSEEN].value
    return out


def on_holdout(record: Record, out: Path, config: Config) -> list[Scores]:
    """Every trial of the front on the holdout prompts."""
    loaded, sets = load(config.model), load_prompt_sets(config.prompts)
    scoring = stage.scoring(config)
    tokens = stage.stored_tokens(loaded, sets, config, scoring.markers, out)
    method = stage.stored_method(loaded, tokens, config, out, events.ignore)
    plan = from_dict(record.engine).plan
    engine = stage.engine_for(loaded, method.writers, tokens, "holdout", config, plan)
    context = scoring.context(sets.target_holdout, sets.contrast_holdout)
    panel = Panel(engine, scoring.every_trial + scoring.final, context, screen=False)
    edits = [method.edits(method.candidate(record.trial(n).params)) for n in record.front]
    return [m.scores for m in panel.measure(edits)]


def store(key: str, found: dict[str, Any]) -> None:
    results = (
        json.loads(RESULTS.read_text()) if RESULTS.exists() else {"machine": machine.describe()}
    )
    results[key] = found
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("names", nargs="?", default="")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", default=["drift"])
    parser.add_argument("--trials", type=int, default=200)
    arguments = parser.parse_args()
    if arguments.what == "page":
        import methods_page

        methods_page.write(json.loads(RESULTS.read_text()))
        return
    for name in arguments.names.split(","):
        for objective in arguments.objectives:
            for seed in arguments.seeds:
                found = study(name, seed, objective, arguments.trials)
                store(f"{name} {objective} {seed}", found)
                points = [(p["behaviour_rate"], p["drift"]) for p in found["holdout"]]
                print(name, objective, seed, found["seconds"], round(volume(points), 4), flush=True)


if __name__ == "__main__":
    main()
