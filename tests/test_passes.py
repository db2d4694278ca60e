"""Passes that share lower layers and let rows join later, against passes that share nothing."""

from __future__ import annotations

import builders
import pytest
import torch

from excise import passes
from excise.forward import Forward
from excise.passes import Bank, Passes, Rows, joining
from excise.profiles import Profile
from excise.space import Candidate
from excise.stacking import Stack

KEEP = 3


@pytest.mark.parametrize(
    ("starts", "steps"),
    [
        ([2], [(2, 1)]),
        ([0, 0, 0], [(0, 3)]),
        ([1, 4, 4, 4], [(1, 1), (4, 4)]),
        ([1] * 9 + [2], [(1, 10)]),  # one row, one layer: not worth a call for the nine others
        ([1] * 9 + [20], [(1, 9), (20, 10)]),
        ([0, 3, 6], [(0, 1), (3, 2), (6, 3)]),
    ],
)
def test_rows_join_where_waiting_is_worth_a_call(starts, steps):
    assert joining(starts) == steps


def test_no_row_joins_above_where_it_may_begin():
    torch.manual_seed(0)
    for _ in range(200):
        starts = sorted(torch.randint(0, 12, (9,)).tolist())
        steps = joining(starts)
        layers, counts = zip(*steps, strict=True)
        assert list(layers) == sorted(set(layers))
        assert list(counts) == sorted(set(counts))
        assert counts[-1] == len(starts)
        for row, start in enumerate(starts):
            assert next(layer for layer, count in steps if row < count) <= start


def test_a_bank_gives_back_left_padded_states():
    texts = [(7, 8, 9), (4,), (5, 6)]
    states = torch.randn(3, 3, 2)
    bank = Bank()
    assert bank.missing([*texts, (4,)]) == texts
    bank.add(texts[:2], states[:2])
    assert bank.missing(texts) == [(5, 6)]
    bank.add(texts[2:], states[2:])
    found = bank.take([(5, 6), (7, 8, 9), (5, 6), (4,)], 4)
    assert torch.equal(found[1, 1:], states[0])
    assert torch.equal(found[0, 2:], states[2, 1:])
    assert torch.equal(found[2], found[0])
    assert torch.equal(found[3, 3:], states[1, 2:])
    assert torch.equal(found[0, :2], states[0, -1].expand(2, -1))  # padding: some real state
    assert torch.equal(found[3, :3], states[0, -1].expand(3, -1))


def rig(family, *, reuse):
    """Passes of a model, and a stack whose candidates begin at different layers."""
    model = builders.loaded(family)
    method = builders.method(model)
    peaks = (1.0, 3.0, 5.0, 5.0, 5.0)
    edits = [
        method.edits(Candidate(2.0, {c: Profile(0.9, peak, 0.1, 1.2) for c in builders.COMPONENTS}))
        for peak in peaks
    ]
    stack = Stack(method.writers, edits)
    assert len({stack.first_of(c) for c in range(len(peaks))}) >= 3
    forward = Forward(model.model, model.anatomy)
    return Passes(forward, model.anatomy, 0, reuse=reuse), stack


def texts(count=4):
    return [tuple(row) for row in builders.token_ids(count, 5, 6, 12)]


