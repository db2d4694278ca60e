"""How large a pass is: what the configuration says, else what the machine shows."""

from __future__ import annotations

import json
from itertools import accumulate
from types import SimpleNamespace

import builders
import families
import psutil
import pytest
import torch

from excise.config import load_config
from excise.engine import batch_sizing
from excise.engine.batch_sizing import Sizing, from_dict, size, usual_length
from excise.engine.engine import Plan
from excise.model.forward import Forward


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
    for sizing in (
        Sizing(Plan(40, 3, 80, False), 12),
        Sizing(Plan(256, 8, 2048, True, 9000, 10**6), 16),
    ):
        assert from_dict(json.loads(json.dumps(sizing.as_dict()))) == sizing


@pytest.mark.parametrize("prompts", [1, 5, 40])
def test_what_is_measured_is_within_bounds(model, prompts):
    found = size(model, config(scores__max_new_tokens=4), 12, prompts)
    assert 1 <= found.plan.rows <= 16 * prompts
    assert 1 <= found.plan.stack <= found.batch <= 16
    assert found.plan.stack <= max(1, found.plan.decode // prompts)


def costing(monkeypatch, call, token, *, slow=(), fails=None):
    """The clock cannot be steered, so what passes take is given. Returns those asked for."""
    asked, now = [], [0.0]

    def seconds(_loaded, rows, tokens):
        asked.append((rows, tokens))
        if fails is not None and len(asked) == fails[0]:
            raise fails[1]
        took = (call + token * rows * tokens) * (10 if len(asked) in slow else 1)
        now[0] += took
        return took

    monkeypatch.setattr(batch_sizing, "_seconds", seconds)
    monkeypatch.setattr(batch_sizing.time, "perf_counter", lambda: now[0])
    return asked


def throughput(rows, tokens, call, token):
    return rows * tokens / (call + token * rows * tokens)


COSTS = [(1e-2, 1e-4), (5e-2, 2e-3), (1e-2, 1e-6), (3e-3, 3e-5), (0.2, 1e-2)]


@pytest.mark.parametrize(("call", "token"), COSTS)
@pytest.mark.parametrize("tokens", [7, 24, 90, 700])
def test_rows_are_those_from_which_on_twice_as_many_gain_little(
    model, monkeypatch, call, token, tokens
):
    costing(monkeypatch, call, token)
    rows = batch_sizing._fastest_rows(model, tokens, 10**6)
    here = throughput(rows, tokens, call, token)
    assert throughput(2 * rows, tokens, call, token) < 1.051 * here
    if rows > max(1, min(16, 4096 // tokens)):  # else it is what no pass has less than
        fewer, twice = (throughput(n, tokens, call, token) for n in (rows - 1, 2 * rows - 2))
        assert twice > 1.049 * fewer


@pytest.mark.parametrize(("call", "token"), COSTS)
@pytest.mark.parametrize("slow", range(1, 12))
def test_one_slow_pass_is_forgiven(model, monkeypatch, call, token, slow):
    """On a machine that does other work beside; it may end the measuring, and never costs the run 5 %."""
    costing(monkeypatch, call, token, slow=(slow,))
    rows = batch_sizing._fastest_rows(model, 24, 10**6)
    assert throughput(rows, 24, call, token) > 0.95 / 1.06 / token


@pytest.mark.parametrize("limit", [1, 3, 7, 20, 100])
def test_never_more_rows_than_fit_are_tried_or_chosen(model, monkeypatch, limit):
    asked = costing(monkeypatch, 1.0e-2, 1e-7)
    assert batch_sizing._fastest_rows(model, 10, limit) == limit
    assert max(rows for rows, _ in asked) <= limit


@pytest.mark.parametrize(
    ("pass_", "error", "most"),
    [
        (1, MemoryError(), 1),
        (2, MemoryError(), 1),
        (5, torch.OutOfMemoryError("CUDA out of memory."), 4),  # 1, 1, 2, 4 rows, and not 8
        (5, RuntimeError("DefaultCPUAllocator: can't allocate memory"), 4),
        (7, torch.OutOfMemoryError("CUDA out of memory."), 16),
    ],
)
def test_where_memory_runs_out_what_did_fit_is_chosen(model, monkeypatch, pass_, error, most):
    costing(monkeypatch, 1e-2, 1e-7, fails=(pass_, error))
    assert batch_sizing._fastest_rows(model, 10, 10_000) == most


def test_other_errors_are_not_taken_for_memory(model, monkeypatch):
    costing(monkeypatch, 1e-2, 1e-7, fails=(3, RuntimeError("shapes cannot be multiplied")))
    with pytest.raises(RuntimeError, match="shapes"):
        batch_sizing._fastest_rows(model, 10, 100)


def test_offloaded_weights_are_brought_for_no_pass_of_it(model, monkeypatch):
    asked = costing(monkeypatch, 1e-2, 1e-7)
    monkeypatch.setattr(batch_sizing, "any_offloaded", lambda _model: True)
    assert batch_sizing._fastest_rows(model, 64, 10_000) == 2**15 // 64
    assert batch_sizing._fastest_rows(model, 64, 50) == 50
    assert not asked


@pytest.mark.parametrize(("call", "token"), COSTS)
def test_short_passes_suffice_however_long_the_prompts_are(model, monkeypatch, call, token):
    """Of prompts of 4,000 tokens none is read whole where a token costs much; nothing takes long."""
    asked = costing(monkeypatch, call, token)
    batch_sizing._fastest_rows(model, 4000, 10**6)
    smallest = call + 16 * token
    assert max(call + token * r * t for r, t in asked) < 16 * smallest
    assert sum(call + token * r * t for r, t in asked) < 32 * smallest


def test_narrow_models_get_more_rows_than_are_fastest_alone_and_wide_ones_do_not(
    model, monkeypatch
):
    """Whatever is measured as fastest, states of a pass take 3 MiB in float32 where prompts suffice."""
    monkeypatch.setattr(batch_sizing, "_fastest_rows", lambda *_: 16)
    asked = config(scores__max_new_tokens=8)
    assert batch_sizing.size(model, asked, 24, 1000).plan.rows == 3 * 2**20 // (
        4 * builders.WIDTH * 24
    )
    assert batch_sizing.size(model, asked, 24, 3).plan.rows == 16 * 3  # no more than a batch has
    monkeypatch.setattr(batch_sizing, "_FEWEST_BYTES", 4 * builders.WIDTH * 24 * 2)
    assert batch_sizing.size(model, asked, 24, 1000).plan.rows == 16


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_cache_bytes_are_those_of_one_token_of_one_row(family):
    loaded = builders.loaded(family)
    found = batch_sizing._cache_bytes(batch_sizing._filled_cache(loaded)[0])
    own = loaded.model(torch.tensor([[5] * 7, [6] * 7]), use_cache=True).past_key_values
    filled = [layer for layer in own.layers if getattr(layer, "keys", None) is not None]
    total = sum(layer.keys.nbytes + layer.values.nbytes for layer in filled)
    assert found == (total / (2 * 7), 0)


def test_states_that_do_not_grow_are_counted_once_per_row():
    loaded = families.loaded(families.model("qwen3_next"))
    _, per_row = batch_sizing._cache_bytes(batch_sizing._filled_cache(loaded)[0])
    own = loaded.model(torch.tensor([[5] * 7, [6] * 7]), use_cache=True).past_key_values
    linear = [layer for layer in own.layers if hasattr(layer, "recurrent_states")]
    states = [
        s
        for layer in linear
        for s in (*layer.conv_states.values(), *layer.recurrent_states.values())
    ]
    assert per_row == sum(s.nbytes for s in states) / 2


def test_memory_rows_shrink_with_length_and_never_vanish(model):
    rows = [batch_sizing.room_of(model, config()).rows(n) for n in (11, 1010, 101_000, 10**15)]
    assert rows == sorted(rows, reverse=True)
    assert rows[0] > rows[2] >= rows[3] == 1


def test_memory_rows_follow_the_fraction(model):
    half, tenth = (
        batch_sizing.room_of(model, config(engine__memory_fraction=f)).rows(10) for f in (0.5, 0.05)
    )
    assert tenth == pytest.approx(half / 10, rel=0.2)  # others use the memory meanwhile


def test_passes_take_time_and_leave_the_model_alone(model):
    before = model.model(torch.tensor([[5, 6, 7]])).logits
    assert batch_sizing._seconds(model, 4, 12) > 0
    assert torch.equal(model.model(torch.tensor([[5, 6, 7]])).logits, before)


# -- memory by what a pass really allocates --------------------------------------------------------


def peak(act):
    """Most bytes that `act` holds at once beyond what there was before, as PyTorch's profiler sees it."""
    act()
    with torch.profiler.profile(profile_memory=True) as seen:
        act()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes))


