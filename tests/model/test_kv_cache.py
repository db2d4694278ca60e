"""The roomy cache against Transformers' own."""

from __future__ import annotations

import builders
import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from excise.model.kv_cache import (
    RoomyLayer,
    roomy_cache,
    select_rows,
    share_lower_layers,
    take_rows,
    with_room,
)


def states(rows, tokens, seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 2, tokens, width, generator=g) for width in (4, 6)]


def fill(layer, rows=3, steps=(5, 1, 1, 2)):
    """Append some positions; the last return value."""
    out = None
    for seed, tokens in enumerate(steps):
        out = layer.update(*states(rows, tokens, seed))
    return out


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_it_gives_what_a_dynamic_layer_gives():
    roomy, dynamic = RoomyLayer(9), DynamicLayer()
    assert roomy.get_seq_length() == dynamic.get_seq_length() == 0
    for seed, tokens in enumerate((5, 1, 1, 2)):
        ours = roomy.update(*states(3, tokens, seed))
        assert same(ours, dynamic.update(*states(3, tokens, seed)))
        assert roomy.get_seq_length() == dynamic.get_seq_length()
        assert roomy.get_mask_sizes(1) == dynamic.get_mask_sizes(1)
    assert (roomy.dtype, roomy.device) == (dynamic.dtype, dynamic.device)


def test_it_writes_into_the_room_set_aside():
    layer = RoomyLayer(9)
    layer.update(*states(3, 5, 0))
    place = layer.keys.data_ptr(), layer.values.data_ptr()
    fill(layer, steps=(1, 3))
    assert (layer.keys.data_ptr(), layer.values.data_ptr()) == place
    assert layer.keys.shape == (3, 2, 9, 4)
    assert layer.values.shape == (3, 2, 9, 6)


def test_too_little_room_is_the_programmers_error():
    layer = RoomyLayer(5)
    with pytest.raises(AssertionError, match="too small"):
        fill(layer, steps=(5, 1))


@pytest.mark.parametrize("rows", [[0], [2], [0, 2], [2, 0, 0], [0, 1, 2]], ids=str)
def test_selected_rows_go_on_as_in_a_dynamic_layer(rows):
    roomy, dynamic = RoomyLayer(9), DynamicLayer()
    fill(roomy, steps=(4,))
    fill(dynamic, steps=(4,))
    roomy.batch_select_indices(torch.tensor(rows))
    dynamic.batch_select_indices(torch.tensor(rows))
    more = states(len(rows), 2, 7)
    assert same(roomy.update(*more), dynamic.update(*more))


def test_selecting_from_an_empty_layer_does_nothing():
    layer = RoomyLayer(9)
    layer.batch_select_indices(torch.tensor([0]))
    assert fill(layer, rows=2)[0].shape == (2, 2, 9, 4)


def test_copied_rows_come_in_the_order_asked_for():
    source, into = RoomyLayer(4), RoomyLayer(6)
    keys, values = fill(source, rows=2, steps=(3,))
    into.copy_rows(source, torch.tensor([0, 1, 1, 0]))
    assert into.get_seq_length() == 3
    assert torch.equal(into.keys[:, :, :3], keys[[0, 1, 1, 0]])
    assert torch.equal(into.values[:, :, :3], values[[0, 1, 1, 0]])
    before = source.keys.clone()
    into.keys.zero_()
    assert torch.equal(source.keys, before)


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_a_model_goes_on_from_it_as_from_its_own_cache(family):
    """A prompt longer than Gemma's window, a row taken out in between, then token by token."""
    model = builders.model(family)
    ids = torch.tensor(builders.token_ids(3, 6, 20, 20))
    caches = [with_room(roomy_cache(model.config), 20), DynamicCache(config=model.config)]
    assert len(caches[0].layers) == len(caches[1].layers)
    # Gemma's last layers use others' keys and values, and keep none of their own.
    own = builders.LAYERS - (2 if family == "gemma4" else 0)
    assert all(isinstance(layer, RoomyLayer) for layer in caches[0].layers[:own])
    assert [type(a) for a in caches[0].layers[own:]] == [type(a) for a in caches[1].layers[own:]]
    for cache in caches:
        model(ids[:, :14], past_key_values=cache)
    for step in range(14, 20):
        if step == 16:
            ids = ids[[0, 2]]
            select_rows(caches[0], [0, 2])
            caches[1].batch_select_indices(torch.tensor([0, 2]))
        ours, theirs = (model(ids[:, step : step + 1], past_key_values=c).logits for c in caches)
        assert torch.allclose(ours, theirs, atol=1e-4)
        assert torch.allclose(ours[:, 0], model(ids[:, : step + 1]).logits[:, -1], atol=1e-3)


