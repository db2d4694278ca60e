"""Passes that share layers, beginnings and pasts, against passes that share nothing."""

from __future__ import annotations

import builders
import pytest
import torch

from excise.engine.passes import CachedRows, Passes, Rows, join_schedule
from excise.engine.stacking import Stack
from excise.methods.profiles import Candidate, Profile
from excise.model.forward import Forward

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
    assert join_schedule(starts) == steps


def test_no_row_joins_above_where_it_may_begin():
    torch.manual_seed(0)
    for _ in range(200):
        starts = sorted(torch.randint(0, 12, (9,)).tolist())
        steps = join_schedule(starts)
        layers, counts = zip(*steps, strict=True)
        assert list(layers) == sorted(set(layers))
        assert list(counts) == sorted(set(counts))
        assert counts[-1] == len(starts)
        for row, start in enumerate(starts):
            assert next(layer for layer, count in steps if row < count) <= start


BEGIN = tuple(builders.token_ids(1, 7, 5, 5)[0])


def rig(family, *, reuse, prefixes=()):
    """Passes of a model under a stack whose candidates begin at different layers."""
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
    return Passes(forward, stack, 0, reuse=reuse, prefixes=prefixes)


def plain(passes):
    """Passes of the same model that share nothing."""
    return Passes(passes.forward, passes.stack, 0, reuse=False)


def texts(count=4, begin=()):
    return [(*begin, *row) for row in builders.token_ids(count, 5, 6, 12)]


def layers_run(passes):
    """Counts, per layer, the tokens that pass it from now on."""
    counts = [0] * builders.LAYERS
    for number, layer in enumerate(passes.forward.anatomy.layers):

        def count(_m, args, number=number):
            counts[number] += args[0].shape[0] * args[0].shape[1]

        layer.self_attn.k_proj.register_forward_pre_hook(count)
    return counts


@pytest.mark.parametrize("family", builders.FAMILIES)
@pytest.mark.parametrize("beginnings", [(), (BEGIN,), (BEGIN[:2], BEGIN, (1, 2, 3, 4))])
def test_reading_that_shares_equals_reading_that_does_not(family, beginnings):
    rows = Rows.grid(range(5), texts(begin=BEGIN))
    ours = rig(family, reuse=True, prefixes=beginnings)
    with torch.inference_mode():
        expected, found = plain(ours).read(rows, KEEP), ours.read(rows, KEEP)
        assert torch.equal(ours.read(rows, KEEP), found)
    assert found.shape == (20, KEEP, builders.WIDTH)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("family", builders.FAMILIES)
@pytest.mark.parametrize("beginnings", [(), (BEGIN,)])
def test_uneven_rows_are_read_as_even_ones_are(family, beginnings):
    passes = rig(family, reuse=True, prefixes=beginnings)
    grid = Rows.grid(range(5), texts(begin=BEGIN))
    some = [0, 2, 3, 5, 6, 13, 17, 18, 19]
    part = Rows([grid.owners[n] for n in some], [grid.texts[n] for n in some])
    with torch.inference_mode():
        whole, few = passes.read(grid, 1), passes.read(part, 1)
    assert torch.allclose(whole[some], few, atol=1e-4)


@pytest.mark.parametrize("family", builders.FAMILIES)
@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("beginnings", [(), (BEGIN,)])
def test_what_is_filled_is_what_is_read(family, reuse, beginnings):
    passes = rig(family, reuse=reuse, prefixes=beginnings)
    rows = Rows.grid(range(5), texts(begin=BEGIN))
    with torch.inference_mode():
        hidden, past = passes.prefill(rows, 2)
        assert torch.allclose(hidden, plain(passes).read(rows, 1)[:, 0], atol=1e-4)
        _, expected = plain(passes).prefill(rows, 2)
    assert past.pads() == [past.mask.shape[1] - len(text) for text in rows.texts]
    assert torch.equal(past.mask, expected.mask)
    real = past.mask.bool()[:, None, :, None]
    for ours, theirs in zip(past.cache.layers, expected.cache.layers, strict=True):
        if ours.keys is not None:
            width = past.mask.shape[1]
            assert ours.length == theirs.length == width
            for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                assert torch.allclose(a[:, :, :width] * real, b[:, :, :width] * real, atol=1e-4)


@pytest.mark.parametrize("family", builders.FAMILIES)
@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("beginnings", [(), (BEGIN,)])
def test_going_on_equals_reading_the_whole(family, reuse, beginnings):
    """Longer texts than Gemma's window; several rows from one place, candidates that join later."""
    passes = rig(family, reuse=reuse, prefixes=beginnings)
    prompts = texts(begin=BEGIN)
    more = [tuple(row) for row in builders.token_ids(4, 8, KEEP, 9)]
    grid = Rows.grid(range(5), prompts)
    places = [0, 1, 3, 4, 5, 5, 8, 9, 9, 12, 13, 15, 16, 17, 17]
    new = [more[n % 3] if n % 4 else more[3] for n in range(len(places))]
    new[5] = more[3]  # one text of its own beside another from the same place
    rows = Rows(
        [grid.owners[place] for place in places],
        [(*grid.texts[place], *end) for place, end in zip(places, new, strict=True)],
    )
    with torch.inference_mode():
        _, past = passes.prefill(grid, 0)
        after = CachedRows(past, places)
        found = passes.read(rows, KEEP, after)
        assert torch.equal(passes.read(rows, KEEP, after), found)  # the past is as it was
        assert torch.allclose(found, plain(passes).read(rows, KEEP), atol=1e-4)
        hidden, further = passes.prefill(rows, 1, after)
        assert torch.allclose(hidden, found[:, -1], atol=1e-4)
        longer = Rows(rows.owners, [(*text, 7) for text in rows.texts])
        last = passes.read(longer, 1, CachedRows(further, range(len(places))))
        assert torch.allclose(last, plain(passes).read(longer, 1), atol=1e-4)


