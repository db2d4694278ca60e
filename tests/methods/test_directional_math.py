"""Theorems of the small pure modules: directions, profiles, front, intervals, divergence."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from excise.capture import directions as d
from excise.engine.kl import kl
from excise.errors import ConfigError, MeasurementError
from excise.intervals import ratio, wilson
from excise.methods.profiles import Profile
from excise.search.pareto import (
    Objective,
    Point,
    beats,
    choose,
    hypervolume,
    knee,
    pareto,
)

GOALS = [Objective("behaviour_rate", 1, 1.0), Objective("drift", 1, 0.5)]


def test_directions_are_unit_and_along_the_difference():
    target, contrast = torch.randn(4, 8), torch.randn(4, 8)
    found = d.from_means(target, contrast)
    assert torch.allclose(found.unit.norm(dim=-1), torch.ones(4), atol=1e-6)
    cosine = torch.nn.functional.cosine_similarity(found.unit, target - contrast, dim=-1)
    assert torch.allclose(cosine, torch.ones(4), atol=1e-6)


def test_a_whole_index_is_that_layer_and_a_fraction_is_between():
    found = d.from_means(torch.randn(4, 8), torch.randn(4, 8))
    assert torch.allclose(found.at(0, 2.0), found.unit[2], atol=1e-6)
    for share in (0.5, 0.25, 0.9):
        between = d.normalise((1 - share) * found.unit[1] + share * found.unit[2])
        assert torch.allclose(found.at(0, 1 + share), between, atol=1e-6)
    assert torch.allclose(found.at(3, None), found.unit[3], atol=1e-6)


def test_projected_directions_are_orthogonal_to_the_edited_layers_contrast_mean():
    found = d.from_means(torch.randn(4, 8), torch.randn(4, 8), projected=True)
    for layer in range(4):
        assert abs(float(found.at(layer, 1.3) @ found.contrast[layer])) < 1e-6


def test_layers_that_see_no_difference_take_the_next_ones_direction():
    """As after short convolutions, which see only the template's last tokens."""
    target, contrast = torch.randn(4, 8), torch.randn(4, 8)
    target[:2] = contrast[:2] * (1 + 1e-7)
    found = d.from_means(target, contrast)
    assert torch.equal(found.unit[0], found.unit[2])
    assert torch.equal(found.unit[1], found.unit[2])
    assert torch.allclose(found.unit, d.from_means(target, contrast.clone()).unit)


def test_equal_or_broken_residuals_are_errors():
    x = torch.randn(3, 8)
    with pytest.raises(MeasurementError, match="no direction separates"):
        d.from_means(x, x.clone())
    with pytest.raises(MeasurementError, match="not finite"):
        d.from_means(x * float("nan"), x)


def test_winsorising_clamps_to_the_quantile_and_leaves_the_rest():
    x = torch.tensor([[1.0, -2.0, 3.0, -100.0, 4.0]])
    assert torch.equal(d.winsorise(x, 0.75), torch.tensor([[1.0, -2.0, 3.0, -4.0, 4.0]]))
    assert torch.equal(d.winsorise(x, 1.0), x)


def test_auc_of_separated_equal_and_reversed_sets():
    low, high = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])
    assert d.auc(high, low) == 1.0
    assert d.auc(low, high) == 0.0
    assert d.auc(low, low) == 0.5


def test_profile_peaks_falls_linearly_and_ends():
    profile = Profile(1.2, 6.0, 0.5, 3.0)
    assert profile.strength(6) == pytest.approx(1.2)
    assert profile.strength(9) == pytest.approx(0.6)
    assert profile.strength(10) == 0.0
    assert profile.strength(5) == pytest.approx(1.2 + (1 / 3) * (0.6 - 1.2))
    assert Profile(-0.2, 6.0, 0.5, 3.0).strengths(8) == [0.0] * 8


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_the_front_is_what_nothing_beats(values):
    points = [Point(i, v) for i, v in enumerate(values)]
    front = pareto(points, GOALS)
    assert front
    for point in front:
        assert not any(beats(other, point, GOALS) for other in points)
    for point in points:
        assert any(p.values == point.values or beats(p, point, GOALS) for p in front)


def test_the_front_knows_which_way_is_better():
    goals = [Objective("restored", -1), Objective("drift", 1)]
    points = [Point(0, (0.9, 0.1)), Point(1, (0.5, 0.2)), Point(2, (0.4, 0.05))]
    assert [p.number for p in pareto(points, goals)] == [0, 2]


