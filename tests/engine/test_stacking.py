"""Stacked edits against the naive one: each row by itself, with the edited weights."""

from __future__ import annotations

import builders
import pytest
import torch
from torch import nn

from excise.engine import stacking
from excise.engine.stacking import Stack
from excise.model.anatomy import Writer
from excise.model.edits import Edit

O, I, T = 12, 10, 3


@pytest.fixture(scope="module", autouse=True)
def inference():
    """As the engine works: parameters do not record."""
    with torch.inference_mode():
        yield


def writers(count=2, *, bias=True):
    """Some writers with random weights, at layers 3, 4, ..."""
    torch.manual_seed(0)
    modules = [nn.Linear(I, O, bias=bias) for _ in range(count)]
    return [Writer("w", 3 + n, f"w{n}", m, None) for n, m in enumerate(modules)]


def edit(seed, rank=1, *, scale=True, shift=True):
    g = torch.Generator().manual_seed(seed)
    return Edit(
        torch.randn(O, rank, generator=g),
        torch.randn(rank, I, generator=g),
        torch.rand(O, generator=g) + 0.5 if scale else None,
        torch.randn(O, generator=g) if shift else None,
    )


def naive(module, change, x):
    """One row's output (T, O) from weights and bias written out, in float64."""
    if change is None:
        return nn.functional.linear(x.double(), module.weight.double(), module.bias.double())
    weight = change.apply_to_weight(module.weight.double())
    return nn.functional.linear(x.double(), weight, change.apply_to_bias(module.bias.double()))


def check(candidates, rows, count=2):
    """A stack with these candidates gives every row its own candidate's output."""
    chain = writers(count)
    stack = Stack(chain, candidates)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(len(rows), T, I, generator=g)
    with stack.applied(rows):
        for number, writer in enumerate(chain):
            found = writer.module(x)
            assert found.shape == (len(rows), T, O)
            for b, row in enumerate(rows):
                expected = naive(writer.module, candidates[row][number], x[b])
                assert torch.allclose(found[b].double(), expected, atol=1e-5)


EVEN = [0, 0, 1, 1, 2, 2]
RAGGED = [0, 1, 1, 1, 2, 2]
ROWS = [EVEN, RAGGED, [0, 1, 2], [1, 1], [1, 2], [0, 0, 2, 2], [0, 2], [2], [0, 0, 0, 1, 2, 2, 2]]


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_rows_even_and_ragged(rows):
    check([[edit(10 * c + w) for w in range(2)] for c in range(3)], rows)


@pytest.mark.parametrize("rows", [EVEN, RAGGED], ids=["even", "ragged"])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 3, 2), (5, 1, 1)], ids=str)
def test_ranks_above_one_and_mixed(rows, ranks):
    check([[edit(c, rank), edit(c + 9, rank)] for c, rank in enumerate(ranks)], rows)


@pytest.mark.parametrize("rows", [EVEN, RAGGED], ids=["even", "ragged"])
def test_candidates_that_leave_writers_alone(rows):
    check([[edit(0), None], [None, None], [None, edit(1)]], rows)
    check([[edit(0, 3), None], [edit(1), None], [None, None]], rows)


@pytest.mark.parametrize("rows", [EVEN, RAGGED], ids=["even", "ragged"])
def test_scales_and_shifts_that_only_some_edits_have(rows):
    kinds = [{"scale": False}, {"shift": False}, {"scale": False, "shift": False}]
    check(
        [[edit(c, scale=True, shift=True), edit(c, **kind)] for c, kind in enumerate(kinds)], rows
    )


def test_a_stack_of_nothing_puts_no_hooks_and_starts_nowhere():
    chain = writers()
    stack = Stack(chain, [[None, None], [None, None]])
    assert min(stack.first_of(0), stack.first_of(1)) > 1000
    with stack.applied([0, 1]):
        assert not any(w.module._forward_hooks for w in chain)


def test_the_first_layer_is_the_lowest_that_a_candidate_edits():
    chain = writers(3)
    stack = Stack(chain, [[None, None, edit(0)], [None, edit(0), edit(1)]])
    assert [stack.first_of(0), stack.first_of(1)] == [5, 4]


def test_between_batches_the_model_is_as_it_was():
    chain = writers()
    stack = Stack(chain, [[edit(0), edit(1)]])
    x = torch.randn(1, 3, chain[0].module.in_features)
    plain = chain[0].module(x)
    with stack.applied([0]):
        edited = chain[0].module(x)
    assert torch.equal(chain[0].module(x), plain)
    with stack.applied([0]):
        assert torch.equal(chain[0].module(x), edited)
    assert not torch.equal(edited, plain)


