"""Theorems of ridge ablation: every form equals the plain dense solution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from excise.errors import MeasurementError
from excise.methods.ridge_math import (
    RidgePoint,
    RidgeStats,
    _attempt,
    basis_for,
    build,
    nearest,
    solve,
)

POINTS = [
    RidgePoint(3.0, 2.0, 4, 1e-3, 0.1, 0.05, 0.0, 99),
    RidgePoint(0.01, 1.0, 1, 0.3, 3.0, 0.5, 0.0, 99),
    RidgePoint(30.0, -1.5, 60, 1e-4, 1e-3, 1.0, 0.0, 3),
    RidgePoint(3.0, 2.0, 4, 1e-3, 0.1, 0.05, 0.7, 2),
    RidgePoint(0.3, 1.5, 4, 0.1, 1.0, 0.01, 1.0, 99),
]
ALL = [1.0, 1.0, 1.0]


def world(seed, p=12, n=15, o=10, i=30, g=3, tokens=50):
    """Captured inputs and outputs of g writers in float64, and their matrices."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    w, x, xc, kept = normal(g, o, i), normal(g, p, i) + 0.5, normal(g, n, i), normal(g, tokens, i)
    bias = normal(g, o)
    return w, bias, x, xc, kept, kept[:, : tokens // 2].roll(1, dims=-1)


def prepared(seed, *, basis=None, restore=True, **shape):
    w, bias, x, xc, kept, read = world(seed, **shape)
    y, yc = x @ w.mT + bias[:, None], xc @ w.mT + bias[:, None]
    keep = kept.mT @ kept / kept.shape[1]
    prompts = read.mT @ read / read.shape[1]
    first = xc.mT @ xc / xc.shape[1]
    seen = (lambda m: m) if basis is None else (lambda m: m @ basis.mT)
    return RidgeStats(
        basis=basis,
        keep=keep if basis is None else basis @ keep @ basis.mT,
        prompts=prompts if basis is None else basis @ prompts @ basis.mT,
        first=first if basis is None else basis @ first @ basis.mT,
        target=seen(x),
        gram=seen(x).mT @ seen(x) / x.shape[1],
        weights=seen(w),
        squares=w.square().sum(-1),
        outputs=y,
        contrast=yc,
        nearest=nearest(y, yc, 60),
        mean_diagonal=keep.diagonal(dim1=1, dim2=2).mean(-1),
        biases=bias,
        restore_norms=restore,
    )


def plain(seed, g, point, **shape):
    """delta W straight from its definition, one writer, in float64."""
    w, bias, x, xc, kept, read = (t[g] for t in world(seed, **shape))
    p, i = x.shape
    y, yc = x @ w.T + bias, xc @ w.T + bias
    keep = kept.T @ kept / len(kept)
    first, before = xc.T @ xc / len(xc), read.T @ read / len(read)
    a = keep + point.prompts * before + point.first * first + point.strength * x.T @ x / p
    a = a + point.damping * keep.diagonal().mean() * torch.eye(i, dtype=torch.float64)
    goal = []
    for row in y:
        order = (yc - row).norm(dim=1).argsort()[: point.neighbours]
        goal.append(yc[order].mean(0) - row)
    each = torch.stack(goal)
    wanted = point.overshoot * ((1 - point.shared) * each + point.shared * each.mean(0))
    left, size, right = torch.linalg.svd(wanted, full_matrices=False)
    rank = min(point.rank, len(size))
    wanted = left[:, :rank] * size[:rank] @ right[:rank]
    return point.strength / p * torch.linalg.solve(a, x.T @ wanted).T


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("shape", [{}, {"p": 40, "n": 50}, {"o": 35}, {"p": 40, "o": 60}])
def test_edits_equal_the_dense_solution(point, shape):
    stats = prepared(1, restore=False, **shape)
    w = world(1, **shape)[0]
    for g, edit in enumerate(build(stats, [0, 1, 2], point, ALL)):
        found = edit.apply_to_weight(w[g]) - w[g]
        assert relative(found, plain(1, g, point, **shape)) < 1e-8
        assert edit.left.shape[1] <= min(point.rank, *w.shape[1:])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    strength=st.floats(1e-3, 30),
    overshoot=st.floats(-4, 5),
    k=st.integers(1, 60),
    damping=st.floats(1e-4, 1),
    first=st.floats(1e-3, 10),
    prompts=st.floats(0, 1),
    shared=st.sampled_from([0.0, 0.3, 0.999, 1.0]),
    rank=st.integers(1, 20),
    share=st.floats(0, 1),
)
def test_any_candidate_equals_the_dense_solution(
    seed, strength, overshoot, k, damping, first, prompts, shared, rank, share
):
    point = RidgePoint(strength, overshoot, k, damping, first, prompts, shared, rank)
    stats = prepared(seed, restore=False)
    w = world(seed)[0]
    found = build(stats, [1], point, [share])[0].apply_to_weight(w[1]) - w[1]
    expected = share * plain(seed, 1, point)
    assert (found - expected).norm() <= 1e-8 * expected.norm() + 1e-12


