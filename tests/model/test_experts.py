"""Fused experts: stacked edits of any rank against merged weights, exact restore."""

from __future__ import annotations

import builders
import families
import pytest
import torch

from excise.engine.stacking import Stack
from excise.model.edits import Edit

NAMES = ("qwen3_moe", "gpt_oss", "llama4_text", "nemotron_h")


@pytest.fixture(scope="module", params=NAMES)
def loaded(request):
    return families.loaded(families.model(request.param))


def random_edits(writers, rank, seed):
    """An edit of this rank for most writers; the others are left alone."""
    draw = torch.Generator().manual_seed(seed)
    out = []
    for number, writer in enumerate(writers):
        o, i = writer.weight.shape
        edit = Edit(
            0.3 * torch.randn(o, rank, generator=draw),
            0.3 * torch.randn(rank, i, generator=draw),
            1 + 0.1 * torch.rand(o, generator=draw) if seed % 2 else None,
            None if writer.bias is None else 0.1 * torch.randn(o, generator=draw),
        )
        out.append(None if (number + seed) % 5 == 0 else edit)
    return out


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("rows", [[0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2]])
def test_each_row_carries_its_own_candidate(loaded, rank, rows):
    writers = loaded.anatomy.writers
    candidates = [random_edits(writers, rank, seed) for seed in range(3)]
    ids = torch.tensor(builders.token_ids(len(rows), 4, 9, 9))
    stack = Stack(writers, candidates)
    with stack.applied(rows):
        found = loaded.model(ids).logits
    for row, candidate in enumerate(rows):
        alone = families.merged(loaded.model, writers, candidates[candidate])
        assert torch.allclose(found[row], alone(ids[row : row + 1]).logits[0], atol=2e-4)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")])
def test_the_model_is_what_it_was_whatever_ends_a_pass(loaded, error):
    ids = torch.tensor(builders.token_ids(2, 4, 9, 9))
    before = loaded.model(ids).logits
    writers = loaded.anatomy.writers
    stack = Stack(writers, [random_edits(writers, 1, 1)])

    def strike(*_args):
        raise error

    handle = loaded.anatomy.layers[-1].register_forward_hook(strike)
    with pytest.raises(type(error)), stack.applied([0, 0]):
        loaded.model(ids)
    handle.remove()
    assert all(not m._forward_hooks and "forward" not in m.__dict__ for m in loaded.model.modules())
    assert torch.equal(loaded.model(ids).logits, before)


def test_small_pieces_give_the_same(loaded, monkeypatch):
    writers = loaded.anatomy.writers
    ids = torch.tensor(builders.token_ids(2, 4, 9, 9))
    stack = Stack(writers, [random_edits(writers, 2, 1)])
    with stack.applied([0, 0]):
        whole = loaded.model(ids).logits
    monkeypatch.setattr("excise.model.experts._GATHER_BYTES", 1)
    with stack.applied([0, 0]):
        assert torch.allclose(loaded.model(ids).logits, whole, atol=1e-5)
