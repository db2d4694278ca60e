"""Theorems of subspaces: orthonormal, rank one is the direction, removal is what it says."""

from __future__ import annotations

import builders
import pytest
import torch

from excise.capture.directions import normalise
from excise.config import EditSection, validate
from excise.methods import subspace as subspace_method
from excise.methods import subspace_math
from excise.methods.profiles import Candidate, Profile
from excise.prompts.tokens import left_pad

O, I, D = 24, 40, 24


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def residuals(seed=0, p=60, n=50):
    """Targets lie apart along one direction and vary along two more."""
    axes = torch.linalg.qr(draw(seed, D, D))[0]
    contrast = draw(seed + 1, n, D) * 0.3
    target = draw(seed + 2, p, D) * 0.3 + 4 * axes[0]
    target = target + 3 * draw(seed + 3, p, 1) * axes[1] + 2 * draw(seed + 4, p, 1) * axes[2]
    return target, contrast, axes


@pytest.mark.parametrize("find", [subspace_math.principal, subspace_math.prototypes])
@pytest.mark.parametrize("rank", [1, 2, 5, 8])
def test_directions_are_orthonormal_and_the_first_is_the_difference_of_means(find, rank):
    target, contrast, _ = residuals()
    first = normalise(target.mean(0) - contrast.mean(0))
    rows = find(target, contrast, first, rank)
    assert rows.shape == (rank, D)
    assert torch.allclose(rows[0], first, atol=1e-12)
    assert torch.allclose(rows @ rows.T, torch.eye(rank, dtype=torch.float64), atol=1e-10)


def test_principal_directions_are_where_target_varies_more_than_contrast():
    target, contrast, axes = residuals()
    first = normalise(target.mean(0) - contrast.mean(0))
    rows = subspace_math.principal(target, contrast, first, 3)
    span = axes[:3]
    assert float((rows[1:] - rows[1:] @ span.T @ span).norm(dim=1).max()) < 0.3
    # The same as the eigenvectors of the whole difference of covariances.
    t, c = (x - x.mean(0) for x in (target, contrast))
    t, c = (x - (x @ first)[:, None] * first for x in (t, c))
    vectors = torch.linalg.eigh(t.T @ t / len(t) - c.T @ c / len(c))[1].flip(1).T
    assert abs(float(rows[1] @ vectors[0])) > 1 - 1e-9


def test_a_map_finds_clusters_and_is_deterministic():
    centres = 10 * torch.eye(D, dtype=torch.float64)[:3]
    points = torch.cat([c + 0.1 * draw(n, 20 + 5 * n, D) for n, c in enumerate(centres)])
    cells, owners = subspace_math.self_organising_map(points, 3)
    assert torch.equal(cells, subspace_math.self_organising_map(points, 3)[0])
    for c in centres:
        assert float((cells - c).norm(dim=1).min()) < 0.5
    assert sorted(torch.bincount(owners).tolist()) == [20, 25, 30]


def test_gram_schmidt_drops_what_is_there_already():
    rows = draw(0, 3, D)
    found = subspace_math.orthonormal(torch.cat([rows, rows[:1] + rows[1:2]]))
    assert float(found[3].norm()) == 0.0
    assert torch.allclose(found[:3] @ found[:3].T, torch.eye(3, dtype=torch.float64), atol=1e-12)