def test_the_original_is_the_candidate_without_edits():
    chain = writers()
    spelt, short = (
        Stack(chain, [[None, None], [edit(0), edit(1)]]),
        Stack(chain, [stacking.ORIGINAL, [edit(0), edit(1)]]),
    )
    assert short.first_of(0) == spelt.first_of(0)
    x = torch.randn(2, T, I)
    found = []
    for stack in (spelt, short):
        with stack.applied([0, 1]):
            found.append(chain[0].module(x))
    assert torch.equal(*found)


def test_weights_are_not_written_and_hooks_go():
    chain = writers()
    before = [w.module.weight.clone() for w in chain]
    stack = Stack(chain, [[edit(0), edit(1)]])
    x = torch.randn(1, T, I)
    plain = chain[0].module(x)
    with stack.applied([0]):
        assert not torch.equal(chain[0].module(x), plain)
    assert torch.equal(chain[0].module(x), plain)
    assert all(torch.equal(w.module.weight, old) for w, old in zip(chain, before, strict=True))


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_hooks_go_after_an_error_and_others_hooks_stay(error):
    chain = writers()
    stack = Stack(chain, [[edit(0), edit(1)]])
    theirs = chain[0].module.register_forward_hook(lambda _m, _a, out: out)
    seen = []

    def strike():
        with stack.applied([0]):
            seen.append(len(chain[0].module._forward_hooks))
            raise error

    with pytest.raises(type(error)):
        strike()
    assert seen == [2]
    assert list(chain[0].module._forward_hooks) == [theirs.id]
    assert not chain[1].module._forward_hooks


@pytest.mark.parametrize("room", [0, 1 << 30], ids=["no room", "room"])
def test_gathered_edits_are_kept_while_they_fit_and_made_anew_for_the_next_batch(room, monkeypatch):
    monkeypatch.setattr(stacking, "_GATHER_BYTES", room)
    takes = []
    take = stacking.PackedEdits.take
    monkeypatch.setattr(
        stacking.PackedEdits, "take", lambda self, rows: takes.append(1) or take(self, rows)
    )
    candidates = [[edit(10 * c + w) for w in range(2)] for c in range(3)]
    chain = writers()
    stack = Stack(chain, candidates)
    x = torch.randn(4, T, I)
    for rows in ([0, 1, 1, 2], [0, 0, 0, 2], [0, 1, 1, 2]):
        takes.clear()
        with stack.applied(rows):
            for _ in range(3):
                found = chain[0].module(x)
                for b, row in enumerate(rows):
                    expected = naive(chain[0].module, candidates[row][0], x[b])
                    assert torch.allclose(found[b].double(), expected, atol=1e-5)
        assert len(takes) == (1 if room else 3)
    takes.clear()
    with stack.applied([0, 1]):
        chain[0].module(x[:2])
    assert not takes  # even rows need no gathering


def test_part_bytes_are_what_a_gathered_row_takes():
    chain = writers()
    part = Stack(chain, [[edit(0, 2), None], [edit(1), None]])._parts[chain[0].module]
    assert part.row_bytes == 4 * (2 * O + 2 * I + O + O)
    row = part.take(torch.tensor([1]))
    tensors = (row.left, row.right, row.scale, row.shift)
    assert sum(t.numel() * t.element_size() for t in tensors) == part.row_bytes


def test_edits_are_stacked_in_the_writers_dtype():
    chain = writers()
    chain[0].module.to(torch.bfloat16)
    stack = Stack(chain, [[edit(0), edit(1)]])
    part = stack._parts[chain[0].module]
    assert {t.dtype for t in (part.left, part.right, part.scale, part.shift)} == {torch.bfloat16}
    with stack.applied([0]):
        assert chain[0].module(torch.randn(1, T, I).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_a_real_models_edits_row_by_row(family):
    model = builders.loaded(family)
    method = builders.method(model)
    edits = [method.edits(c) for c in builders.candidates(3)]
    chain = method.writers
    ids = torch.tensor(builders.token_ids(1, 5, 9, 9)).repeat(3, 1)
    stack = Stack(chain, edits)
    found = {}
    for rows in ([0, 1, 2], [2, 2, 2], [0, 0, 2]):
        with stack.applied(rows):
            logits = model.model(ids).logits
        for row, value in zip(rows, logits, strict=True):
            expected = found.setdefault(row, value)
            assert torch.allclose(value, expected, atol=1e-3)
    assert not torch.allclose(found[0], found[2], atol=1e-2)
