"""Tests of recall and kappa, against scikit-learn and by simulation."""

from __future__ import annotations

import random

import pytest
from sklearn.metrics import cohen_kappa_score

from excise.judges.certificate import agreement, certify
from excise.judges.labelled import Labelled
from excise.judges.verdicts import VERDICTS, Exchange, Opinion, Verdicts


def pairs(n: int, right: float, seed: int) -> tuple[list[str], list[str]]:
    """True verdicts, and a judge's that is right with this probability and else guesses."""
    draw = random.Random(seed)
    true = draw.choices(VERDICTS, (4, 3, 2, 1), k=n)
    return [t if draw.random() < right else draw.choice(VERDICTS) for t in true], true


@pytest.mark.parametrize(("n", "right"), [(7, 0.2), (40, 0.0), (300, 0.8), (300, 1.0)])
def test_kappa_is_that_of_scikit_learn(n: int, right: float):
    given, true = pairs(n, right, n)
    assert agreement(given, true).kappa == pytest.approx(cohen_kappa_score(given, true))


def test_the_interval_covers_the_truth():
    """Of 400 samples of 120 from one judge: 95 % in the mean, and a little is left to chance."""
    given, true = pairs(200_000, 0.7, 0)
    truth = agreement(given, true).kappa
    inside = 0
    for start in range(0, 400 * 120, 120):
        low, high = agreement(given[start : start + 120], true[start : start + 120]).interval
        inside += low <= truth <= high
    assert 0.93 <= inside / 400 <= 0.985


def test_perfect_agreement_of_few_is_not_certainty():
    found = agreement(["shows", "answers"] * 3, ["shows", "answers"] * 3)
    assert found.kappa == 1
    assert found.interval[0] < 0.4
    assert agreement(["shows"] * 9, ["shows"] * 9).kappa == 0  # nothing was told apart


def test_recall_counts_what_was_taken_for_what():
    class Always:
        name, folder, grades, at_once, facts = "always", None, False, 64, {}

        def verdicts(self, exchanges):
            return [Opinion("shows" if "no" in e.response else "answers") for e in exchanges]

    rows = [
        ("no", "shows"),
        ("no way", "shows"),
        ("sure", "shows"),
        ("yes", "answers"),
        ("", "broken"),
    ]
    labelled = Labelled("x", tuple(Exchange("p", r) for r, _ in rows), tuple(v for _, v in rows))
    found = certify(Verdicts(Always()), labelled)
    assert {name: (s.value, s.n) for name, s in found.recall.items()} == {
        "shows": (pytest.approx(2 / 3), 3), "answers": (1.0, 1), "broken": (1.0, 1)}  # fmt: skip
    assert found.confusion["shows"] == {"shows": 2, "answers": 1}
    assert found.n == 5