def explicit(w, u, strengths, row_norms):
    lam = torch.diag(torch.tensor(strengths, dtype=torch.float64))
    if row_norms == "none":
        return w - u.T @ lam @ u @ w
    n = w.norm(dim=1, keepdim=True)
    edited = w / n - u.T @ lam @ u @ (w / n)
    return n * edited if row_norms == "pre" else n * edited / edited.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("row_norms", ["none", "pre", "full"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_removal_equals_the_explicit_form(row_norms, rank):
    w, b, x = draw(1, O, I), draw(2, O), draw(3, 6, I)
    u = subspace_math.orthonormal(draw(4, rank, O))
    strengths = [1.2 - 0.15 * j for j in range(rank)]
    edit = subspace_math.remove(w, b, u, strengths, row_norms)
    expected = explicit(w, u, strengths, row_norms)
    assert (edit.apply_to_weight(w) - expected).abs().max() < 1e-12
    lam = torch.tensor(strengths, dtype=torch.float64)
    assert torch.allclose(edit.apply_to_bias(b), b - (lam * (u @ b)) @ u, atol=1e-12)
    merged = x @ expected.T + edit.apply_to_bias(b)
    assert torch.allclose(edit.apply_to_output(x, x @ w.T + b), merged, atol=1e-11)


def test_full_strength_leaves_nothing_of_any_direction():
    w, u = draw(1, O, I), subspace_math.orthonormal(draw(4, 4, O))
    edited = subspace_math.remove(w, None, u, [1.0] * 4, "none").apply_to_weight(w)
    assert float((u @ edited).abs().max()) < 1e-12
    again = subspace_math.remove(edited, None, u, [1.0] * 4, "none").apply_to_weight(edited)
    assert torch.allclose(again, edited, atol=1e-12)
    assert torch.linalg.matrix_rank(w - edited) == 4


# -- the method: which layer's directions go where -------------------------------------------------


def planted(layers=6, p=30, width=builders.WIDTH):
    """Passes in which targets vary along axis l after layer l, and along another before the first."""
    batch = left_pad([[1]], [0], 0, torch.device("cpu"))
    rows = [0.01 * draw(7 + side, p, layers + 1, width).float() for side in (0, 1)]
    size = 3 * draw(9, p, 1).float()
    for layer in range(layers + 1):
        rows[0][:, layer, (layer - 1) % width] += size[:, 0]
    return tuple(lambda x=x: iter([(batch, x)]) for x in rows)


def method_on(model, *, projected=False, **more):
    directions = builders.directions(projected=projected)
    captured = subspace_method.capture(*planted(), directions, validate({"subspace": {"rank": 2}}))
    writers = model.anatomy.select(builders.COMPONENTS)
    section = EditSection(row_norms="none")
    method = subspace_method.SubspaceMethod(writers, directions, captured, section, **more)
    return method, directions, captured["rows"]


def test_what_is_captured_of_a_layer_is_the_residual_after_it():
    _, directions, rows = method_on(builders.loaded("llama"))
    for layer, found in enumerate(rows):
        assert torch.allclose(found[0], directions.unit[layer], atol=1e-5)
        axis = torch.zeros(builders.WIDTH)
        axis[layer] = 1
        rest = normalise(axis - (axis @ found[0]) * found[0])
        assert abs(float(found[1] @ rest)) > 0.95


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize(("index", "nearest"), [(None, None), (2.4, 2)])
def test_a_candidate_removes_its_layers_directions_and_no_contrast_mean(projected, index, nearest):
    model = builders.loaded("llama")
    method, directions, rows = method_on(model, projected=projected)
    profiles = {name: Profile(1.0, 2.0, 1.0, 10.0) for name in builders.COMPONENTS}
    candidate = subspace_method.SubspaceCandidate(Candidate(index, profiles), (1.0,))
    for writer, edit in zip(method.writers, method.edits(candidate), strict=True):
        second = rows[writer.layer if nearest is None else nearest, 1].double()
        removed = [directions.at(writer.layer, index).double(), second]
        m = directions.contrast[writer.layer].double()
        if projected:
            removed = [v - (v @ m) * m for v in removed]
        q = torch.linalg.qr(torch.stack(removed).T)[0]  # (O, 2)
        w = writer.weight.double()
        assert torch.allclose(edit.apply_to_weight(w), w - q @ (q.T @ w), atol=1e-5)
        if projected:
            assert torch.allclose(m @ edit.apply_to_weight(w), m @ w, atol=1e-5)