def test_a_basis_that_spans_all_inputs_changes_nothing():
    w, _, x, xc, kept, read = world(2, tokens=8, i=60)
    rows = torch.cat([x, xc, kept, read], dim=1)  # 12 + 15 + 8 + 4 rows, 60 features
    basis = torch.stack([basis_for(r, 60) for r in rows])
    assert basis.shape[1] == 39
    shape = {"tokens": 8, "i": 60}
    for point in POINTS:
        stats = prepared(2, basis=basis, restore=False, **shape)
        for g, edit in enumerate(build(stats, [0, 1, 2], point, ALL)):
            found = edit.apply_to_weight(w[g]) - w[g]
            assert relative(found, plain(2, g, point, **shape)) < 1e-8


def test_in_a_smaller_basis_the_edit_is_the_best_of_those_that_lie_in_it():
    w, bias, x, xc, kept, read = (t[0] for t in world(3))
    point = POINTS[0]
    basis = basis_for(torch.cat([x, kept]), 16)[None].expand(3, -1, -1)
    edit = build(prepared(3, basis=basis, restore=False), [0], point, [1.0])[0]
    delta = edit.apply_to_weight(w) - w
    q = basis[0]
    assert relative(delta @ q.T @ q, delta) < 1e-12
    keep = kept.T @ kept / len(kept)
    b = keep + point.first * xc.T @ xc / len(xc) + point.prompts * read.T @ read / len(read)
    b = b + point.damping * keep.diagonal().mean() * torch.eye(30, dtype=torch.float64)
    y, yc = x @ w.T + bias, xc @ w.T + bias
    order = torch.cdist(y, yc).argsort(dim=1)[:, : point.neighbours]
    wanted = point.overshoot * (yc[order].mean(1) - y)

    def objective(d):
        missed = (x @ d.T - wanted).square().sum()
        return (d @ b @ d.T).trace() + point.strength / len(x) * missed

    least = objective(delta)
    draw = torch.Generator().manual_seed(0)
    for size in (1e-3, 1e-1):
        c = torch.randn(10, 16, generator=draw, dtype=torch.float64)
        assert objective(delta + size * c @ q) > least


def test_row_norms_are_restored_and_the_bias_stays():
    stats = prepared(4)
    w, bias = world(4)[:2]
    for g, edit in enumerate(build(stats, [0, 1, 2], POINTS[0], ALL)):
        edited = edit.apply_to_weight(w[g])
        assert torch.allclose(edited.norm(dim=1), w[g].norm(dim=1), rtol=1e-12)
        delta = plain(4, g, POINTS[0])
        expected = w[g] + delta
        expected = expected * (w[g].norm(dim=1) / expected.norm(dim=1))[:, None]
        assert relative(edited, expected) < 1e-8
        assert torch.allclose(edit.apply_to_bias(bias[g]), bias[g], atol=1e-12)
        x = world(4)[2][g]
        merged = x @ edited.T + bias[g]
        assert torch.allclose(edit.apply_to_output(x, x @ w[g].T + bias[g]), merged, atol=1e-9)