def memory_model(name):
    if name in builders.FAMILIES:
        return builders.loaded(name)
    built = families.model(name.removesuffix(" eager"))
    if name.endswith("eager"):
        built.set_attn_implementation("eager")
    return families.loaded(built)


@pytest.mark.parametrize(
    "name",
    ["llama", "gemma4", "mistral", "mistral eager", "gemma2", "gpt_oss", "deepseek_v3", "phi3"],
)
def test_a_long_pass_takes_what_was_planned_for_it(name):
    """Bias and scores grow with the square of a text: most of its memory where it is long."""
    model, tokens = memory_model(name), 600
    forward = Forward(model.model, model.anatomy)
    ids = torch.ones(2, tokens, dtype=torch.long)
    mask = ids.clone()
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)

    def act():
        with torch.inference_mode():
            forward.hidden(ids, mask, positions, forward.cache(tokens))

    room = batch_sizing.room_of(model, config(engine__memory_fraction=1.0))
    planned = room.free / room.rows(tokens)
    assert peak(act) / 2 < planned < 3 * peak(act) / 2


# -- one long prompt among short ones --------------------------------------------------------------


def test_one_long_prompt_does_not_say_how_large_passes_are(model, monkeypatch):
    """4,501 tokens: passes of many such rows would take minutes, each, and more memory than there is."""
    through, seen = Forward.run_layers, []

    def counted(self, layers, given, *args, **kwargs):
        seen.append(given.ids.shape[-1])
        return through(self, layers, given, *args, **kwargs)

    monkeypatch.setattr(Forward, "run_layers", counted)
    lengths = [20] * 99 + [4501]
    told = []
    asked = config(search__trials=1_000_000)
    short = size(model, asked, 20, 100).plan
    found = size(model, asked, usual_length(lengths), 100, told.append).plan
    assert usual_length(lengths) == 80 >= max(seen) > 0
    assert found.stack == short.stack == 16
    assert found.rows >= 3 * 2**20 // (4 * builders.WIDTH * 80)
    free = psutil.virtual_memory().available
    assert 20 * found.fits("rows", 4501) * 4501**2 < free  # the bias alone
    assert found.fits("rows", 4501) < found.fits("rows", 20) == found.rows
    assert told
    assert all(event.phase == "plan" for event in told)


