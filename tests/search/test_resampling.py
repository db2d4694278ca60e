from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from excise.intervals import one_sided, ratio, wilson
from excise.search.pareto import Objective, Point, beats, knee, pareto
from excise.search.resampling import (
    Draws,
    StoredDraws,
    front_probability,
    regret,
    resample,
)

GOALS = [Objective("behaviour_rate", 1, 1.0), Objective("drift", 1, 0.5)]
grids = st.integers(2, 3).flatmap(
    lambda k: st.lists(st.lists(st.integers(0, 4), min_size=k, max_size=k), min_size=1, max_size=9)
)


def evidence(trials=6, prompts=40, seed=0):
    """Rates and drifts of trials on the same prompts: the next is stronger than the one before."""
    rng = np.random.default_rng(seed)
    hard, lengths = rng.random(prompts), rng.integers(1, 20, prompts)
    out = []
    for trial in range(trials):
        flags = (hard > trial / trials).astype(float)
        sums = lengths * rng.random(prompts) * 0.01 * (trial + 1)
        draws = {"behaviour_rate": (Draws(tuple(flags)), "target")}
        draws["drift"] = Draws.of(sums.tolist(), lengths.tolist()), "contrast"
        out.append({name: StoredDraws.of(one, side) for name, (one, side) in draws.items()})
    return out


def values_of(found):
    return [tuple(sum(e[g.name].totals) / sum(e[g.name].counts) for g in GOALS) for e in found]


@given(grids, st.lists(st.sampled_from([1, -1]), min_size=3, max_size=3))
@settings(max_examples=60, deadline=None)
def test_a_front_is_what_no_other_point_beats(grid, signs):
    goals = [Objective(f"o{k}", sign) for k, sign in zip(range(len(grid[0])), signs, strict=False)]
    points = [Point(n, tuple(map(float, row))) for n, row in enumerate(grid)]
    slow = [not any(beats(a, b, goals) for a in points) for b in points]
    assert front_probability(np.array([grid], float), goals).tolist() == slow


def test_replicates_are_of_the_same_prompts_for_every_trial():
    found = evidence()
    twice = resample(GOALS, [*found, found[2]])
    assert twice.shape == (1000, 7, 2)
    assert (twice[:, 2] == twice[:, 6]).all()
    means = twice.mean(0)
    for mean, value in zip(means, values_of(found), strict=False):
        assert mean == pytest.approx(value, abs=0.01)
    # The spread is that of the intervals: of a rate, and of a ratio.
    rate, drift = found[3]["behaviour_rate"], found[3]["drift"]
    p = sum(rate.totals) / 40
    assert twice[:, 3, 0].std() == pytest.approx((p * (1 - p) / 40) ** 0.5, rel=0.1)
    value, (_, high) = ratio(drift.totals, drift.counts)
    assert twice[:, 3, 1].std() == pytest.approx((high - value) / 1.96, rel=0.15)


def test_further_prompts_of_some_trials_count_with_the_first_ones():
    found, other = evidence(), evidence(prompts=60, seed=1)
    values = resample(GOALS, found, {1: other[1], 4: other[4]})
    plain = resample(GOALS, found)
    both = [
        {
            name: StoredDraws(
                side=a[name].side,
                totals=[*a[name].totals, *b[name].totals],
                sizes=[*a[name].counts, *b[name].counts],
            )
            for name in a
        }
        for a, b in zip(found, other, strict=True)
    ]
    for at in (1, 4):
        assert values[:, at].mean(0) == pytest.approx(values_of(both)[at], abs=0.01)
        assert (values[:, at].std(0) < plain[:, at].std(0)).all()
    assert (values[:, 0] == plain[:, 0]).all()


def test_without_evidence_of_the_same_prompts_there_are_no_replicates():
    found = evidence()
    assert resample(GOALS, [*found, {}]) is None
    assert resample(GOALS, [*found, evidence(prompts=41)[0]]) is None
    with pytest.raises(ValueError, match="do not fit"):
        StoredDraws(side="target", totals=[1.0], sizes=[1, 2])
    assert StoredDraws.of(Draws((0.0, float("nan"))), "target") is None
    assert StoredDraws.of(Draws((0.0,), (0,)), "target") is None


def test_prompts_that_do_not_count_leave_the_score_alone():
    draws = Draws.of([1.0, 0.0, 0.0, 0.0], [1, 1, 0, 0])
    goals = [Objective("kept", -1, 1.0)]
    values = resample(goals, [{"kept": StoredDraws.of(draws, "contrast")}] * 2)
    assert np.isfinite(values).all()  # some replicates hold neither of the two that count
    assert values.mean() == pytest.approx(0.5, abs=0.03)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_least_regret_of_prompts_that_are_all_drawn_is_the_knee(seed):
    values = np.random.default_rng(seed).random((1, 7, 2))
    points = [Point(n, tuple(row)) for n, row in enumerate(values[0])]
    for goals in (GOALS, [Objective("behaviour_rate"), Objective("kept", -1)]):
        found = regret(values, goals)
        assert int(found.argmin()) == knee(pareto(points, goals), goals).number
        assert found.min() == 0


def test_bounds_of_one_side():
    assert one_sided(0.1, 50, None, 0.975, share=True) == pytest.approx(wilson(5, 50), abs=1e-6)
    low, high = one_sided(0.3, 9, (0.1, 0.5), 0.95, share=False)
    assert (low, high) == pytest.approx(
        (0.3 - 0.2 * 1.6449 / 1.96, 0.3 + 0.2 * 1.6449 / 1.96), 1e-3
    )
    assert one_sided(0.3, 9, None, 0.95, share=False) == (0.3, 0.3)
