"""Captured residuals against Transformers' own hidden states, and the centres made of them."""

from __future__ import annotations

import builders
import pytest
import torch

from excise.capture.directions import winsorise
from excise.capture.residuals import (
    geometric_median,
    last_token_residuals,
    mean,
    projections,
    residual_pass,
)
from excise.prompts.tokens import batches, left_pad

CPU = torch.device("cpu")
ROWS = builders.token_ids(11, 4)


@pytest.fixture(scope="module", params=builders.FAMILIES)
def model(request):
    return builders.loaded(request.param)


def capture(model, rows=ROWS, size=4, winsor=None):
    """Residuals (P, L+1, D) in the order of the prompts."""
    chunks = batches(rows, size, 0, CPU)
    found = list(residual_pass(model.anatomy, chunks, winsor)())
    order = torch.cat([batch.rows for batch, _ in found])
    return torch.cat([x for _, x in found])[order.argsort()]


def hooks(model):
    """All hooks there are: Transformers keeps some of its own after `output_hidden_states`."""
    return [
        (name, list(m._forward_hooks), list(m._forward_pre_hooks), "forward" in m.__dict__)
        for name, m in model.model.named_modules()
    ]


def test_residuals_are_the_hidden_states_and_the_last_is_before_the_final_norm(model):
    found = capture(model)
    assert found.shape == (len(ROWS), builders.LAYERS + 1, builders.WIDTH)
    assert found.dtype == torch.float32
    for row, x in zip(ROWS, found, strict=True):
        states = model.model(torch.tensor([row]), output_hidden_states=True).hidden_states
        plain = torch.stack([state[0, -1] for state in states])
        assert torch.allclose(x[:-1], plain[:-1], rtol=1e-4, atol=1e-4)
        # Transformers' last one is after the final norm: ours is not that, but becomes it.
        assert not torch.allclose(x[-1], plain[-1], rtol=1e-2, atol=1e-2)
        assert torch.allclose(model.model.model.norm(x[-1]), plain[-1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [1, 3, 11, 64])
def test_batches_of_any_size_give_the_same_mean(model, size):
    expected = torch.stack([capture(model, [row], 1)[0] for row in ROWS]).double().mean(0)
    found = mean(residual_pass(model.anatomy, batches(ROWS, size, 0, CPU), None))
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_pass_can_be_run_again(model):
    run = residual_pass(model.anatomy, batches(ROWS, 4, 0, CPU), None)
    assert torch.equal(mean(run), mean(run))


def test_what_is_kept_is_not_changed_by_what_the_model_does_next():
    """Gemma 4 scales the residual in place after each layer: the copy must be the scaled one."""
    model = builders.loaded("gemma4")
    for number, layer in enumerate(model.anatomy.layers):
        layer.layer_scalar.fill_(0.5 + 0.1 * number)
    states = model.model(torch.tensor([ROWS[0]]), output_hidden_states=True).hidden_states
    plain = torch.stack([state[0, -1] for state in states])
    found = capture(model, ROWS[:1])[0]
    assert torch.allclose(found[:-1], plain[:-1], rtol=1e-4, atol=1e-4)


def test_winsorising_is_per_prompt_and_layer(model):
    plain, clamped = capture(model), capture(model, winsor=0.9)
    for p in range(len(ROWS)):
        for layer in range(builders.LAYERS + 1):
            row = plain[p, layer]
            limit = row.abs().sort().values[round(0.9 * (len(row) - 1))]
            assert torch.equal(clamped[p, layer], row.clamp(-limit, limit))
    assert torch.equal(clamped, winsorise(plain, 0.9))
    assert not torch.equal(clamped, plain)


def test_projections_are_of_the_residual_after_each_layer(model):
    unit = builders.directions().unit
    run = residual_pass(model.anatomy, batches(ROWS, 4, 0, CPU), None)
    order = torch.cat([batch.rows for batch, _ in run()])
    expected = torch.einsum("pld,ld->pl", capture(model)[:, 1:], unit)
    assert torch.allclose(projections(run, unit)[order.argsort()], expected, atol=1e-4)


def test_hooks_are_removed(model):
    before = hooks(model)
    with last_token_residuals(model.anatomy):
        assert hooks(model) != before
    assert hooks(model) == before
    capture(model)
    assert hooks(model) == before
    run = residual_pass(model.anatomy, batches(ROWS, 4, 0, CPU), None)
    next(iter(run()))  # a caller that stops early
    assert hooks(model) == before


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_hooks_are_removed_after_an_error(model, error):
    before = hooks(model)

    def strike(_module, _args, _output):
        raise error

    handle = model.anatomy.layers[3].register_forward_hook(strike)
    with pytest.raises(type(error)):
        capture(model)
    handle.remove()
    assert hooks(model) == before


# -- the geometric median --------------------------------------------------------------------------


def fixed_pass(x, size):
    """A pass over given residuals (P, L+1, D), as a model would give them."""
    batch = left_pad([[1]], [0], 0, CPU)
    return lambda: ((batch, x[start : start + size]) for start in range(0, len(x), size))


def naive_median(x):
    """One layer's points (P, D): gradient-free Weiszfeld in float64, to the end."""
    centre = x.double().mean(0)
    for _ in range(5000):
        w = 1 / (x.double() - centre).norm(dim=-1).clamp_min(1e-12)
        centre = (w[:, None] * x.double()).sum(0) / w.sum()
    return centre


@pytest.mark.parametrize("size", [1, 7, 100])
def test_geometric_median_equals_a_naive_one(size):
    x = torch.randn(40, 3, 8, generator=torch.Generator().manual_seed(0)) + 5
    found = geometric_median(fixed_pass(x, size))
    assert found.dtype == torch.float64
    for layer in range(3):
        expected = naive_median(x[:, layer])
        assert float((found[layer] - expected).norm() / expected.norm()) < 1e-3


def test_geometric_median_of_a_models_residuals():
    model = builders.loaded("qwen3")
    found = geometric_median(residual_pass(model.anatomy, batches(ROWS, 4, 0, CPU), None))
    x = capture(model)
    for layer in range(builders.LAYERS + 1):
        expected = naive_median(x[:, layer])
        assert float((found[layer] - expected).norm() / expected.norm()) < 5e-3


def test_an_extreme_prompt_moves_the_mean_and_hardly_the_median():
    x = torch.randn(30, 2, 8, generator=torch.Generator().manual_seed(1))
    wild = x.clone()
    wild[0] += 1000
    shift = [
        float((centre(fixed_pass(wild, 8)) - centre(fixed_pass(x, 8))).norm())
        for centre in (mean, geometric_median)
    ]
    assert shift[0] > 100
    assert shift[1] < 1


def test_prompts_that_are_all_the_same_are_their_own_median():
    x = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(2)).repeat(5, 1, 1)
    assert torch.allclose(geometric_median(fixed_pass(x, 2)), x[0].double(), atol=1e-6)
