"""A search whose trials are measured in no time: two objectives of the parameters alone."""

from __future__ import annotations

from excise.config import SearchSection
from excise.events import ignore
from excise.methods.search_space import distributions
from excise.record import ScoreRecord
from excise.search import journal
from excise.search.loop import Measured, Search
from excise.search.pareto import Objective

COMPONENTS = ("attn.o_proj", "mlp.down_proj")
GOALS = [Objective("behaviour_rate", 1, 1.0), Objective("drift", 1, 0.5)]
SPACE = distributions(COMPONENTS, 9)
SECTION = SearchSection(startup_trials=12)


def toy(params):
    """Two smooth objectives that disagree, of parameters alone."""
    out = []
    for one in params:
        x = one["attn.o_proj.max_weight"]
        y = one["mlp.down_proj.max_weight"]
        scores = {
            "behaviour_rate": ScoreRecord(value=(x - 1.5) ** 2 + 0.1 * y**2, n=10),
            "drift": ScoreRecord(value=(x - 0.8) ** 2 + 0.2 * (y - 1) ** 2, n=10),
        }
        out.append(Measured(scores, {"drift": 0.1}))
    return out


class Watch:
    """A clock that a search takes with it: every batch that is measured takes `seconds`."""

    def __init__(self, seconds):
        self.now, self.seconds = 0.0, seconds

    def __call__(self):
        return self.now

    def toy(self, params):
        self.now += self.seconds
        return toy(params)


def search_in(folder, batch=8, seed=0, **more):
    if (folder / journal.FILE).exists():
        study = journal.open_study(folder)
    else:
        study = journal.create_study(
            folder, ["minimize", "minimize"], {"model": "a"}, {"batch": batch}
        )
    return Search(study, SPACE, GOALS, SECTION, batch=batch, seed=seed, **more)


def trials(search):
    return [(t.number, t.state, t.params, t.scores) for t in search.records()]


def whole(tmp_path, count, **kwargs):
    tmp_path.mkdir(exist_ok=True)
    search = search_in(tmp_path, **kwargs)
    search.run(count, toy, ignore)
    return trials(search)
