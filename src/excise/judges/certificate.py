"""How far a judge's verdicts agree with people's: recall of each verdict, and Cohen's kappa. Pure maths.

The interval of kappa is Cohen's own (1960), (p - e) / (1 - e) with the chance agreement e held, but with
Wilson's interval for the agreement p, which is sound at 1 and for small n.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from excise.intervals import wilson
from excise.judges.labelled import Labelled
from excise.judges.verdicts import SHOWS, VERDICTS, Verdicts
from excise.record import CertificateRecord, ScoreRecord


@dataclass(frozen=True)
class Agreement:
    """Cohen's kappa over `n` responses, with its 95 % interval."""

    kappa: float
    n: int
    interval: tuple[float, float]

    def as_record(self) -> ScoreRecord:
        """Return it as the record states it."""
        return ScoreRecord(value=self.kappa, n=self.n, interval=self.interval)


def agreement(given: Sequence[str], true: Sequence[str]) -> Agreement:
    """Return Cohen's kappa of two lists of verdicts: (p - e) / (1 - e).

    p is the share of equal ones, e what it would be by chance with the same counts. Where both lists hold
    one and the same verdict alone, kappa is 0: nothing was told apart.
    """
    n = len(true)
    equal = sum(a == b for a, b in zip(given, true, strict=True))
    counts, known = Counter(given), Counter(true)
    chance = sum(counts[name] * known[name] for name in known) / (n * n)
    if chance == 1:
        return Agreement(0.0, n, (-1.0, 1.0))

    def kappa(share: float) -> float:
        return max(-1.0, (share - chance) / (1 - chance))

    low, high = wilson(equal, n)
    return Agreement(kappa(equal / n), n, (kappa(low), kappa(high)))


def certify(judge: Verdicts, labelled: Labelled) -> CertificateRecord:
    """Put labelled responses to a judge, and compare its verdicts with theirs.

    A response that it gives no verdict on counts against it.

    Raises:
        JudgeError: it cannot be asked.
    """
    given = [verdict or "" for verdict in judge.verdicts(labelled.exchanges)]
    true = labelled.verdicts
    recall = {}
    for name in VERDICTS:
        mine = [g == name for g, t in zip(given, true, strict=True) if t == name]
        if mine:
            share, interval = sum(mine) / len(mine), wilson(sum(mine), len(mine))
            recall[name] = ScoreRecord(value=share, n=len(mine), interval=interval)
    shows = [[v == SHOWS for v in some] for some in (given, true)]
    both = agreement(*([str(flag) for flag in some] for some in shows))
    confusion = Counter(zip(true, given, strict=True))
    return CertificateRecord(
        labelled=labelled.source,
        sha256=labelled.sha256,
        n=len(true),
        recall=recall,
        kappa=agreement(given, true).as_record(),
        kappa_shows=both.as_record(),
        confusion={t: {g or "none": confusion[t, g] for g in (*VERDICTS, "") if confusion[t, g]}
                   for t in VERDICTS if t in true},
    )  # fmt: skip
