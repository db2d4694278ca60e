"""How large a pass is: what the configuration says, else what the machine shows."""

from __future__ import annotations

import json

import builders
import families
import pytest
import torch

from excise import planning
from excise.config import load_config
from excise.engine import Plan
from excise.planning import Sizing, from_dict, size


@pytest.fixture(scope="module")
def model():
    return builders.loaded("gemma4")


def config(**flags):
    return load_config(flags={key.replace("__", "."): value for key, value in flags.items()})


@pytest.mark.parametrize(
    ("rows", "batch", "prompts", "expected"),
    [
        (64, 0, 16, (64, 16, 16)),  # all prompts of sixteen candidates decode together
        (64, 0, 64, (64, 8, 16)),
        (64, 0, 100, (64, 5, 10)),  # as many candidates as fit 8 x 64 decoding rows
        (8, 0, 100, (8, 1, 4)),  # less than one candidate's prompts
        (4096, 0, 100, (4096, 16, 16)),  # never more than sixteen in a stack or a batch
        (4096, 3, 100, (4096, 3, 3)),
        (64, 40, 16, (64, 16, 40)),
        (1, 1, 1, (1, 1, 1)),
    ],
)
def test_rows_and_batch_as_configured(model, rows, batch, prompts, expected):
    found = size(model, config(engine__rows=rows, search__batch=batch), 10, prompts)
    assert (found.plan.rows, found.plan.stack, found.batch) == expected
    assert found.plan.stack <= found.batch
    assert found.plan.reuse is True


def test_reuse_is_passed_on(model):
    assert size(model, config(engine__rows=8, engine__reuse=False), 10, 10).plan.reuse is False


def test_a_sizing_comes_back_from_json():
    for sizing in (Sizing(Plan(40, 3, 80, False), 12), Sizing(Plan(256, 8, 2048, True), 16)):
        assert from_dict(json.loads(json.dumps(sizing.as_dict()))) == sizing


@pytest.mark.parametrize("prompts", [1, 5, 40])
def test_what_is_measured_is_within_bounds(model, prompts):
    found = size(model, config(scores__max_new_tokens=4), 12, prompts)
    assert 1 <= found.plan.rows <= 16 * prompts
    assert 1 <= found.plan.stack <= found.batch <= 16
    assert found.plan.stack <= max(1, found.plan.decode // prompts)


def speeds(monkeypatch, *values):
    """The clock cannot be steered, so the speeds are given: one per number of rows tried."""
    asked = []

    def speed(_forward, _device, rows, tokens):
        asked.append(rows)
        value = values[len(asked) - 1]
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(planning, "_speed", speed)
    return asked


@pytest.mark.parametrize(
    ("values", "limit", "best"),
    [
        ((100.0, 200.0, 300.0, 301.0, 302.0), 10_000, 64),  # not worth their memory
        ((100.0, 90.0, 90.0), 10_000, 16),
        ((100.0, 90.0, 200.0, 190.0, 180.0), 10_000, 64),  # one slow measurement is forgiven
        ((1.0, 2.0, 4.0), 100, 64),  # 128 would be over the limit
        ((1.0,), 7, 7),
        ((1.0, 2.0, torch.OutOfMemoryError("CUDA out of memory.")), 10_000, 32),
        ((1.0, RuntimeError("DefaultCPUAllocator: can't allocate memory")), 10_000, 16),
        ((MemoryError(),), 10_000, 1),
    ],
)
def test_rows_double_while_it_pays(model, monkeypatch, values, limit, best):
    asked = speeds(monkeypatch, *values)
    assert planning._fastest_rows(model, 10, limit) == best
    assert asked == [min(16, limit) * 2**n for n in range(len(values))]


def test_other_errors_are_not_taken_for_memory(model, monkeypatch):
    speeds(monkeypatch, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        planning._fastest_rows(model, 10, 100)


def test_narrow_models_get_more_rows_than_are_fastest_alone_and_wide_ones_do_not(
    model, monkeypatch
):
    """Whatever is measured as fastest, states of a pass take 3 MiB in float32 where prompts suffice."""
    monkeypatch.setattr(planning, "_fastest_rows", lambda *_: 16)
    asked = config(scores__max_new_tokens=8)
    assert planning.size(model, asked, 24, 1000).plan.rows == 3 * 2**20 // (4 * builders.WIDTH * 24)
    assert planning.size(model, asked, 24, 3).plan.rows == 16 * 3  # no more than a batch has
    monkeypatch.setattr(planning, "_FEWEST_BYTES", 4 * builders.WIDTH * 24 * 2)
    assert planning.size(model, asked, 24, 1000).plan.rows == 16


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_cache_bytes_are_those_of_one_token_of_one_row(family):
    loaded = builders.loaded(family)
    found = planning._cache_bytes(loaded)
    own = loaded.model(torch.tensor([[5] * 7, [6] * 7]), use_cache=True).past_key_values
    filled = [layer for layer in own.layers if getattr(layer, "keys", None) is not None]
    total = sum(layer.keys.nbytes + layer.values.nbytes for layer in filled)
    assert found == (total / (2 * 7), 0)


def test_states_that_do_not_grow_are_counted_once_per_row():
    loaded = families.loaded(families.model("qwen3_next"))
    _, per_row = planning._cache_bytes(loaded)
    own = loaded.model(torch.tensor([[5] * 7, [6] * 7]), use_cache=True).past_key_values
    linear = [layer for layer in own.layers if hasattr(layer, "recurrent_states")]
    states = [
        s
        for layer in linear
        for s in (*layer.conv_states.values(), *layer.recurrent_states.values())
    ]
    assert per_row == sum(s.nbytes for s in states) / 2


def test_memory_rows_shrink_with_length_and_never_vanish(model):
    rows = [
        planning.memory_rows(model, config(scores__max_new_tokens=n), longest)
        for n, longest in ((1, 10), (1000, 10), (1000, 100_000), (10**15, 10))
    ]
    assert rows == sorted(rows, reverse=True)
    assert rows[0] > rows[2] >= rows[3] == 1


def test_memory_rows_follow_the_fraction(model):
    half, tenth = (
        planning.memory_rows(model, config(engine__memory_fraction=f), 10) for f in (0.5, 0.05)
    )
    assert tenth == pytest.approx(half / 10, rel=0.2)  # others use the memory meanwhile


def test_speed_is_positive_and_leaves_the_model_alone(model):
    from excise.forward import Forward

    before = model.model(torch.tensor([[5, 6, 7]])).logits
    forward = Forward(model.model, model.anatomy)
    assert planning._speed(forward, model.device, 4, 12) > 0
    assert torch.equal(model.model(torch.tensor([[5, 6, 7]])).logits, before)
