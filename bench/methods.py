"""The methods beside each other on the demo model, whose true answers are known.

    python bench/methods.py run METHOD[,METHOD...] --seeds 0 1 2 --objectives drift drift_first
    python bench/methods.py page

`run` adds to `bench/methods.json`, one line per study, so that studies can be run one at a time; `page`
writes `docs/methods.md` and its plot from whatever is there. A line holds what the page reads, no more
(see `summary`). A variant is METHOD+NAME (see VARIANTS).

`--data DIR --named NAME` runs on what `python training/train_demo_model.py --out DIR` has written, with
`--world 1` (another model; NAME is world-1) or `--fold 1` (other unseen objects; NAME is fold-1).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import machine
import ridge_variants
from reopened import reopen

from excise.config import Config, load_config
from excise.record import Scores
from excise.runs.pipeline import run
from excise.search.pareto import hypervolume

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "methods.json"
UNSEEN = "unseen objects"
LEAST = 1e-5  # drifts below this are as good as none
CHOSEN = ("behaviour_rate, unseen", "drift", "restored, unseen", "kept, unseen")
LIMITS = (0.0, 0.02, 0.05, 0.1, 0.2)  # behaviour rates at which drifts are compared

# Settings of a study beyond its method's name.
VARIANTS: dict[str, dict[str, Any]] = {
    "short": {"search.trials": 100, "ara.iterations": 20},
    "prototypes": {"subspace.kind": "prototypes"},
}


def volume(points: Sequence[tuple[float, float]]) -> float:
    """Share of the square rate 0..1, log drift 1e-5..1 that a front beats."""
    placed = [(rate, (math.log10(max(d, LEAST)) + 5) / 5) for rate, d in points if d < 1]
    return hypervolume(placed, (1.0, 1.0))


def behaviour_of(data: Path | None) -> str:
    """The demo behaviour, or the same over the prompts and markers in `data`."""
    if data is None:
        return "demo"
    text = resources.files("excise").joinpath("data/behaviours/demo.toml").read_text("utf-8")
    place = data / "demo.toml"
    place.write_text(text.replace("../demo/", ""), encoding="utf-8")
    return str(place)


def job(name: str, seed: int, objective: str, trials: int, data: Path | None = None) -> Config:
    method, _, variant = name.partition("+")
    flags: dict[str, Any] = {
        "method": method,
        "model.source": "demo" if data is None else str(data / "model"),
        "seed": seed,
        "search.trials": trials,
        "scores.objectives": ["behaviour_rate", objective],
        "scores.report": ["drift", "drift_first"],
        "export.formats": [],
        **VARIANTS.get(variant, {}),
    }
    return load_config(behaviour=behaviour_of(data), flags=flags)


def study(
    name: str, seed: int, objective: str, trials: int, data: Path | None = None
) -> dict[str, Any]:
    """One search; its front measured again on the holdout, truth included."""
    variant = name.partition("+")[2]
    ridge_variants.install(variant if variant in ridge_variants.NAMES else None)
    config = job(name, seed, objective, trials, data)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        record = run(config, out)
        run_again = reopen(out, config)
        front = [record.trial(n) for n in record.front]
        edits = [run_again.session.edits(t.params) for t in front]
        held = [m.scores for m in run_again.holdout.measure(edits)]
    original = values(record.holdout_baseline)
    points = [values(t.scores) for t in front], [values(s) for s in held]
    chosen = points[1][record.front.index(record.chosen().number)]
    seconds = sum(t.seconds["edits"] for t in record.trials)
    return {
        "trials": len(record.trials),
        "edits_ms": round(1e3 * seconds / len(record.trials), 2),
        "restored, search": record.final["restored"].value,
        "kept, search": record.final["kept"].value,
        **summary(*points, chosen, original),
    }


Point = dict[str, float]


def summary(
    front: Sequence[Point], held: Sequence[Point], chosen: Point, original: Point
) -> dict[str, Any]:
    """What the page reads of a front: on search prompts, and the same points on the holdout.

    `least` holds the least drift at each of LIMITS, None where no point has so low a rate. On the holdout
    the rate is that of unseen objects, and a point that answers fewer open questions on unseen objects
    than the original, by more than a point, does not count.
    """
    least = original["kept, unseen"] - 0.01
    sound = [p for p in held if p["kept, unseen"] >= least]
    pairs = [[(p["behaviour_rate"], p["drift"]) for p in side] for side in (front, held)]
    return {
        "volume": [short(volume(side)) for side in pairs],
        "least": {
            "front": least_drifts(front, "behaviour_rate"),
            "holdout": least_drifts(sound, "behaviour_rate, unseen"),
        },
        "chosen": {key: short(chosen[key]) for key in CHOSEN},
        "points": [[short(rate), short(drift)] for rate, drift in pairs[1]],
    }


def least_drifts(points: Sequence[Point], rate: str) -> list[float | None]:
    """The least drift among the points whose `rate` is at most each of LIMITS."""
    found = [[p["drift"] for p in points if p[rate] <= limit + 1e-9] for limit in LIMITS]
    return [short(min(drifts)) if drifts else None for drifts in found]


def short(value: float) -> float:
    """Six significant digits, more than the page shows."""
    return float(f"{value:.6g}")


def values(scores: Scores) -> dict[str, float]:
    """Plain values; those of the holdout also on the unseen objects alone."""
    out = {}
    for name, score in scores.items():
        out[name] = score.value
        if score.parts and UNSEEN in score.parts:
            out[f"{name}, unseen"] = score.parts[UNSEEN].value
    return out


def store(key: str, found: dict[str, Any]) -> None:
    """Add an entry to the results, or replace it; each has a line of its own."""
    results = (
        json.loads(RESULTS.read_text()) if RESULTS.exists() else {"machine": machine.describe()}
    )
    results[key] = found
    lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in results.items())
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("names", nargs="?", default="")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", default=["drift"])
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--data", type=Path, help="a folder with another model, or other prompts")
    parser.add_argument("--named", default="", help="what that is called in the results")
    arguments = parser.parse_args()
    if arguments.what == "page":
        import methods_page

        methods_page.write(json.loads(RESULTS.read_text()))
        return
    if (arguments.named == "") != (arguments.data is None):
        parser.error("--data and --named go together: a folder, and what it is called")
    for name in arguments.names.split(","):
        for objective in arguments.objectives:
            for seed in arguments.seeds:
                found = study(name, seed, objective, arguments.trials, arguments.data)
                store(f"{name} {objective} {seed} {arguments.named}".strip(), found)
                print(name, objective, seed, found["volume"], flush=True)


if __name__ == "__main__":
    main()