def test_lower_layers_are_shared_and_upper_ones_stay_empty():
    model = builders.model("llama")
    source, into = (with_room(roomy_cache(model.config), 12) for _ in range(2))
    ids = torch.tensor(builders.token_ids(2, 6, 9, 9))
    model(ids, past_key_values=source)
    share_lower_layers(source, into, 4, torch.tensor([0, 1, 0, 0, 1]))
    lengths = [layer.get_seq_length() for layer in into.layers]
    assert lengths[:4] == [9] * 4
    assert not any(lengths[4:])
    for ours, theirs in zip(into.layers[:4], source.layers[:4], strict=True):
        assert torch.equal(ours.keys[:, :, :9], theirs.keys[[0, 1, 0, 0, 1], :, :9])


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_taken_rows_go_on_without_the_others_noticing(family):
    model = builders.model(family)
    ids = torch.tensor(builders.token_ids(3, 6, 12, 12))
    pattern = roomy_cache(model.config)
    cache = with_room(pattern, 9)
    model(ids[:, :9], past_key_values=cache)
    before = [layer.keys.clone() for layer in cache.layers if layer.keys is not None]
    taken = take_rows(cache, with_room(pattern, 12), [2, 0, 2], range(builders.LAYERS), [0] * 3)
    found = model(ids[[2, 0, 2], 9:], past_key_values=taken).logits
    assert torch.allclose(found, model(ids[[2, 0, 2]]).logits[:, 9:], atol=1e-3)
    after = [layer.keys for layer in cache.layers if layer.keys is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_rows_move_to_the_right_and_lose_their_end():
    source, into = RoomyLayer(5), RoomyLayer(7)
    keys, values = torch.randn(2, 3, 4, 2), torch.randn(2, 3, 4, 6)
    source.update(keys, values)
    into.copy_rows(source, torch.tensor([1, 0, 0, 1]), torch.tensor([0, 1, 3, 9]))
    assert into.length == 4
    for ours, theirs in ((into.keys, keys), (into.values, values)):
        assert torch.equal(ours[0, :, :4], theirs[1])
        assert torch.equal(ours[1, :, 1:4], theirs[0, :, :3])
        assert torch.equal(ours[2, :, 3:4], theirs[0, :, :1])
        assert torch.isfinite(ours[3, :, :4]).all()  # all of it is padding


def test_only_some_layers_are_taken_and_of_the_others_the_length():
    model = builders.model("gemma4")
    pattern = roomy_cache(model.config)
    cache = with_room(pattern, 5)
    model(torch.tensor(builders.token_ids(2, 6, 5, 5)), past_key_values=cache)
    taken = take_rows(cache, with_room(pattern, 8), [1], range(2, 4), [0])
    kept = [layer for layer in taken.layers if isinstance(layer, RoomyLayer)]
    assert [layer.get_seq_length() for layer in kept] == [5] * len(kept)
    assert [layer.is_initialized for layer in kept] == [n in (2, 3) for n in range(len(kept))]
    assert all(layer.capacity == 8 for layer in kept)
    assert all(layer.capacity == 0 for layer in pattern.layers if isinstance(layer, RoomyLayer))
