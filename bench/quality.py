"""Search quality on the demo model: 200 trials, three seeds, judged on objects the search never saw."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from excise.config import load_config
from excise.record import Record, Scores
from excise.runs.pipeline import run
from excise.search.pareto import hypervolume

TRIALS = 200
SEEDS = (0, 1, 2)
UNSEEN = "unseen objects"


def one(seed: int, trials: int) -> Record:
    flags = {
        "model.source": "demo",
        "seed": seed,
        "search.trials": trials,
        "export.formats": [],
    }
    with tempfile.TemporaryDirectory() as name:
        return run(load_config(behaviour="demo", flags=flags), Path(name) / "run")


def share(scores: Scores, name: str) -> float:
    """A score on the unseen objects alone."""
    parts = scores[name].parts
    assert parts is not None
    return parts[UNSEEN].value


def summary(record: Record) -> dict[str, Any]:
    chosen = record.chosen().scores
    front = [
        (t.scores["behaviour_rate"].value, t.scores["drift"].value)
        for t in map(record.trial, record.front)
    ]
    before, after = record.holdout_baseline, record.holdout
    return {
        "seed": record.seed,
        "method": record.method,
        "trials": len(record.trials),
        "front": sorted(front),
        "hypervolume (rate to 1, drift to 0.05)": hypervolume(front, (1.0, 0.05)),
        "chosen": record.selected,
        "search": {
            "behaviour_rate": [
                record.baseline["behaviour_rate"].value,
                chosen["behaviour_rate"].value,
            ],
            "drift": chosen["drift"].value,
            "drift_first": chosen["drift_first"].value,
            "restored": record.final["restored"].value,
            "kept": record.final["kept"].value,
        },
        "holdout": {
            "behaviour_rate": [before["behaviour_rate"].value, after["behaviour_rate"].value],
            "drift": after["drift"].value,
        },
        "unseen objects": {
            "behaviour_rate": [share(before, "behaviour_rate"), share(after, "behaviour_rate")],
            "restored": [share(before, "restored"), share(after, "restored")],
            "kept": [share(before, "kept"), share(after, "kept")],
        },
    }


def main(trials: int = TRIALS) -> list[dict[str, Any]]:
    return [summary(one(seed, trials)) for seed in SEEDS]


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