def layers_run(passes_):
    """Counts, per layer, the tokens that pass it from now on."""
    counts = [0] * builders.LAYERS
    for number, layer in enumerate(passes_.forward.anatomy.layers):

        def count(_m, args, kwargs, number=number):
            hidden = args[0] if args else kwargs["hidden_states"]
            counts[number] += hidden.shape[0] * hidden.shape[1]

        layer.self_attn.register_forward_pre_hook(count, with_kwargs=True)
    return counts


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_reading_with_shared_layers_equals_reading_without(family):
    rows = Rows.grid(range(5), texts())
    found = []
    for reuse in (False, True):
        passes_, stack = rig(family, reuse=reuse)
        with torch.inference_mode(), stack.applied():
            first = passes_.read(stack, rows, KEEP)
            found.append(first)
            assert torch.allclose(passes_.read(stack, rows, KEEP), first, atol=1e-5)
    assert found[0].shape == (20, KEEP, builders.WIDTH)
    assert torch.allclose(*found, atol=1e-4)


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_uneven_rows_are_read_as_even_ones_are(family):
    passes_, stack = rig(family, reuse=True)
    grid = Rows.grid(range(5), texts())
    some = [0, 2, 3, 5, 6, 13, 17, 18, 19]
    part = Rows([grid.owners[n] for n in some], [grid.texts[n] for n in some])
    with torch.inference_mode(), stack.applied():
        whole, few = passes_.read(stack, grid, 1), passes_.read(stack, part, 1)
    assert torch.allclose(whole[some], few, atol=1e-4)


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_what_is_filled_is_what_is_read(family):
    for reuse in (True, False):
        passes_, stack = rig(family, reuse=reuse)
        rows = Rows.grid(range(5), texts())
        with torch.inference_mode(), stack.applied():
            hidden, cache, mask = passes_.fill(stack, rows, 2)
            assert torch.allclose(hidden, passes_.read(stack, rows, 1)[:, 0], atol=1e-4)
        assert mask.sum(1).tolist() == [len(text) for text in rows.texts]
        assert cache.layers[0].keys.shape[0] == 20


def test_layers_below_the_first_edit_run_once_per_text_and_then_no_more():
    passes_, stack = rig("llama", reuse=True)
    rows = Rows.grid([2, 3, 4], texts())
    first, width = stack.first_of(2), max(map(len, texts()))
    assert stack.first_of(4) == first > 0
    counts = layers_run(passes_)
    with torch.inference_mode(), stack.applied():
        passes_.read(stack, rows, KEEP)
    once = [4 * width] * first
    assert counts[:first] == once
    assert counts[first:] == [12 * width] * (builders.LAYERS - first)
    with torch.inference_mode(), stack.applied():
        passes_.read(stack, rows, KEEP)
        assert counts[:first] == once
        passes_.forget()
        passes_.read(stack, rows, KEEP)
    assert counts[:first] == [8 * width] * first


def test_a_candidate_runs_no_layer_below_its_first_edit():
    passes_, stack = rig("llama", reuse=True)
    rows = Rows.grid(range(5), texts())
    with torch.inference_mode(), stack.applied():
        passes_.read(stack, rows, KEEP)
        counts = layers_run(passes_)
        passes_.read(stack, rows, KEEP)
    width = max(map(len, texts()))
    begun = [sum(stack.first_of(c) <= layer for c in range(5)) for layer in range(builders.LAYERS)]
    assert counts == [4 * width * candidates for candidates in begun]


def test_what_is_kept_has_a_limit(monkeypatch):
    monkeypatch.setattr(passes, "_BANK_BYTES", 0)
    passes_, stack = rig("llama", reuse=True)
    rows = Rows.grid(range(5), texts())
    with torch.inference_mode(), stack.applied():
        found = passes_.read(stack, rows, KEEP)
        counts = layers_run(passes_)
        assert torch.allclose(passes_.read(stack, rows, KEEP), found, atol=1e-5)
    assert stack.first_of(0) == 0  # its own rows pass the first layer, and the four texts once more
    assert counts[0] == (4 + 4) * max(map(len, texts()))


def test_prompts_are_read_again_where_few_layers_need_them_and_drafts_are_long():
    passes_, stack = rig("llama", reuse=True)
    assert stack.first_of(4) == 4 < builders.LAYERS
    assert passes_.cheaper_anew(stack, [4], 100, 100)  # 2 layers x 200 tokens, or 6 x 100
    assert not passes_.cheaper_anew(stack, [4], 300, 100)
    assert not passes_.cheaper_anew(stack, [0, 4], 100, 100)  # one that begins at the bottom
    plain, _ = rig("llama", reuse=False)
    assert not plain.cheaper_anew(stack, [4], 1, 100)


def test_nothing_is_kept_for_a_single_candidate():
    passes_, stack = rig("llama", reuse=True)
    with torch.inference_mode(), stack.applied():
        passes_.read(stack, Rows.grid([4], texts()), KEEP)
        counts = layers_run(passes_)
        passes_.read(stack, Rows.grid([4], texts()), KEEP)
    assert all(counts)
