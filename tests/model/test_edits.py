"""Theorems: the closed forms equal the explicit ones, and ablation removes what it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from excise.capture.directions import Directions, normalise
from excise.methods.directional_math import build, prepare

O, I, L = 24, 40, 5


def explicit(weight, u, strength, row_norms):
    """The naive forms, straight from their definitions."""
    n = weight.norm(dim=1, keepdim=True)
    if row_norms == "none":
        return weight - strength * torch.outer(u, u @ weight)
    unit = weight / n
    edited = unit - strength * torch.outer(u, u @ unit)
    if row_norms == "pre":
        return n * edited
    return n * edited / edited.norm(dim=1, keepdim=True)


def world(seed, *, projected=False, gains=True):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    directions = Directions(normalise(draw(L, O)), normalise(draw(L, O)), projected)
    weights = [draw(O, I) for _ in range(L)]
    gain = [draw(O).abs() + 0.2 for _ in range(L)] if gains else None
    return directions, weights, gain


@pytest.mark.parametrize("row_norms", ["none", "pre", "full"])
@pytest.mark.parametrize("projected", [False, True])
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    index=st.none() | st.floats(0, L - 1),
    strength=st.floats(0.0, 1.5),
    with_gain=st.booleans(),
)
def test_closed_form_equals_explicit_row_normalisation(
    row_norms, projected, seed, index, strength, with_gain
):
    directions, weights, gains = world(seed, projected=projected, gains=with_gain)
    stats = prepare(weights, list(range(L)), directions, row_norms=row_norms, gains=gains)
    strengths = torch.full((L,), strength, dtype=torch.float64)
    edits = build(stats, index, strengths)
    for layer, weight in enumerate(weights):
        v = directions.at(layer, index)
        u = normalise(v * gains[layer]) if gains else v
        expected = explicit(weight, u, strength, row_norms)
        edited = edits.one(layer).apply_to_weight(weight)
        assert (edited - expected).abs().max() < 1e-12 * max(1.0, float(weight.abs().max()))


@pytest.mark.parametrize("with_gain", [False, True])
def test_full_ablation_leaves_nothing_of_the_direction(with_gain):
    directions, weights, gains = world(3, gains=with_gain)
    stats = prepare(weights, list(range(L)), directions, row_norms="none", gains=gains)
    edits = build(stats, 1.5, torch.ones(L, dtype=torch.float64))
    x = torch.randn(7, I, dtype=torch.float64)
    for layer, weight in enumerate(weights):
        y = x @ edits.one(layer).apply_to_weight(weight).T
        if gains:  # what is added to the residual: the RMS norm with gain of the output
            y = gains[layer] * y / y.pow(2).mean(-1, keepdim=True).sqrt()
        along = y @ directions.at(layer, 1.5)
        assert along.abs().max() < 1e-12 * y.norm()


@pytest.mark.parametrize("row_norms", ["none", "pre", "full"])
def test_on_activations_equals_on_weights_with_bias(row_norms):
    directions, weights, gains = world(5)
    biases = [torch.randn(O, dtype=torch.float64) for _ in range(L)]
    stats = prepare(
        weights, list(range(L)), directions, row_norms=row_norms, gains=gains, biases=biases
    )
    edits = build(stats, None, torch.full((L,), 1.2, dtype=torch.float64))
    x = torch.randn(7, I, dtype=torch.float64)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        edit = edits.one(layer)
        merged = x @ edit.apply_to_weight(weight).T + edit.apply_to_bias(bias)
        direct = edit.apply_to_output(x, x @ weight.T + bias)
        assert torch.allclose(merged, direct, atol=1e-12)
        u = normalise(directions.at(layer, None) * gains[layer])
        expected = bias - 1.2 * u * (u @ bias)  # a bias is edited as itself, whatever the row norms
        assert torch.allclose(edit.apply_to_bias(bias), expected, atol=1e-12)


def test_row_norms_are_kept():
    directions, weights, gains = world(6)
    stats = prepare(weights, list(range(L)), directions, gains=gains)
    edits = build(stats, 2.25, torch.full((L,), 0.9, dtype=torch.float64))
    for layer, weight in enumerate(weights):
        edited = edits.one(layer).apply_to_weight(weight)
        assert torch.allclose(edited.norm(dim=1), weight.norm(dim=1), rtol=1e-12)


def test_ablation_is_idempotent_and_rank_one():
    directions, weights, _ = world(7, gains=False)
    ones = torch.ones(L, dtype=torch.float64)
    layers = list(range(L))
    once = build(prepare(weights, layers, directions, row_norms="none"), 2.0, ones)
    first = [once.one(i).apply_to_weight(w) for i, w in enumerate(weights)]
    again = build(prepare(first, layers, directions, row_norms="none"), 2.0, ones)
    for i, weight in enumerate(first):
        assert torch.allclose(again.one(i).apply_to_weight(weight), weight, atol=1e-12)
        assert torch.linalg.matrix_rank(weights[i] - weight) == 1


def test_strength_zero_changes_nothing():
    directions, weights, gains = world(8)
    edits = build(prepare(weights, list(range(L)), directions, gains=gains), 1.0, torch.zeros(L))
    for layer, weight in enumerate(weights):
        assert torch.equal(edits.one(layer).apply_to_weight(weight), weight)