@pytest.mark.parametrize("lengths", [[7], [5, 9, 12, 30], [20] * 50 + [70]])
def test_prompts_of_like_length_are_planned_for_by_the_longest(lengths):
    assert usual_length(lengths) == max(lengths)


@pytest.mark.parametrize("per_token", [1e-9, 1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("search", [1e4, 1e6, 1e9])
def test_measuring_takes_seconds_and_little_beside_the_search(
    model, monkeypatch, per_token, search
):
    asked = costing(monkeypatch, 1e-3, per_token)
    rows = batch_sizing._fastest_rows(model, 24, 10_000, search)
    now = sum(1e-3 + r * t * per_token for r, t in asked)
    first = 1e-3 + 16 * per_token  # the least that can be looked at, once to warm up
    assert now <= max(2.0, 2 * first)
    assert now <= max(0.02 * search * (per_token + 1e-3 / 16), 2 * first)
    assert rows >= 16


def test_a_sizing_of_a_version_before_knows_no_bound_on_tokens():
    plan = from_dict({"rows": 40, "stack": 3, "decode": 80, "reuse": True, "batch": 12}).plan
    assert plan == Plan(40, 3, 80, True)
    assert plan.fits("rows", 10**6) == 40


def test_responses_to_direction_prompts_are_had_within_the_free_memory(monkeypatch):
    loaded = builders.loaded("qwen3")
    prompts = {"contrast": builders.token_ids(40, 5)}
    asked = config(scores__max_new_tokens=8)
    roomy = batch_sizing.direction_engine(loaded, prompts, asked)
    assert (roomy.fitted_plan.rows, roomy.fitted_plan.decode) == (Plan().rows, Plan().decode)
    few = SimpleNamespace(available=10**6)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: few)
    tight = batch_sizing.direction_engine(loaded, prompts, asked)
    longest = max(map(len, prompts["contrast"])) + 8
    assert tight.fitted_plan.fits("rows", longest) < 40 < roomy.fitted_plan.fits("rows", longest)
    for engine in (roomy, tight):
        engine.original("contrast")
    assert roomy.original("contrast").responses == tight.original("contrast").responses
