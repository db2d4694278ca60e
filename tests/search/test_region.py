"""The region of interest: what lies in it, and that what the sampler is told keeps it there."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excise.search.pareto import Objective, Point, beats
from excise.search.region import CEILING, FLOOR, Edges, Region, region_of

RATE, DRIFT = Objective("behaviour_rate", 1, 1.0), Objective("drift", 1, 0.5)
LESS = [Objective("a"), Objective("b")]
REGION = region_of([RATE, DRIFT], {"behaviour_rate": 0.8, "drift": 0.0})
SCORES = st.tuples(st.integers(0, 100).map(lambda n: n / 100), st.floats(0, 20))


def point(told) -> Point:
    return Point(0, tuple(told))


def test_a_user_considers_at_most_half_of_the_original_rate():
    assert REGION.holds((0.4, CEILING))
    assert REGION.holds((0.0, 0.0))
    assert not REGION.holds((0.41, 0.001))
    assert not REGION.holds((0.1, 1.01 * CEILING))


@given(SCORES, SCORES)
def test_nothing_that_lies_outside_beats_what_lies_within(a, b):
    if REGION.holds(a) and not REGION.holds(b):
        assert not beats(point(REGION.told(b)), point(REGION.told(a)), LESS)


@given(SCORES, SCORES)
def test_within_the_region_no_better_trial_is_told_as_a_worse_one(a, b):
    if REGION.holds(a) and REGION.holds(b) and beats(point(a), point(b), LESS):
        assert all(x <= y for x, y in zip(REGION.told(a), REGION.told(b), strict=True))


@given(SCORES)
def test_what_is_told_is_finite_and_within_one_exactly_where_the_region_is(values):
    told = REGION.told(values)
    assert all(math.isfinite(one) and one >= 0 for one in told)
    # Next to the edge, rounding may put a trial on it.
    if max(told) < 1:
        assert REGION.holds(values)
    if max(told) > 1:
        assert not REGION.holds(values)


def test_further_outside_is_worse_and_below_the_floor_nothing_is_gained():
    middle = math.sqrt(FLOOR * CEILING)
    outside = [REGION.told(v) for v in ((0.4, middle), (0.5, middle), (0.8, middle))]
    assert outside == [(1.0, 0.5), (1.25, 0.75), (2.0, 1.5)]
    assert REGION.told((0.8, CEILING**2 / FLOOR)) == (3.0, 3.0)
    assert REGION.told((0.1, 0.0)) == REGION.told((0.1, FLOOR)) == (0.25, 0.0)


def test_what_is_maximised_is_wanted_high():
    more = region_of([Objective("behaviour_rate", -1, 1.0), DRIFT], {"behaviour_rate": 0.2})
    assert more.holds((0.6, 0.1))
    assert not more.holds((0.59, 0.1))
    assert more.told((1.0, FLOOR)) == (0.0, 0.0)
    kept = region_of([Objective("kept", -1, 1.0), DRIFT], {"kept": 0.9})
    assert kept.told((0.75, FLOOR)) == (0.25, 0.0)


@pytest.mark.parametrize(
    ("objectives", "original"),
    [
        ([RATE, Objective("politeness", -1)], {"behaviour_rate": 0.8}),
        ([RATE, DRIFT], {"behaviour_rate": 0.0}),  # there is nothing to remove
        ([RATE, Objective("drift", -1)], {"behaviour_rate": 0.8}),  # nobody's region
    ],
)
def test_without_a_known_range_of_every_objective_there_is_no_region(objectives, original):
    assert region_of(objectives, original) is None


def test_edges_that_are_none_are_told_apart():
    assert all(edge.sound for edge in REGION.edges)
    bad = [Edges(1, 1), Edges(math.nan, 1), Edges(0, 1, log=True), Edges(-1, 1, log=True)]
    assert not any(edge.sound for edge in bad)
    assert Region((Edges(0, 1),)).told((0.5,)) == (0.5,)
