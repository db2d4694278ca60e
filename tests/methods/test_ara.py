"""ARA: reduced coordinates have the objective and gradient of the full problem; the solver is as good."""

from __future__ import annotations

import pytest
import torch

from excise.errors import MeasurementError
from excise.methods import ara_math
from excise.methods.lbfgs import minimise
from excise.methods.ridge_math import basis_for

G, P, N, O, I = 3, 14, 16, 10, 60
POINTS = [
    ara_math.AraPoint(0.8, 0.3, 0.7, 3),
    ara_math.AraPoint(0.1, 1.0, 1.2, 1),
    ara_math.AraPoint(1.0, 1e-3, 0.0, 15),
]


def world(seed, i=I, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    return normal(G, O, i), normal(G, P, i) + 0.5, normal(G, N, i), normal(G, O)


def test_half_of_what_is_held_are_outputs_of_the_keep_set():
    w, x, xc, b = world(5)
    rows = world(6)[1]
    span = torch.stack([basis_for(torch.cat([x[g], xc[g], rows[g]]), I) for g in range(G)])
    point = POINTS[0]

    def objective(basis, keep):
        stats = ara_math.prepare(w, x, xc, basis, b, keep_norms=True, keep=keep)
        moved = w.roll(1, dims=-1) @ span.mT @ span + w - w @ span.mT @ span
        return ara_math.objective(stats, moved if basis is None else moved @ span.mT, point), moved

    (none, moved), (reduced, _) = objective(None, None), objective(span, rows)
    assert torch.allclose(objective(None, xc)[0], none)
    edited = w.norm(dim=-1, keepdim=True) * moved / moved.norm(dim=-1, keepdim=True)
    held, also = (((s @ edited.mT - s @ w.mT).square().mean((1, 2))) for s in (xc, rows))
    assert torch.allclose(reduced, none + point.preserve * (also - held) / 2)


def stats_of(seed, *, reduced=True, keep_norms=True, i=I, dtype=torch.float64):
    w, x, xc, b = world(seed, i, dtype)
    basis = None
    if reduced:
        basis = torch.stack([basis_for(torch.cat([x[g], xc[g]]), i) for g in range(G)])
    return ara_math.prepare(w, x, xc, basis, b, keep_norms=keep_norms)


def plain(w, matrix, x, xc, point, *, keep_norms):
    """The objective straight from its definition, of one writer."""
    n = w.norm(dim=1, keepdim=True)
    edited = n * matrix / matrix.norm(dim=1, keepdim=True) if keep_norms else matrix
    yt, yc, moved = x @ w.T, xc @ w.T, x @ edited.T

    def near(others):
        d = (moved[:, None] - others[None]).norm(dim=-1)
        return d.topk(min(point.neighbours, len(others)), largest=False).values.mean()

    kept = (xc @ edited.T - yc).square().mean()
    return point.preserve * kept + point.steer * (near(yc) - point.overshoot * near(yt))


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("keep_norms", [True, False])
def test_reduced_coordinates_have_the_full_objective_and_gradient(point, keep_norms):
    w, x, xc, _ = world(0)
    stats = stats_of(0, keep_norms=keep_norms)
    draw = torch.Generator().manual_seed(9)
    for _ in range(3):
        c = stats.start + 0.5 * torch.randn(stats.start.shape, generator=draw, dtype=torch.float64)
        c.requires_grad_()
        values = ara_math.objective(stats, c, point)
        (gradient,) = torch.autograd.grad(values.sum(), c)
        for g in range(G):
            q = stats.basis[g]
            matrix = (w[g] - w[g] @ q.T @ q + c[g].detach() @ q).requires_grad_()
            expected = plain(w[g], matrix, x[g], xc[g], point, keep_norms=keep_norms)
            assert float(values[g].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
            (full,) = torch.autograd.grad(expected, matrix)
            inside = full @ q.T
            assert float((gradient[g] - inside).norm() / inside.norm()) < 1e-5
            # What the reduced problem leaves out moves rows along themselves at most.
            if not keep_norms:
                assert float((full - inside @ q).norm()) < 1e-9 * float(full.norm())


def full_solve(w, x, xc, point, *, keep_norms):
    """A plain full-matrix L-BFGS to convergence: torch's own."""
    matrix = w.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [matrix], max_iter=300, history_size=8, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        value = plain(w, matrix, x, xc, point, keep_norms=keep_norms)
        value.backward()
        return value

    optimiser.step(closure)
    return float(plain(w, matrix, x, xc, point, keep_norms=keep_norms))


@pytest.fixture(scope="module")
def captured():
    """Inputs of one writer of the demo model: where the behaviour is, targets and contrasts differ."""
    from excise import events
    from excise.capture.moments import RowObserver
    from excise.capture.sweep import Sweep, Text
    from excise.checkpoints.loading import load
    from excise.config import load_config
    from excise.prompts.measured_sets import tokenise
    from excise.prompts.sets import load_prompt_sets

    config = load_config(behaviour="demo", flags={"model.source": "demo"})
    loaded, sets = load(config.model), load_prompt_sets(config.prompts)
    tokens = tokenise(loaded, sets, config)
    writer = loaded.anatomy.select(("mlp.down_proj",))[3]
    rows = []
    for side in ("target", "contrast"):
        observer, texts = RowObserver([writer]), list(map(Text.of, tokens[side].ids[:24]))
        Sweep(loaded, [writer], [observer]).over(texts, "capture", events.ignore)
        rows.append(observer.rows()[0].inputs.double())
    return writer.module.weight.double(), *rows


@pytest.mark.parametrize(
    ("point", "keep_norms"),
    [
        (ara_math.AraPoint(0.5, 0.01, 0.5, 10), True),
        (ara_math.AraPoint(0.5, 0.01, 0.5, 10), False),
        (ara_math.AraPoint(0.3, 0.05, 1.2, 5), True),
        (ara_math.AraPoint(0.9, 1e-3, 0.2, 15), False),
    ],
)
def test_the_solver_ends_no_higher_than_a_full_matrix_one(captured, point, keep_norms):
    w, x, xc = captured
    basis = basis_for(torch.cat([x, xc]), w.shape[1])[None]
    stats = ara_math.prepare(w[None], x[None], xc[None], basis, None, keep_norms=keep_norms)
    found = float(ara_math.solve(stats, point, 300).values)
    expected = full_solve(w, x, xc, point, keep_norms=keep_norms)
    assert found <= expected + 0.02 * abs(expected)


@pytest.mark.parametrize("keep_norms", [True, False])
@pytest.mark.parametrize("i", [I, 8])
def test_the_edit_is_the_solution_and_norms_and_bias_are_kept(keep_norms, i):
    w, x, xc, b = world(2, i)
    point = ara_math.AraPoint(0.5, 0.5, 0.5, 3)
    stats = stats_of(2, keep_norms=keep_norms, i=i, reduced=i == I)
    edits = ara_math.build(stats, [0, 2], point, 40, ["one", "two"])
    values = ara_math.solve(stats, point, 40).values
    for g, edit in zip((0, 2), edits, strict=True):
        edited = edit.apply_to_weight(w[g])
        assert edit.left.shape[1] <= min(w.shape[1:])
        found = plain(w[g], edited, x[g], xc[g], point, keep_norms=False)
        start = plain(w[g], w[g], x[g], xc[g], point, keep_norms=False)
        assert float(found) == pytest.approx(float(values[g]), abs=1e-3 * float(start))
        assert float(found) < float(start)
        if keep_norms:
            assert torch.allclose(edited.norm(dim=1), w[g].norm(dim=1), rtol=1e-9)
        assert torch.allclose(edit.apply_to_bias(b[g]), b[g], atol=1e-9)


def test_float32_is_enough():
    point = POINTS[0]
    exact = ara_math.solve(stats_of(3), point, 40).values
    found = ara_math.solve(stats_of(3, dtype=torch.float32), point, 40).values
    assert torch.allclose(found.double(), exact, rtol=2e-2, atol=1e-3)


def test_a_writers_edit_does_not_depend_on_those_beside_it():
    stats, point = stats_of(4), POINTS[0]
    alone = ara_math.build(stats, [1], point, 30, ["one"])[0]
    beside = ara_math.build(stats, [0, 1, 2], point, 30, ["a", "b", "c"])[1]
    w = world(4)[0][1]
    a, b = alone.apply_to_weight(w), beside.apply_to_weight(w)
    assert float((a - b).norm()) < 1e-6 * float((a - w).norm())


def test_a_runaway_is_said():
    """Without kept norms and with c > 1 the objective falls without end."""
    stats = stats_of(5, keep_norms=False)
    with pytest.raises(MeasurementError, match=r"ara: the edit of first diverged"):
        ara_math.build(stats, [0, 1], ara_math.AraPoint(0.0, 1.0, 1.3, 1), 60, ["first", "second"])
    broken = stats_of(5)
    broken.start[1, 0, 0] = float("nan")
    with pytest.raises(MeasurementError, match=r"ara: the edit of second diverged"):
        ara_math.build(broken, [0, 1], POINTS[0], 5, ["first", "second"])


# -- the optimiser ---------------------------------------------------------------------------------


def test_independent_problems_each_find_their_minimum():
    """Quadratics of very different scales, one Rosenbrock valley, one that is done at the start."""
    draw = torch.Generator().manual_seed(0)
    n = 6
    root = torch.randn(4, n, n, generator=draw, dtype=torch.float64)
    a = root @ root.mT + 0.1 * torch.eye(n, dtype=torch.float64)
    a = a * torch.tensor([1e-4, 1.0, 1e4, 1.0], dtype=torch.float64)[:, None, None]
    goal = torch.randn(4, n, generator=draw, dtype=torch.float64)

    def evaluate(x, numbers):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            parts = []
            for row, number in zip(x, numbers.tolist(), strict=True):
                if number < 4:
                    d = row - goal[number]
                    parts.append(0.5 * d @ a[number] @ d)
                else:
                    parts.append((100 * (row[1:] - row[:-1] ** 2) ** 2 + (1 - row[:-1]) ** 2).sum())
            values = torch.stack(parts)
            return values.detach(), torch.autograd.grad(values.sum(), x)[0]

    start = torch.zeros(5, n, dtype=torch.float64)
    start[3] = goal[3]
    found = minimise(evaluate, start, iterations=200, tolerance=0.0)
    assert torch.allclose(found.points[:4], goal, atol=1e-4)
    assert torch.allclose(found.points[4], torch.ones(n, dtype=torch.float64), atol=1e-4)
    assert torch.equal(found.points[3], goal[3])


def test_a_problem_that_is_not_finite_stays_and_disturbs_nobody():
    def evaluate(x, numbers):
        values = x.square().sum(1)
        values = torch.where(numbers == 1, torch.full_like(values, float("nan")), values)
        return values, 2 * x

    found = minimise(evaluate, torch.ones(3, 4), iterations=20)
    assert torch.allclose(found.points[[0, 2]], torch.zeros(2, 4), atol=1e-5)
    assert torch.equal(found.points[1], torch.ones(4))


def test_a_function_that_jumps_to_infinity_is_searched_inside():
    def evaluate(x, _numbers):
        f = -torch.log(1 - x.square().sum(1)) + x[:, 0]
        return f, torch.autograd.functional.jacobian(
            lambda y: (-torch.log(1 - y.square().sum(1)) + y[:, 0]).sum(), x
        )

    found = minimise(evaluate, torch.full((1, 2), 0.6, dtype=torch.float64), iterations=50)
    assert float(found.points.norm()) < 1
    assert float(found.points[0, 1]) == pytest.approx(0.0, abs=1e-4)
