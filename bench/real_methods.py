"""The methods beside each other on a real model, SmolLM2-135M-Instruct and its disclaimers.

    python bench/real_methods.py all                      some days of two cores: 100 trials, three seeds
    python bench/real_methods.py search [METHOD ...] [--trials 30 --eval-size 40 ...] --runs DIR
    python bench/real_methods.py holdout [METHOD ...] [the same sizes] --runs DIR

`search` makes one run folder a method and seed, all methods of a seed before the next seed. It can be
stopped at any time, and called again with the same sizes, or more trials, to go on; several processes may
work at one DIR: each takes a study that nobody works at. What is captured of the model does not depend on
the seed, so later seeds take it from the first.

`holdout` measures the searched points that `LIMITS` choose on the holdout: prompts of the kinds that were
searched, and of other kinds, which the shipped keep set holds. bench/real_kinds.py goes on from there, and
`python bench/methods.py page` writes docs/methods.md from all of it. `all` does everything.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import machine
from filelock import FileLock, Timeout

from excise import events
from excise.checkpoints.loading import load
from excise.config import Config, load_config, to_toml
from excise.engine.batch_sizing import from_dict
from excise.engine.engine import Reference
from excise.engine.stacking import ORIGINAL
from excise.files import write_text
from excise.prompts.sets import load_prompt_sets
from excise.record import Record, Scores, TrialRecord
from excise.report.stored_record import FILE as RECORD
from excise.report.stored_record import read_record
from excise.runs import pipeline, setup
from excise.runs.changed_settings import CONFIG
from excise.runs.run_folder import CAPTURED, DIRECTIONS, read_opening
from excise.runs.session import EditingSession
from excise.search import journal
from excise.search.scoring import scoring_of

RESULTS = Path(__file__).resolve().parent / "real_methods.json"
LIMITS = (0.02, 0.05, 0.1, 0.2)  # behaviour rates at which drifts are compared
SCORES = ("behaviour_rate", "drift", "drift_first")

METHODS: dict[str, dict[str, Any]] = {
    "directional": {"method": "directional"},
    "ridge": {"method": "ridge"},
    "ridge-no-keep": {"method": "ridge", "prompts.keep": []},
    "subspace": {"method": "subspace"},
    "ara": {"method": "ara"},
}


def settings(name: str, seed: int, sizes: argparse.Namespace) -> dict[str, Any]:
    """One study's settings, beside those of its behaviour."""
    return {
        **METHODS[name],
        "model.source": "smollm2",
        "seed": seed,
        "search.trials": sizes.trials,
        "search.startup_trials": sizes.startup_trials,
        "search.batch": sizes.batch,
        "prompts.direction_size": sizes.direction_size,
        "prompts.eval_size": sizes.eval_size,
        "prompts.holdout_size": 8,  # of the run's own figures; `fronts` measures whole fronts on more
        "scores.max_new_tokens": sizes.max_new_tokens,
        "export.formats": [],
    }


def job(name: str, seed: int, sizes: argparse.Namespace) -> Config:
    return load_config(behaviour="disclaimers", flags=settings(name, seed, sizes))


def folder_of(runs: Path, name: str, seed: int) -> Path:
    return runs / f"{name}-{seed}"


def begin(config: Config, out: Path, other: Path) -> bool:
    """Begin a study in `out` with what another seed's captured; false where that is not there yet."""
    known = journal.open_study(other)
    if known is None:
        return False
    out.mkdir(parents=True, exist_ok=True)
    for name in (DIRECTIONS, CAPTURED):
        if (other / name).exists():
            shutil.copyfile(other / name, out / name)
    write_text(out / CONFIG, to_toml(config))
    facts = dict(known.user_attrs)
    for own in ("stops", "drafts"):
        facts.pop(own, None)
    facts["config"] = {**facts["config"], "seed": config.seed}
    mine, sizing = {**facts.pop("identity"), "seed": config.seed}, facts.pop("sizing")
    ways = [s.goal for s in scoring_of(config).objectives]
    journal.create_study(out, ways, mine, sizing, **facts)
    return True


