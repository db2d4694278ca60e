"""What a search of thousands of trials costs beside its measurements: asking, and reading it again.

    python bench/long_search.py

Trials are drawn at random and scored by two formulas in no time, in ridge's search space of twelve
parameters. Milliseconds are of the process's own time (`time.process_time`), so that other processes
change them little.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from excise import events
from excise.config import SearchSection
from excise.methods.search_space import hill
from excise.record import ScoreRecord
from excise.search.journal import create_study, open_study
from excise.search.loop import Measured, Search, importance
from excise.search.pareto import Objective, pareto
from excise.search.region import region_of
from excise.search.stored_study import check_study

COUNTS = (200, 1000, 3359)  # the last is that of a published study
BATCH = 16
GOALS = [Objective("behaviour_rate", 1, 1.0), Objective("drift", 1, 0.5)]


def space() -> dict[str, BaseDistribution]:
    """Twelve parameters, as ridge has them on a model of 30 layers."""
    return {
        **hill(30),
        "mlp.down_proj.share": FloatDistribution(-0.5, 1.0),
        "strength": FloatDistribution(0.03, 30.0, log=True),
        "overshoot": FloatDistribution(0.0, 4.0),
        "neighbours": IntDistribution(1, 60),
        "damping": FloatDistribution(0.01, 1.0, log=True),
        "first_token": FloatDistribution(0.1, 10.0, log=True),
        "prompt_tokens": FloatDistribution(0.01, 1.0, log=True),
        "rank": IntDistribution(1, 8, log=True),
        "shared": FloatDistribution(0.0, 1.2),
    }


def measure(params: list[dict[str, Any]]) -> list[Measured]:
    """More strength leaves less behaviour and costs more, with chance in both, as in real searches."""
    out = []
    for one in params:
        draw = random.Random(json.dumps(one, sort_keys=True))
        force = one["strength"] * (1 + one["overshoot"])
        rate = 1 / (1 + (force / draw.uniform(1, 9)) ** 2)
        drift = 1e-5 * force**1.5 * draw.uniform(1, 30)
        values = {"behaviour_rate": round(rate, 2), "drift": drift, "drift_first": drift / 3}
        scores = {name: ScoreRecord(value=value, n=100) for name, value in values.items()}
        out.append(Measured(scores, {"edits": 0.01, "drift": 0.1, "responses": 0.2}))
    return out


def search_of(folder: Path, random_trials: int) -> Search:
    """The search in a folder, which is made where there is none; so many trials are random."""
    study = open_study(folder) or create_study(folder, ["minimize", "minimize"], {}, {})
    section = SearchSection(startup_trials=random_trials)
    search = Search(study, space(), GOALS, section, batch=BATCH, seed=0)
    search.aim(region_of(GOALS, {"behaviour_rate": 0.9}))
    return search


def milliseconds(work: Callable[[], object]) -> float:
    """Return how long some work takes."""
    begun = time.process_time()
    work()
    return 1e3 * (time.process_time() - begun)


def costs(folder: Path, count: int) -> dict[str, float]:
    """What a study of so many trials costs, in milliseconds; the sampler and the journal by trial."""
    search_of(folder, count).run(count, measure, events.ignore)
    search = search_of(folder, 60)
    search.run(count + BATCH, measure, events.ignore)  # what is done once after opening is done
    total = count + 3 * BATCH
    asked = milliseconds(lambda: search.run(total, measure, events.ignore))
    study = search.study

    def opened() -> None:
        again = open_study(folder)
        assert again is not None
        check_study(again, space(), GOALS, "")
        Search(again, space(), GOALS, SearchSection(), batch=BATCH, seed=0).records()

    return {
        "a trial": asked / (2 * BATCH),
        "opening the study": milliseconds(opened),
        "the front": milliseconds(lambda: pareto(search.points(), GOALS)),
        "importance of the parameters": milliseconds(lambda: importance(study, GOALS)),
    }


def main() -> dict[str, Any]:
    """Costs by the number of trials."""
    out = {}
    for count in COUNTS:
        with tempfile.TemporaryDirectory(prefix="excise-bench-") as folder:
            found = costs(Path(folder), count)
        out[str(count)] = {what: round(value, 1) for what, value in found.items()}
    return out


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
