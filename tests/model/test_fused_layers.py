"""Fused layers against Transformers' own forward pass."""

from __future__ import annotations

import builders
import families
import pytest
import torch
import torch.nn.functional as F

from excise.model import forward as forward_module
from excise.model import fused_layers as fused_module
from excise.model.forward import Forward
from excise.model.fused_layers import Duplicates, Inputs, attend, fused_layers_of
from excise.model.fused_specs import gelu_tanh

LENGTHS = (3, 9, 14, 24)


def padded(rows):
    """Ids, mask and positions of left-padded rows."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask, (mask.cumsum(-1) - 1).clamp_min(0)


def texts():
    return [builders.token_ids(1, n, length, length)[0] for n, length in enumerate(LENGTHS)]


def near(ours, theirs):
    """Equal but for float32's rounding over some layers; both (N, D)."""
    return bool((ours - theirs).norm() <= 1e-5 * theirs.norm())


def both_ways(model):
    """A forward with fused layers and one through its own modules."""
    fused, plain = Forward(model.model, model.anatomy), Forward(model.model, model.anatomy)
    assert fused._fused is not None
    plain._fused = None
    return fused, plain


def test_the_texts_are_longer_than_a_window():
    assert builders.config("gemma4").sliding_window < max(LENGTHS)


@pytest.mark.parametrize("family", builders.FAMILIES)
@pytest.mark.parametrize("keep", [1, 3, 24, 40])
def test_final_states_are_those_of_the_models_own_modules(family, keep):
    fused, plain = both_ways(builders.loaded(family))
    ids, mask, positions = padded(texts())
    with torch.inference_mode():
        ours, theirs = (way.hidden(ids, mask, positions, keep=keep) for way in (fused, plain))
    real = mask[:, -keep:].bool()
    assert ours.shape == theirs.shape
    assert near(ours[real], theirs[real])
    assert torch.isfinite(ours).all()


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_steps_from_a_cache_are_those_of_the_models_own_modules(family):
    ids, mask, positions = padded(texts())
    found = []
    with torch.inference_mode():
        for way in both_ways(builders.loaded(family)):
            cache = way.cache(ids.shape[1])
            parts = [slice(0, 20), slice(20, 21), slice(21, 24)]
            steps = [
                way.hidden(ids[:, p], mask[:, : p.stop], positions[:, p], cache, keep=3)
                for p in parts
            ]
            found.append(torch.cat(steps[1:], dim=1)[mask[:, -4:].bool()])
    assert near(*found)


@pytest.mark.parametrize("family", builders.FAMILIES)
@pytest.mark.parametrize("cut", [1, 2])
def test_a_pass_in_two_parts_is_one_pass(family, cut):
    fused, plain = both_ways(builders.loaded(family))
    given = padded(texts())
    assert cut <= fused.anatomy.skippable
    top = len(fused.anatomy.layers)
    with torch.inference_mode():
        lower, theirs = (way.run_layers(range(cut), Inputs(*given)) for way in (fused, plain))
        real = given[1].bool()
        assert near(lower[real], theirs[real])
        before = lower.clone()
        ours = fused.run_layers(range(cut, top), Inputs(*given), hidden=lower, keep=2)
        assert torch.equal(lower, before)
        assert near(ours, fused.hidden(*given, keep=2))


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_logits_are_those_of_the_models_own_forward(family):
    model = builders.loaded(family)
    capped = getattr(model.model.config.get_text_config(), "final_logit_softcapping", None)
    fused, plain = both_ways(model)
    with torch.inference_mode():
        states = 20 * plain.hidden(*padded(texts()), keep=3).flatten(0, 1)
        ours, theirs = fused.logits(states), plain.logits(states)
    assert torch.equal(ours, theirs)
    if capped:
        assert ours.abs().max() > 0.2 * capped  # far enough for the cap to bend them