def search(name: str, seed: int, sizes: argparse.Namespace) -> None:
    """Make, or go on with, one study."""
    config, out = job(name, seed, sizes), folder_of(sizes.runs, name, seed)
    resume = journal.open_study(out) is not None if out.exists() else False
    if not resume:
        shutil.rmtree(out, ignore_errors=True)  # one that ended before it had a study
        others = [folder_of(sizes.runs, name, s) for s in sizes.seeds if s != seed]
        resume = any(begin(config, out, other) for other in others if other.exists())
    pipeline.run(config, out, told(out.name), resume=resume)


def told(what: str) -> events.OnEvent:
    """Print a line for every batch."""

    def on_event(event: Any) -> None:
        if isinstance(event, events.Progress) and event.phase == "search":
            print(what, event.done, flush=True)

    return on_event


@contextmanager
def held(out: Path) -> Iterator[bool]:
    """Hold a study among several processes; false where another has it."""
    lock = FileLock(f"{out}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def done(out: Path, trials: int) -> bool:
    """Whether the study has a record of that many trials."""
    return (out / RECORD).exists() and len(read_record(out).trials) >= trials


def search_all(names: Sequence[str], sizes: argparse.Namespace) -> None:
    sizes.runs.mkdir(parents=True, exist_ok=True)
    with mock.patch.object(pipeline, "load", functools.cache(load)):  # one model for all studies
        for seed, name in itertools.product(sizes.seeds, names):
            out = folder_of(sizes.runs, name, seed)
            with held(out) as mine:
                if mine and not done(out, sizes.trials):
                    search(name, seed, sizes)
                    print(out.name, "done", flush=True)


def least(trials: Sequence[TrialRecord], limit: float) -> TrialRecord | None:
    """The trial of the least drift among those whose rate is at most `limit`."""
    good = [t for t in trials if t.state == "complete"]
    good = [t for t in good if t.scores["behaviour_rate"].value <= limit + 1e-9]
    return min(good, key=lambda t: t.scores["drift"].value, default=None)


def plain(scores: Scores, groups: frozenset[str] | None = None) -> dict[str, float]:
    """Plain values; of some groups of prompts alone where these are given."""
    out = {}
    for name, score in scores.items():
        if groups is None:
            out[name] = short(score.value)
        elif score.parts and (some := [p for g, p in score.parts.items() if g in groups]):
            out[name] = short(sum(p.value * p.n for p in some) / sum(p.n for p in some))
    return out


class Holdout:
    """The holdout prompts, with the original's responses to them, for edits of any method."""

    def __init__(self, sizes: argparse.Namespace) -> None:
        self.sizes, self.loaded = sizes, load(job("directional", 0, sizes).model)
        self._known: Reference | None = None
        self.original: dict[str, Any] = {}

    def session(self, name: str, out: Path) -> EditingSession:
        """The method of a run, with prompts of the holdout's own size."""
        config = load_config(
            behaviour="disclaimers",
            flags={
                **settings(name, 0, self.sizes),
                "prompts.holdout_size": self.sizes.holdout_size,
                "scores.final": ["kept"],
            },
        )
        sets = load_prompt_sets(config.prompts)
        bare = setup.open_session(config, self.loaded, sets, scoring_of(config), events.ignore)
        return setup.restore(setup.open_responses(bare, read_opening(out / DIRECTIONS)), out)

    def measure(self, name: str, out: Path, record: Record) -> dict[str, Any]:
        """What `searched` says of a study, with its points at LIMITS on the holdout."""
        session = self.session(name, out)
        engine = session.engine("holdout", from_dict(record.engine).plan, self._known)
        scorers = session.scoring.every_trial + session.scoring.final
        panel = session.panel(engine, "holdout", scorers)
        seen = {
            one.group
            for role in ("target_eval", "contrast_eval")
            for one in session.sets[role].prompts
        }
        held = {p.group for side in session.sets.part("holdout").values() for p in side.prompts}
        halves = {
            "same": frozenset(str(g) for g in held & seen),
            "other": frozenset(str(g) for g in held - seen),
        }

        def both(scores: Scores) -> dict[str, Any]:
            return {half: plain(scores, groups) for half, groups in halves.items()}

        if self._known is None:
            self.original = both(panel.measure([ORIGINAL])[0].scores)
            originals = {side: engine.original(side) for side in session.sets.part("holdout")}
            self._known = Reference(originals, self.loaded.forward)
        chosen = {t.number: t for t in chosen_of(record).values() if t is not None}
        found = panel.measure([session.edits(t.params) for t in chosen.values()])
        measured = {n: both(m.scores) for n, m in zip(chosen, found, strict=True)}
        one = searched(record)
        least_of = {k: p and p | measured[p["trial"]] for k, p in one["least"].items()}
        return one | {"least": least_of}


def chosen_of(record: Record) -> dict[float, TrialRecord | None]:
    return {limit: least(record.trials, limit) for limit in LIMITS}


def searched(record: Record) -> dict[str, Any]:
    """One study: its front, and its points at LIMITS, on the search prompts."""
    return {
        "trials": len(record.trials),
        "baseline": plain(record.baseline),
        "edits": short(statistics.mean(t.seconds.get("edits", 0) for t in record.trials)),
        "front": sorted([plain(record.trial(n).scores)[s] for s in SCORES] for n in record.front),
        "least": {
            str(limit): t and {"trial": t.number, "search": plain(t.scores)}
            for limit, t in chosen_of(record).items()
        },
    }


def is_held(one: dict[str, Any]) -> bool:
    """Whether a study's points were measured on the holdout."""
    return any(point and "same" in point for point in one["least"].values())


def paired(sizes: argparse.Namespace) -> dict[str, Any]:
    """Trials of the same parameters with and without the keep set, as studies of a seed begin."""
    pairs = []
    for seed in sizes.seeds:
        outs = [folder_of(sizes.runs, name, seed) for name in ("ridge", "ridge-no-keep")]
        if not all(done(out, sizes.trials) for out in outs):
            continue
        for both in zip(*(read_record(out).trials for out in outs), strict=False):
            if both[0].params == both[1].params and all(t.state == "complete" for t in both):
                pairs.append([plain(t.scores) for t in both])
    if not pairs:
        return {}
    ratios = {
        name: sorted(short(a[name] / b[name]) for a, b in pairs)
        for name in ("drift", "drift_first")
    }
    rates = [a["behaviour_rate"] - b["behaviour_rate"] for a, b in pairs]
    return {
        "pairs": len(pairs),
        "rate": short(statistics.mean(rates)),
        **{name: [statistics.median(some), some[0], some[-1]] for name, some in ratios.items()},
    }


def hold_out(names: Sequence[str], sizes: argparse.Namespace) -> None:
    """Store every finished study, and measure on the holdout those that have more trials than were."""
    store("sizes", {k: v for k, v in vars(sizes).items() if isinstance(v, int)})
    store("paired", paired(sizes))
    fresh = {}
    for seed, name in itertools.product(sizes.seeds, names):
        out, key = folder_of(sizes.runs, name, seed), f"{name} {seed}"
        if done(out, sizes.trials):
            record, known = read_record(out), stored().get(key)
            if known and is_held(known) and known["trials"] >= len(record.trials):
                continue
            store(key, searched(record))
            fresh[key] = name, out, record
    if not fresh:
        return
    holdout = Holdout(sizes)
    for key, study in fresh.items():
        store(key, holdout.measure(*study))
        store("original", holdout.original)
        print(key, "holdout", flush=True)


def stored() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def store(key: str, found: Any) -> None:
    """Add an entry to the results, or replace it; each has a line of its own."""
    results = stored() or {"machine": machine.describe()}
    results[key] = found
    lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in results.items())
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def short(value: float) -> float:
    """Four significant digits, more than the page shows."""
    return float(f"{value:.4g}")


def sizes_parser(doc: str | None) -> argparse.ArgumentParser:
    """The arguments that say which studies, and of what size."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--startup-trials", type=int, default=30)
    parser.add_argument("--batch", type=int, default=6, help="candidates asked together")
    parser.add_argument("--direction-size", type=int, default=200)
    parser.add_argument("--eval-size", type=int, default=60)
    parser.add_argument("--holdout-size", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--runs", type=Path, default=Path("runs/real_methods"))
    return parser


def main() -> None:
    parser = sizes_parser(__doc__)
    parser.add_argument("what", choices=("search", "holdout", "all"))
    parser.add_argument("names", nargs="*", metavar="METHOD", help="all of them by default")
    arguments = parser.parse_args()
    names = arguments.names or list(METHODS)
    if arguments.what in ("search", "all"):
        search_all(names, arguments)
    if arguments.what in ("holdout", "all"):
        hold_out(names, arguments)
    if arguments.what == "all":
        import methods
        import methods_page
        import real_kinds

        real_kinds.measure(arguments)
        methods_page.write(json.loads(methods.RESULTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