def test_choices_under_limits_and_the_knee():
    front = [Point(0, (0.0, 0.02)), Point(1, (0.05, 0.01)), Point(2, (0.9, 0.0001))]
    assert choose("drift<=0.015", front, GOALS).number == 1
    assert choose("rate<=0.05", front, GOALS).number == 1
    assert choose("rate <= 0", front, GOALS).number == 0
    assert choose("drift<=0.00001", front, GOALS) is None
    assert knee(front, GOALS).number == 0
    for bad in ("best", "speed<=1", "drift<=abc", "drift>=1"):
        with pytest.raises(ConfigError):
            choose(bad, front, GOALS)


def test_choices_and_the_knee_where_something_is_maximised():
    goals = [Objective("behaviour_rate", -1, 1.0), Objective("drift", 1, 0.5)]
    front = [Point(0, (0.9, 0.3)), Point(1, (0.6, 0.05)), Point(2, (0.1, 0.0))]
    assert knee(front, goals).number == 1
    assert choose("rate>=0.5", front, goals).number == 1
    assert choose("drift<=0.1", front, goals).number == 1
    assert choose("drift<=0.4", front, goals).number == 0


def test_hypervolume_of_one_and_two_points():
    assert hypervolume([(0.2, 0.5)], (1.0, 1.0)) == pytest.approx(0.4)
    assert hypervolume([(0.2, 0.5), (0.5, 0.2)], (1.0, 1.0)) == pytest.approx(0.4 + 0.5 * 0.3)


def test_wilson_is_inside_zero_and_one_and_holds_the_rate():
    assert wilson(0, 100)[0] == 0.0
    assert wilson(0, 100)[1] == pytest.approx(0.0370, abs=1e-3)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-3)
    assert wilson(100, 100)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)


def test_ratio_weighs_by_tokens_and_one_response_has_no_spread():
    value, (low, high) = ratio([1.0, 4.0], [10, 20])
    assert value == pytest.approx(5 / 30)
    assert low <= value <= high
    assert ratio([2.0], [4]) == (0.5, (0.5, 0.5))


def test_the_interval_of_a_ratio_by_hand_and_where_its_values_fall():
    """Rests of the two pairs are -2/3 and 2/3: sqrt(2 / 1 * 8 / 9) / 30 is one standard error."""
    value, (low, high) = ratio([1.0, 4.0], [10, 20])
    assert (low, high) == pytest.approx(
        (value - 1.959964 * 0.0444444, value + 1.959964 * 0.0444444), rel=1e-5
    )
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(5, 60, (200, 400), generator=draw).double()
    means = 0.02 * torch.randn(200, 400, generator=draw).double().exp()  # of a response's tokens
    true = 0.02 * math.exp(0.5)
    inside = 0
    for row, size in zip(means, sizes, strict=True):
        _, (low, high) = ratio((row * size).tolist(), size.int().tolist())
        inside += low <= true <= high
    assert 0.9 <= inside / 200 <= 0.99


@given(st.integers(0, 2**16), st.floats(1e-5, 3.0))
def test_kl_equals_its_definition_in_float64(seed, size):
    g = torch.Generator().manual_seed(seed)
    p = torch.randn(3, 50, generator=g, dtype=torch.float64) * 3
    q = p + size * torch.randn(3, 50, generator=g, dtype=torch.float64)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert torch.allclose(kl(p, q.clone()), expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("low", [-80.0, -88.0, -95.0, -110.0, -300.0])
def test_a_token_that_only_the_edited_model_expects_does_not_overflow(low):
    """The original's probability of it is nothing in float32, and the ratio of the two is infinite."""
    p = torch.tensor([[0.0, low, -5.0], [0.0, -1.0, -2.0]])
    q = torch.tensor([[-5.0, 3.0, -5.0], [0.0, -1.5, -2.0]])
    exact = kl(p.double(), q.double())
    assert torch.allclose(kl(p, q).double(), exact, rtol=1e-5)
    stacked = kl(
        p, torch.stack([q, p])
    )  # candidates beside each other, as the engine measures them
    assert torch.allclose(
        stacked.double(), torch.stack([exact, torch.zeros(2).double()]), rtol=1e-5
    )


def test_a_small_kl_survives_float32():
    g = torch.Generator().manual_seed(0)
    p = torch.randn(2000, generator=g, dtype=torch.float64) * 3
    q = p + 1e-3 * torch.randn(2000, generator=g, dtype=torch.float64)
    exact = float(kl(p[None], q[None].clone()))
    log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    naive = float((log_p.exp() * (log_p - log_q)).sum())
    ours = float(kl(p.float()[None], q.float()[None]))
    assert abs(ours - exact) / exact < 0.02
    assert abs(ours - exact) < abs(naive - exact)
    assert math.isfinite(ours)