def test_more_strength_brings_the_outputs_nearer_to_where_they_should_go():
    stats = prepared(5, restore=False)
    w, bias, x = world(5)[:3]
    y = x[0] @ w[0].T + bias[0]
    goal = y + stats_goal(stats)
    missed = [
        float((build(stats, [0], point, [1.0])[0].apply_to_output(x[0], y) - goal).norm())
        for point in (
            RidgePoint(r, 1.0, 3, 1e-3, 0.1, 0.05, 0.0, 99) for r in (0.01, 0.1, 1.0, 10.0)
        )
    ]
    assert missed == sorted(missed, reverse=True)


def stats_goal(stats):
    from excise.methods.ridge_math import goals

    u, b = goals(stats, torch.tensor([0]), RidgePoint(1.0, 1.0, 3, 1e-3, 0.1, 0.05, 0.0, 99))
    return (u @ b)[0]


def test_with_one_goal_for_all_targets_the_edit_has_rank_one_and_is_the_limit_of_the_others():
    stats = prepared(8, restore=False)
    one, near = (
        build(stats, [0, 1, 2], RidgePoint(2.0, 1.5, 4, 1e-2, 0.5, 0.2, shared, 99), ALL)
        for shared in (1.0, 1 - 1e-9)
    )
    for a, b in zip(one, near, strict=True):
        assert a.left.shape[1] == 1 < b.left.shape[1]
        assert relative(a.left @ a.right, b.left @ b.right) < 1e-7


def test_neighbours_are_clipped_to_the_prompts_there_are():
    stats = prepared(6)
    few, many = (
        build(stats, [0], RidgePoint(1.0, 1.0, k, 1e-2, 0.1, 0.05, 0.0, 99), [1.0])[0]
        for k in (15, 60)
    )
    assert torch.equal(few.right, many.right)
    assert torch.equal(few.left, many.left)


def test_a_candidates_edit_does_not_depend_on_who_is_solved_beside_it():
    stats = prepared(7)
    alone = build(stats, [2], POINTS[0], [1.0])[0]
    together = build(stats, [0, 1, 2], POINTS[0], ALL)[2]
    assert relative(together.left @ together.right, alone.left @ alone.right) < 1e-12


def test_float32_falls_back_to_float64_where_it_is_too_coarse():
    draw = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(40, 40, generator=draw, dtype=torch.float64))
    system = ((q * torch.logspace(0, -6, 40, dtype=torch.float64)) @ q.T).float()
    system = (system + system.T) / 2
    right = torch.randn(40, 3, generator=draw)
    assert _attempt(system[None], right[None]) is None
    found = solve(system[None], right[None])[0]
    exact = torch.linalg.solve(system.double(), right.double())
    assert relative(found.double(), exact) < 1e-6


def test_a_singular_system_is_said():
    zeros = torch.zeros(1, 5, 5)
    with pytest.raises(MeasurementError, match="singular"):
        solve(zeros, torch.ones(1, 5, 2))
    broken = torch.full((1, 5, 5), float("nan"))
    with pytest.raises(MeasurementError, match="singular"):
        solve(broken, torch.ones(1, 5, 2))


@pytest.mark.parametrize(
    ("point", "value", "message"),
    [
        (POINTS[3], float("nan"), "outputs are not finite"),
        (POINTS[0], 1.7e308, "edit is not finite"),
    ],
)
def test_captures_that_are_not_finite_are_said(point, value, message):
    stats = prepared(9)
    stats.outputs[0, 0] = value
    with pytest.raises(MeasurementError, match=message):
        build(stats, [0], point, [1.0])
