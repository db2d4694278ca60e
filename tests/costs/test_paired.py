from __future__ import annotations

import numpy as np
import pytest

from excise.costs.paired import difference, mcnemar


def covered(draw, truth, cases=300):
    """Share of simulated comparisons whose interval holds the true difference."""
    hits = 0
    for seed in range(cases):
        before, after = draw(np.random.default_rng(seed))
        low, high = difference(before, after, seed).interval
        hits += low <= truth <= high
    return hits / cases


@pytest.mark.parametrize(
    ("n", "lose", "gain"), [(40, 0.06, 0.02), (100, 0.1, 0.1), (200, 0.01, 0.0)]
)
def test_the_interval_of_what_is_right_or_wrong_covers_the_truth(n, lose, gain):
    def draw(rng):
        before = rng.random(n) < 0.6
        flipped = rng.random(n) < np.where(before, lose, gain)
        return before.astype(float), (before ^ flipped).astype(float)

    assert covered(draw, 0.4 * gain - 0.6 * lose) >= 0.93


@pytest.mark.parametrize("n", [30, 120])
def test_the_interval_of_other_values_covers_the_truth(n):
    def draw(rng):
        hard = rng.beta(2, 2, n)
        noise = rng.gamma(2.0, 0.02, n) - 0.04
        return hard, hard - 0.03 + noise

    assert covered(draw, -0.03, cases=200) >= 0.93


def test_samples_that_change_sides_are_counted():
    before, after = [1, 1, 1, 0, 0, 1, 0, 1], [1, 0, 0, 1, 0, 0, 0, 0]
    found = difference(before, after)
    assert (found.gained, found.lost, found.n) == (1, 4, 8)
    assert found.value == pytest.approx(-3 / 8)
    assert found.p == pytest.approx(2 * 6 / 32)  # at most one head of five, on either side
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0
    assert mcnemar(0, 10) == pytest.approx(2 / 1024)


def test_nothing_changed_is_not_certain():
    found = difference([1.0] * 50, [1.0] * 50)
    low, high = found.interval
    assert found.value == 0
    assert -0.08 < low < 0 < high < 0.08


def test_pairs_are_surer_than_the_two_figures_are():
    rng = np.random.default_rng(0)
    hard = rng.random(200)
    low, high = difference(hard, hard + 0.01 * rng.random(200)).interval
    assert high - low < 0.01 < 2 * 1.96 * hard.std() / 200**0.5
    assert difference([0.5], [0.25]).interval == (-0.25, -0.25)