def test_a_head_that_differs_from_the_models_own_is_not_used(monkeypatch):
    model = builders.loaded("gemma4")
    known = fused_layers_of(model.model, model.anatomy)
    object.__setattr__(known.head, "cap", 0.5)
    monkeypatch.setattr(forward_module, "fused_layers_of", lambda *_: known)
    assert Forward(model.model, model.anatomy)._fused is None


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_rows_that_are_alike_are_run_as_rows_of_their_own(family):
    """From the embeddings and from within, with a cache and without, at every layer."""
    fused, _ = both_ways(builders.loaded(family))
    ids, mask, positions = padded(texts())
    kinds = torch.tensor([0, 1, 2, 1, 0, 2, 1])
    duplicates = Duplicates(torch.tensor([0, 1, 2]), kinds)
    given = Inputs(ids, mask, positions).of(kinds)
    few = Inputs(ids, mask, positions).of(torch.arange(3))
    top = len(fused.anatomy.layers)
    for start in range(min(fused.anatomy.skippable, top - 1) + 1):
        for keep in (2, ids.shape[1]):
            for room in (None, ids.shape[1]):
                caches = [None if room is None else fused.cache(room) for _ in range(2)]
                with torch.inference_mode():
                    lower = fused.run_layers(range(start), few) if start else None
                    each = None if lower is None else lower[kinds]
                    layers = range(start, top)
                    ours = fused.run_layers(
                        layers, given, caches[0], hidden=lower, keep=keep, duplicates=duplicates
                    )
                    theirs = fused.run_layers(layers, given, caches[1], hidden=each, keep=keep)
                assert near(ours, theirs)
                if room is not None:
                    for a, b in zip(*(cache.layers for cache in caches), strict=True):
                        if a.keys is not None and a.length:
                            assert near(a.keys, b.keys)
                            assert near(a.values, b.values)


@pytest.mark.parametrize("family", builders.FAMILIES)
@pytest.mark.parametrize("more", [1, 3])
def test_rows_that_are_alike_go_on_alike_from_a_cache(family, more):
    fused, _ = both_ways(builders.loaded(family))
    ids, mask, positions = padded(texts())
    kinds = torch.tensor([0, 1, 2, 1, 0, 2, 1])
    alike, cut = Duplicates(torch.tensor([4, 3, 2]), kinds), ids.shape[1] - more
    whole, layers, found = (
        Inputs(ids, mask, positions).of(kinds),
        range(len(fused.anatomy.layers)),
        [],
    )
    for same in (alike, None):
        cache = fused.cache(ids.shape[1])
        with torch.inference_mode():
            for part in (slice(0, cut), slice(cut, None)):
                seen = whole.mask[:, : part.stop]
                given = Inputs(whole.ids[:, part], seen, whole.positions[:, part])
                states = fused.run_layers(layers, given, cache, keep=more, duplicates=same)
        found.append(states)
    assert found[0].shape[:2] == (7, more)
    assert near(*found)


def test_what_differs_from_the_models_own_modules_is_not_used(monkeypatch):
    model = builders.loaded("gemma4")
    known = fused_layers_of(model.model, model.anatomy)
    object.__setattr__(known._layers[2].attention, "scaling", 1.1)
    monkeypatch.setattr(forward_module, "fused_layers_of", lambda *_: known)
    assert Forward(model.model, model.anatomy)._fused is None


def used(model, known, monkeypatch):
    """Whether these fused layers are used."""
    monkeypatch.setattr(forward_module, "fused_layers_of", lambda *_: known)
    return Forward(model.model, model.anatomy)._fused is not None


@pytest.mark.parametrize("way", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [8, 70, 512, 4096])
@pytest.mark.parametrize(("off", "agrees"), [(0, True), (1, False), (-1, False), (None, False)])
def test_a_window_that_ends_elsewhere_is_not_used(window, off, agrees, way, monkeypatch):
    """However long it is: no short text sees it."""
    model = builders.loaded("gemma4", sliding_window=window, attn_implementation=way)
    known = fused_layers_of(model.model, model.anatomy)
    assert known._windows["sliding_attention"] == window
    known._windows["sliding_attention"] = None if off is None else window + off
    assert used(model, known, monkeypatch) == agrees