def test_layers_below_the_first_edit_run_once_per_text():
    passes = rig("llama", reuse=True)
    rows = Rows.grid([2, 3, 4], texts())
    first, width = passes.stack.first_of(2), max(map(len, texts()))
    assert passes.stack.first_of(4) == first > 0
    counts = layers_run(passes)
    with torch.inference_mode():
        passes.read(rows, KEEP)
    # As is the attention of that layer: it comes before whatever is edited in it.
    assert counts == [4 * width] * (first + 1) + [12 * width] * (builders.LAYERS - first - 1)


def test_a_candidate_runs_no_layer_below_its_first_edit():
    passes = rig("llama", reuse=True)
    rows = Rows.grid(range(5), texts())
    counts = layers_run(passes)
    with torch.inference_mode():
        passes.read(rows, KEEP)
    width, firsts = max(map(len, texts())), [passes.stack.first_of(c) for c in range(5)]
    expected = [
        # Those that begin at a layer share its attention; those that wait, all of it.
        sum(first < layer for first in firsts) + (layer in firsts) + (layer < max(firsts))
        for layer in range(builders.LAYERS)
    ]
    assert counts == [4 * width * n for n in expected]


def test_drafts_pass_the_layers_below_the_first_edit_once_per_text():
    passes = rig("llama", reuse=True)
    rows, first = Rows.grid([2, 3, 4], texts()), passes.stack.first_of(2)
    longer = Rows(rows.owners, [(*text, 5, 6, 7) for text in rows.texts])
    with torch.inference_mode():
        _, past = passes.prefill(rows, 0)
        counts = layers_run(passes)
        passes.read(longer, 3, CachedRows(past, range(12)))
    assert counts == [4 * 3] * (first + 1) + [12 * 3] * (builders.LAYERS - first - 1)


def test_a_single_candidate_has_one_pass(pass_shapes):
    passes = rig("llama", reuse=True)
    with torch.inference_mode():
        passes.read(Rows.grid([4], texts()), KEEP)
        assert len(pass_shapes) == 1
        passes.read(Rows.grid([3, 4], texts()), KEEP)
    assert len(pass_shapes) == 3


def test_texts_of_rows_that_have_joined_are_not_run_for_others():
    passes = rig("llama", reuse=True)
    common, width = texts(), max(map(len, texts()))
    own = [(*text[:-1], 9) for text in common]
    assert passes.stack.first_of(0) == 0 < passes.stack.first_of(4) == 4
    rows = Rows([0] * 4 + [2] * 4 + [3] * 4 + [4] * 4, [*own, *common, *common, *common])
    counts = layers_run(passes)
    with torch.inference_mode():
        found = passes.read(rows, KEEP)
    assert counts == [8 * width] * 5 + [16 * width] * (builders.LAYERS - 5)
    with torch.inference_mode():
        assert torch.allclose(plain(passes).read(rows, KEEP), found, atol=1e-4)


def test_a_beginning_is_read_once_per_candidate_until_it_is_freed():
    passes = rig("llama", reuse=False, prefixes=[BEGIN])
    rows = Rows.grid(range(5), texts(begin=BEGIN))
    counts = layers_run(passes)
    rest, begun = 20 * max(map(len, texts())), 5 * len(BEGIN)
    with torch.inference_mode():
        passes.read(rows, KEEP)
        assert counts == [rest + begun] * builders.LAYERS
        passes.prefill(rows, 3)
        assert counts == [2 * rest + begun] * builders.LAYERS
        passes.free()
        assert not passes._prefilled
        passes.read(rows, KEEP)
    assert counts == [3 * rest + 2 * begun] * builders.LAYERS


def test_a_beginning_is_read_by_the_candidates_of_the_pass_alone():
    passes = rig("llama", reuse=False, prefixes=[BEGIN])
    counts = layers_run(passes)
    with torch.inference_mode():
        passes.read(Rows.grid([1, 3], texts(2, BEGIN)), KEEP)
    rest = 4 * max(map(len, texts(2)))
    assert counts == [rest + 2 * len(BEGIN)] * builders.LAYERS


def test_a_short_beginning_of_long_texts_is_read_with_them():
    begin = BEGIN[:1]
    passes = rig("llama", reuse=False, prefixes=[begin])
    long = [(*begin, *range(20, 60)), (*begin, *range(30, 66))]
    counts = layers_run(passes)
    with torch.inference_mode():
        passes.read(Rows.grid([0], long), KEEP)
    assert counts == [2 * 41] * builders.LAYERS


def test_a_beginning_ends_before_what_is_to_be_kept():
    passes = rig("llama", reuse=False, prefixes=[BEGIN])
    rows = Rows.grid([0, 1], [(*BEGIN, 9, 10)])
    with torch.inference_mode():
        found = passes.read(rows, 4)
        assert found.shape == (2, 4, builders.WIDTH)
        assert torch.equal(found, plain(passes).read(rows, 4))


def test_a_text_that_is_but_a_beginning_is_read_whole():
    passes = rig("llama", reuse=False, prefixes=[BEGIN])
    counts = layers_run(passes)
    with torch.inference_mode():
        passes.read(Rows.grid([0], [BEGIN, (*BEGIN, 9)]), 1)
    assert counts == [2 * (len(BEGIN) + 1)] * builders.LAYERS
