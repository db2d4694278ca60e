"""What it would save to stop a trial once it cannot stand on the front: measured without doing it.

    python bench/racing.py oracle RUN ...           from the records of finished runs, of any model
    python bench/racing.py exact --seeds 0 1 2      from whole evidence of studies of the demo model

`oracle` knows the outcome: it drops whoever an earlier front beats after a tenth of the prompts, and nobody
else; a racing that has to find that out saves less. `exact` drops a candidate once what it has met proves
it beaten: a count of shown behaviour and a sum of divergences never shrink, so a front point whose whole
counts are no higher than the candidate's so far beats it whatever comes. Prompts come in one order for all,
those first that told most in the trials before. Both take the trials as they were asked, whole scores told.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import methods
import numpy as np

from excise.engine.requests import Divergence, Evidence
from excise.report.stored_record import read_record
from excise.runs import pipeline
from excise.runs.session import Session
from excise.search.evaluation import Measures, Panel

DROPPED_AT = 0.1  # share of the prompts that a candidate of the oracle meets
LATE = 8  # tokens after which a marker comes late
BLOCKS = (0.1, 0.2, 0.4, 0.7)  # shares of both sides' prompts after which `exact` looks

Floats = np.ndarray[Any, np.dtype[np.float64]]


def front(rate: Floats, drift: Floats, among: Sequence[int]) -> list[int]:
    """The trials of `among` that no other of them beats; of equals the first."""

    def beaten(one: int) -> bool:
        return any(
            rate[other] <= rate[one]
            and drift[other] <= drift[one]
            and ((rate[other], drift[other]) != (rate[one], drift[one]) or other < one)
            for other in among
        )

    return [one for one in among if not beaten(one)]


def batches(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(count, start + size))


def report(name: str, rate: Floats, drift: Floats, costs: Floats, kept: Sequence[int]) -> None:
    """Print what was saved, and the front's volume beside that of as much work without racing."""
    affordable = range(int(costs.sum() + 1e-9))
    volumes = [
        methods.volume([(rate[n], drift[n]) for n in front(rate, drift, some)])
        for some in (affordable, kept)
    ]
    thirds = ", ".join(f"{100 * (1 - part.mean()):.0f}" for part in np.array_split(costs, 3))
    print(
        f"{name}: {len(rate)} trials, {len(rate) - len(kept)} dropped, at the cost of {costs.sum():.0f} "
        f"whole ones ({100 * (1 - costs.mean()):.0f} % saved; of each third {thirds} %); volume "
        f"{volumes[0]:.4f} -> {volumes[1]:.4f} ({100 * (volumes[1] / volumes[0] - 1):+.1f} %)"
    )


def oracle(folder: Path) -> None:
    record = read_record(folder)
    done = [trial.scores for trial in record.trials if trial.state == "complete"]
    rate, drift = (
        np.array([scores[name].value for scores in done]) for name in ("behaviour_rate", "drift")
    )
    costs, kept = np.ones(len(done)), list(range(len(done)))
    for batch in batches(len(done), record.engine["batch"]):
        before = front(rate, drift, range(batch.start))
        for one in batch:
            if any(rate[n] <= rate[one] and drift[n] <= drift[one] for n in before):
                costs[one] = DROPPED_AT
                kept.remove(one)
    report(str(folder), rate, drift, costs, kept)


@dataclass
class Whole:
    """What every trial of a study met, by prompt (trials, prompts); tokens that each prompt took."""

    shown: Floats
    said: Floats  # tokens of a response; it ends with the marker where there is one
    kl: Floats
    target: Floats
    contrast: Floats
    tokens: int  # of the original's responses, over which drift is a mean
    batch: int


class Watched:
    """An engine whose answers are kept."""

    def __init__(self, engine: Measures) -> None:
        self.engine, self.kept = engine, Evidence()

    def measure(self, candidates: Any, requests: Any) -> list[Evidence]:
        found = self.engine.measure(candidates, requests)
        for one in found:
            if isinstance(requests[0], Divergence):
                self.kept.divergence.setdefault(
                    str(len(self.kept.divergence)), one.divergence["contrast"]
                )
            else:
                self.kept.responses.setdefault(
                    str(len(self.kept.responses)), one.responses["target"]
                )
        return found


def evidence(seed: int, trials: int) -> Whole:
    """Run a study of the demo model, and keep what each of its trials met."""
    watched: list[tuple[Watched, Session]] = []
    panel = Session.panel

    def watching(self: Session, engine: Measures, part: Any, scorers: Any) -> Panel:
        watched.append((Watched(engine), self))
        return panel(self, watched[-1][0], part, scorers)

    Session.panel = watching  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as name:
            config = methods.job("ridge", seed, "drift", trials)
            batch = pipeline.run(config, Path(name) / "run").engine["batch"]
    finally:
        Session.panel = panel  # type: ignore[method-assign]
    (search, session), markers = watched[0], watched[0][1].scoring.markers
    # The first is the original, measured before the search.
    said = list(search.kept.responses.values())[1:]
    kl = list(search.kept.divergence.values())[1:]
    prompts = {side: one.ids for side, one in session.sets.part("search").items()}

    def passed(ids: Sequence[Sequence[int]], counts: Sequence[int]) -> list[int]:
        return [len(prompt) + count - 1 for prompt, count in zip(ids, counts, strict=True)]

    return Whole(
        shown=np.array([[float(markers.shown(r.text)) for r in one] for one in said]),
        said=np.array([[len(r.tokens) for r in one] for one in said]),
        kl=np.array([[float(row.sum()) for row in one] for one in kl]),
        target=np.array([passed(prompts["target"], [len(r.tokens) for r in one]) for one in said]),
        contrast=np.array(passed(prompts["contrast"], list(map(len, kl[0])))),
        tokens=sum(map(len, kl[0])),
        batch=batch,
    )


def exact(name: str, met: Whole) -> None:
    counts, sums = met.shown.sum(1), met.kl.sum(1)
    costs, kept = np.ones(len(sums)), list(range(len(sums)))
    for batch in batches(len(sums), met.batch):
        whole = [n for n in kept if n < batch.start]
        before = front(counts, sums, whole)
        told = np.argsort(-met.shown[whole].sum(0), kind="stable")
        share = met.kl[whole] / sums[whole, None].clip(1e-12)
        moved = np.argsort(-share.sum(0) / met.contrast, kind="stable")
        for one in batch if before else ():
            for block in BLOCKS:
                target, contrast = (order[: round(block * len(order))] for order in (told, moved))
                count, kl = met.shown[one, target].sum(), met.kl[one, contrast].sum()
                if any(counts[n] <= count and sums[n] <= kl for n in before):
                    spent = met.target[one, target].sum() + met.contrast[contrast].sum()
                    costs[one] = spent / (met.target[one].sum() + met.contrast.sum())
                    kept.remove(one)
                    break
    late, whole_ones = met.said[met.shown == 1], met.said[met.shown == 0]
    print(
        f"{name}: {100 * (late > LATE).mean():.0f} % of the markers end after token {LATE}, the last at "
        f"{late.max():.0f}; responses without one have {whole_ones.min():.0f} to {whole_ones.max():.0f}"
    )
    report(name, counts / met.shown.shape[1], sums / met.tokens, costs, kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("oracle", "exact"))
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=200)
    arguments = parser.parse_args()
    for folder in arguments.runs:
        oracle(folder)
    for seed in arguments.seeds if arguments.what == "exact" else ():
        exact(f"demo, seed {seed}", evidence(seed, arguments.trials))


if __name__ == "__main__":
    main()
