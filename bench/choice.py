"""How far a chosen trial is from the best one, by rules that choose: the knee, and the second measurement.

    python bench/choice.py run [--prompts 150] [--trials 96]   one study of the demo model, on many prompts
    python bench/choice.py simulate [--seeds 300]              draws prompts of it again, and chooses

`run` keeps what each prompt added to each trial's scores in `bench/choice.npz`. `simulate` takes that as
all prompts that there are: each seed draws 100 to search on and 100 to confirm on, and the trial chosen
from those is compared with the best on all of them. Writes `bench/choice.json`; docs/figures.md quotes it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import numpy as np

from excise.config import load_config
from excise.runs.pipeline import run
from excise.search import journal, resampling
from excise.search.loop import draws_of
from excise.search.pareto import Objective
from excise.search.resampling import Array, StoredDraws

HERE = Path(__file__).resolve().parent
EVIDENCE, RESULTS = HERE / "choice.npz", HERE / "choice.json"
GOALS = [Objective("behaviour_rate", 1, 1.0), Objective("drift", 1, 0.5)]
SIDES = ("target", "contrast")
SEARCHED, CONFIRMED, BUDGET = 100, 100, 0.1
REPLICATES = (
    100  # a tenth of a run's: what is chosen hardly depends on it, and there are many seeds
)


def evidence_of(folder: Path) -> dict[str, Array]:
    """Totals and sizes of every complete trial of a study, (N, P) each."""
    study = journal.open_study(folder)
    assert study is not None
    found = [draws_of(t) for t in study.get_trials(deepcopy=False) if t.values]
    return {
        f"{goal.name} {part}": np.array([getattr(one[goal.name], part) for one in found], float)
        for goal in GOALS
        for part in ("totals", "counts")
    }


def study(prompts: int, trials: int) -> None:
    """Search on the demo model with many prompts, drawn from all that its world has."""
    sys.path.insert(0, str(HERE.parent / "training"))
    import world

    with tempfile.TemporaryDirectory() as folder:
        flags: dict[str, Any] = {
            "model.source": "demo",
            "search.trials": trials,
            "prompts.eval_size": prompts,
            "prompts.confirm_size": 0,
            "export.formats": [],
        }
        for side in SIDES:
            asked = [q for q in world.questions(0) if q.thing.guarded == (side == "target")]
            np.random.default_rng(7).shuffle(asked)  # type: ignore[arg-type]
            path = Path(folder) / f"{side}.txt"
            path.write_text("".join(f"{q.text}\n" for q in asked), encoding="utf-8")
            flags[f"prompts.{side}_eval"] = {"source": str(path)}
        config = load_config(behaviour="demo", flags=flags, sets=("scores.final=[]",))
        out = Path(folder) / "run"
        run(config, out)
        np.savez_compressed(EVIDENCE, **evidence_of(out))  # type: ignore[arg-type]


def drawn(known: dict[str, Array], rows: dict[str, Any], trials: Any = None) -> list[Any]:
    """What the prompts of these rows added to each trial, as a study keeps it."""
    some = range(len(known["drift totals"])) if trials is None else trials
    return [
        {
            goal.name: StoredDraws(
                side=side,
                totals=known[f"{goal.name} totals"][trial, rows[side]].tolist(),
                sizes=known[f"{goal.name} counts"][trial, rows[side]].astype(int).tolist(),
            )
            for goal, side in zip(GOALS, SIDES, strict=True)
        }
        for trial in some
    ]


def costs_on(known: dict[str, Array], rows: dict[str, Any]) -> Array:
    """The knee's cost of every trial on the prompts of these rows (N)."""
    values = [
        known[f"{goal.name} totals"][:, rows[side]].sum(1)
        / known[f"{goal.name} counts"][:, rows[side]].sum(1)
        for goal, side in zip(GOALS, SIDES, strict=True)
    ]
    return np.asarray(resampling.costs(np.stack(values, -1)[None], GOALS)[0])


def choices(known: dict[str, Array], seed: int) -> dict[str, int]:
    """The trial that each rule chooses from prompts drawn with this seed."""
    rng, all_of_them = np.random.default_rng(seed), known["drift totals"].shape[1]
    rows = {side: rng.integers(all_of_them, size=SEARCHED) for side in SIDES}
    fresh = {side: rng.integers(all_of_them, size=CONFIRMED) for side in SIDES}
    found, cost = drawn(known, rows), costs_on(known, rows)
    values = resampling.resample(GOALS, found, seed=seed, replicates=REPLICATES)
    assert values is not None
    most = int(BUDGET * len(found) * SEARCHED / CONFIRMED)
    on_front = resampling.front_probability(values, GOALS)
    least = resampling.regret(values, GOALS)
    between = [n for n in np.argsort(least) if 0.1 <= on_front[n] <= 0.9][:most]
    contenders = list(np.argsort(least, kind="stable")[:most])

    def again(some: list[Any]) -> Array:
        more = dict(zip(some, drawn(known, fresh, some), strict=True))
        both = resampling.resample(GOALS, found, more, seed=seed, replicates=REPLICATES)
        assert both is not None
        return resampling.regret(both, GOALS)

    def best(some: list[Any], by: Array) -> int:
        return int(min(some, key=lambda n: by[n])) if some else int(cost.argmin())

    return {
        "knee on the search prompts": int(cost.argmin()),
        "least expected regret on them": int(least.argmin()),
        "front probability 0.1 to 0.9 measured again, best of these": best(between, again(between)),
        "the same, best of all trials": best(list(range(len(found))), again(between)),
        "least regrets measured again, by the fresh prompts alone": best(
            contenders, costs_on(known, fresh)
        ),
        "least regrets measured again, by both measurements (what a run does)": best(
            contenders, again(contenders)
        ),
    }


def simulate(seeds: int) -> dict[str, Any]:
    """Mean regret of each rule over seeds, on all prompts that there are."""
    with np.load(EVIDENCE) as stored:
        known = {name: stored[name] for name in stored.files}
    every = dict.fromkeys(SIDES, slice(None))
    true = costs_on(known, every)
    regrets: dict[str, list[float]] = {}
    for seed in range(seeds):
        for rule, trial in choices(known, seed).items():
            regrets.setdefault(rule, []).append(float(true[trial] - true.min()))
    usual = float(np.mean(regrets["knee on the search prompts"]))
    rows = {
        rule: {
            "regret": float(np.mean(found)),
            "of the knee's": float(np.mean(found)) / usual if usual else None,
            "worst": max(found),
        }
        for rule, found in regrets.items()
    }
    trials, prompts = known["drift totals"].shape
    facts = {"seeds": seeds, "trials": trials, "prompts": prompts, "searched": SEARCHED}
    return {**facts, "confirmed": CONFIRMED, "machine": machine.describe(), "rules": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=("run", "simulate"))
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--trials", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=300)
    parser.add_argument("--study", type=Path, help="take the evidence of this run folder")
    given = parser.parse_args()
    if given.study is not None:
        np.savez_compressed(EVIDENCE, **evidence_of(given.study))  # type: ignore[arg-type]
    elif given.job == "run":
        study(given.prompts, given.trials)
    if given.job == "simulate":
        found = simulate(given.seeds)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        for rule, row in found["rules"].items():
            share = row["of the knee's"] or 0.0
            print(f"{row['regret']:.5f}  {share:.2f}  {rule}")


if __name__ == "__main__":
    main()