def test_a_layer_that_is_taken_for_one_of_another_kind_is_not_used(monkeypatch):
    """With the same angles, so that nothing but the window tells the kinds apart."""
    more = {"sliding_window": 200, "use_sliding_window": True, "max_window_layers": 2}
    model = builders.loaded("qwen3", **more)
    known = fused_layers_of(model.model, model.anatomy)
    assert set(known._windows.values()) == {None, 200}
    assert used(model, known, monkeypatch)
    wrong = fused_layers_of(model.model, model.anatomy)
    object.__setattr__(wrong._layers[4].attention, "kind", "full_attention")
    assert not used(model, wrong, monkeypatch)


def test_steps_that_go_wrong_are_not_used(monkeypatch):
    model = builders.loaded("gemma4")
    known = fused_layers_of(model.model, model.anatomy)
    run = known.run

    def wrong(layers, given, cache=None, **more):
        if cache is not None and given.positions.shape[1] < given.mask.shape[1]:
            given = Inputs(given.ids, given.mask, given.positions - 1)
        return run(layers, given, cache, **more)

    monkeypatch.setattr(known, "run", wrong)
    assert not used(model, known, monkeypatch)


def test_what_goes_wrong_in_longer_texts_alone_is_not_used(monkeypatch):
    """Attention to many tokens is computed otherwise than to few."""
    model = builders.loaded("llama")
    known = fused_layers_of(model.model, model.anatomy)

    def wrong(queries, keys, values, bias, scaling):
        return attend(
            queries, keys, values, bias, scaling if keys.shape[2] <= 64 else 1.1 * scaling
        )

    monkeypatch.setattr(fused_module, "attend", wrong)
    assert not used(model, known, monkeypatch)


def test_it_is_looked_at_once_per_model(monkeypatch):
    model = builders.loaded("qwen3")
    first = model.forward
    monkeypatch.setattr(model.anatomy.backbone, "forward", None)
    assert model.forward is first
    assert first._fused is not None


def test_gradients_flow_through_the_models_own_modules():
    model = builders.loaded("llama")
    way, given = Forward(model.model, model.anatomy), padded(texts())
    weight = model.anatomy.writers[0].weight.requires_grad_(True)
    way.hidden(*given).square().sum().backward()
    assert weight.grad is not None
    assert float(weight.grad.abs().max()) > 0


@pytest.mark.parametrize("kind", ["gemma2", "qwen3_moe", "gemma4_text with experts"])
def test_other_families_go_through_their_own_modules(kind):
    model = families.loaded(families.model(kind))
    assert fused_layers_of(model.model, model.anatomy) is None


@pytest.mark.parametrize("kind", ["gemma4_text", "llama", "qwen3"])
def test_these_are_run_fused_with_every_structural_feature_switched_on(kind):
    model = families.loaded(families.model(kind))
    assert Forward(model.model, model.anatomy)._fused is not None


def test_half_precision_goes_through_the_models_own_modules():
    """There a probe could not tell a wrong layer from rounding."""
    model = builders.loaded("qwen3")
    model.model.bfloat16()
    assert fused_layers_of(model.model, model.anatomy) is None


@pytest.mark.parametrize(("width", "seen"), [(8, 5), (8, 80), (96, 5)])
def test_attention_is_the_fused_kernels_whatever_its_shape(width, seen):
    torch.manual_seed(0)
    queries = torch.randn(3, 4, 6, width)
    keys, values = torch.randn(2, 3, 2, seen, width).unbind()
    bias = torch.zeros(3, 1, 4, seen).masked_fill_(torch.rand(3, 1, 4, seen) < 0.4, -torch.inf)
    bias[..., 0] = 0
    expected = F.scaled_dot_product_attention(
        queries.transpose(1, 2), keys, values, bias, scale=0.7, enable_gqa=True
    )
    found = attend(queries, keys, values, bias, 0.7)
    assert torch.allclose(found, expected.transpose(1, 2).flatten(2), atol=1e-5)


def test_gelu_is_pytorchs():
    x = torch.linspace(-30, 30, 10_001)
    expected = F.gelu(x.double(), approximate="tanh")
    assert torch.allclose(gelu_tanh(x).double(), expected, rtol=1e-5, atol=1e-6)
