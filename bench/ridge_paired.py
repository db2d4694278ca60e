"""The same random candidates of ridge ablation with one thing changed, on the demo model's holdout.

    python bench/ridge_paired.py [--candidates 40]

A study searches again for every setting, so its fronts differ by luck as well; here each candidate is
built with every setting, and the pairs are compared. Adds to `bench/methods.json`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from methods import job, store, values
from reopened import holdout_panel

from excise import events
from excise.checkpoints.loading import load
from excise.engine.batch_sizing import size
from excise.methods.registry import Method
from excise.prompts.sets import load_prompt_sets
from excise.runs import setup
from excise.search.evaluation import Panel
from excise.search.scoring import scoring_of

STACK = 8
# Candidates that leave more than this of the behaviour are of no interest to anyone.
MOST_RATE = 0.3


@dataclass(frozen=True)
class Setting:
    """One thing changed: of the configuration, or of every candidate's parameters."""

    name: str
    basis: int | None = None
    params: Mapping[str, Any] | None = None


QUESTIONS: dict[str, tuple[Setting, ...]] = {
    "rank": (
        Setting("rank 2", params={"rank": 2}),
        Setting("rank 8", params={"rank": 8}),
        Setting("full rank", params={"rank": 1_000_000}),
    ),
    "mlps": (
        Setting("MLPs as far as attention", params={"mlp.down_proj.share": 1.0}),
        Setting("half as far", params={"mlp.down_proj.share": 0.5}),
        Setting("left alone", params={"mlp.down_proj.share": 0.0}),
    ),
    "basis": (
        Setting("all dimensions"),
        Setting("basis of 64", basis=64),
        Setting("basis of 32", basis=32),
    ),
}


@cache
def prepared(basis: int | None) -> tuple[Method, Panel]:
    """Ridge with a basis of this size, or its own, and a panel over the holdout."""
    config = job("ridge", 0, "drift", 200)
    if basis is not None:
        ridge = config.ridge.model_copy(update={"basis": basis})
        config = config.model_copy(update={"ridge": ridge})
    loaded, sets = load(config.model), load_prompt_sets(config.prompts)
    bare = setup.open_session(config, loaded, sets, scoring_of(config), events.ignore)
    bare = setup.open_responses(bare)
    directions, _ = setup.find_directions(bare)
    with tempfile.TemporaryDirectory() as folder:
        session = setup.prepare(bare, directions, Path(folder), setup.observe(bare))
    return session.method, holdout_panel(session, size(loaded, config, 40, 100).plan)


def drawn(method: Method, count: int) -> list[dict[str, Any]]:
    """Random points of the method's space, the same ones for every setting."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=5))
    return [dict(study.ask(method.space()).params) for _ in range(count)]


def measured(setting: Setting, count: int) -> list[Any]:
    method, panel = prepared(setting.basis)
    points = [p | dict(setting.params or {}) for p in drawn(method, count)]
    out = []
    for first in range(0, len(points), STACK):
        edits = [method.edits(method.candidate(p)) for p in points[first : first + STACK]]
        out += [values(m.scores) for m in panel.measure(edits)]
    return out


def compared(base: Sequence[Any], other: Sequence[Any]) -> dict[str, float]:
    """What `other` has beside `base`, over the pairs of which one takes enough of the behaviour out."""
    pairs = [
        (a, b)
        for a, b in zip(base, other, strict=True)
        if min(a["behaviour_rate"], b["behaviour_rate"]) <= MOST_RATE
    ]
    return {
        "pairs": len(pairs),
        "drift": statistics.median(b["drift"] / max(a["drift"], 1e-9) for a, b in pairs),
        "rate": statistics.mean(b["behaviour_rate"] - a["behaviour_rate"] for a, b in pairs),
        "kept": statistics.mean(b["kept"] - a["kept"] for a, b in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--candidates", type=int, default=40)
    count = parser.parse_args().candidates
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for question, settings in QUESTIONS.items():
        found = {s.name: measured(s, count) for s in settings}
        base = found[settings[0].name]
        rows = {name: compared(base, other) for name, other in found.items()}
        store(f"paired {question}", {"candidates": count, "settings": rows})
        for name, row in rows.items():
            print(question, name, {k: round(v, 4) for k, v in row.items()}, flush=True)


if __name__ == "__main__":
    main()
