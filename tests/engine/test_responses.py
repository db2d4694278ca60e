"""Drafts change how responses are found; in float32, where nothing ties, never what they are."""

from __future__ import annotations

import gc

import builders
import families
import pytest
import torch
from transformers import AutoModelForCausalLM

from excise.engine import engine as engine_module
from excise.engine import responses as answering
from excise.engine.engine import Engine, Plan
from excise.engine.requests import Divergence, Evidence, Response, Responses
from excise.engine.responses import ResponseBatch
from excise.engine.stacking import Stack
from excise.model.kv_cache import RoomyLayer

LIMIT = 12
TARGET = [Responses("target")]
BOTH = [Responses("target"), Divergence()]
PLAN = Plan(rows=20, stack=4, decode=400)


BEGIN = builders.token_ids(1, 4, 3, 3)[0]  # what all prompts begin with


def engine(model, plan=PLAN, limit=LIMIT):
    prompts = {
        "target": [BEGIN + row for row in builders.token_ids(9, 1, 2, 9)],
        "contrast": [BEGIN + row for row in builders.token_ids(5, 2, 2, 9)],
    }
    writers = model.anatomy.select(builders.COMPONENTS)
    return Engine(model, writers, prompts, max_new_tokens=limit, plan=plan)


def setup(family):
    # With biases a random Llama says one token for ever, and no two responses would differ.
    plain = {"attention_bias": False, "mlp_bias": False} if family == "llama" else {}
    model = builders.loaded(family, 3 if plain else 0, **plain)
    method = builders.method(model)
    return model, [method.edits(c) for c in builders.candidates(7)]


def tokens(evidence):
    return [[r.tokens for r in one.responses["target"]] for one in evidence]


def teach(engine_, answers):
    """Make the engine expect these responses: per candidate, per prompt."""
    engine_._learn(
        [Evidence({"target": [Response(t, "", True) for t in rows]}) for rows in answers]
    )


@pytest.mark.parametrize("family", builders.FAMILIES)
@pytest.mark.parametrize(
    "rewrite",
    [
        lambda said: said,
        lambda said: said[:5],  # a draft that ends before the response does
        lambda said: (*said[:3], (said[3] + 1) % 300, *said[4:]),  # one that leaves it
        lambda said: said[:1],
        lambda said: (299 - said[0], *said[1:]),  # one that never fits
    ],
    ids=["whole", "short", "wrong in the middle", "one token", "wrong from the start"],
)
def test_responses_are_the_same_whatever_was_expected(family, rewrite):
    model, edits = setup(family)
    expected = engine(model).measure(edits, TARGET)
    said = tokens(expected)
    ours = engine(model)
    teach(ours, [[rewrite(t) for t in rows] for rows in said])
    assert ours.measure(edits, TARGET) == expected


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_a_response_may_go_from_one_draft_to_another(family):
    model, edits = setup(family)
    expected = engine(model).measure(edits, TARGET)
    ours = engine(model)
    # Halves of the truth with wrong ends, of growing length, and the truth: each leads to the next.
    for cut in (2, 4, 6, LIMIT):
        teach(ours, [[(*t[:cut], 7, 7, 7)[:LIMIT] for t in rows] for rows in tokens(expected)])
    assert ours.measure(edits, TARGET) == expected


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_what_was_learnt_is_read_and_not_decoded(family, pass_shapes):
    model, edits = setup(family)
    edits = edits[:2]
    ours, expected = engine(model), engine(model).measure(edits, TARGET)
    teach(ours, tokens(expected))
    pass_shapes.clear()
    engine(model).measure(edits, TARGET)
    assert [width for _, width in pass_shapes].count(1) >= LIMIT - 1
    pass_shapes.clear()
    assert ours.measure(edits, TARGET) == expected
    assert pass_shapes
    assert all(width > 1 for _, width in pass_shapes)


@pytest.fixture
def stack_sizes(monkeypatch):
    """How many candidates every stack holds, from now on."""
    sizes = []

    class Counted(Stack):
        def __init__(self, writers, candidates):
            sizes.append(len(candidates))
            super().__init__(writers, candidates)

    monkeypatch.setattr(engine_module, "Stack", Counted)
    return sizes


def test_the_first_stack_that_others_learn_from_is_small(stack_sizes):
    model, edits = setup("qwen3")
    ours, twelve = engine(model, Plan(rows=64, stack=8, decode=1000)), (edits * 12)[:12]
    with ours.keeping_drafts():
        found = ours.measure(twelve, TARGET)
    assert stack_sizes == [2, 8, 2]
    stack_sizes.clear()
    with ours.keeping_drafts():
        assert ours.measure(twelve, TARGET) == found
    assert stack_sizes == [8, 4]


def test_edits_that_do_not_fit_together_are_stacked_apart(stack_sizes, monkeypatch):
    model, edits = setup("qwen3")
    heaviest = max(map(engine_module._edit_bytes, edits))
    expected = engine(model).measure(edits, TARGET)
    assert stack_sizes[0] == PLAN.stack == 4
    for room, size in ((3 * heaviest + 1, 3), (heaviest // 2, 1)):
        monkeypatch.setattr(engine_module, "_EDIT_BYTES", room)
        stack_sizes.clear()
        assert engine(model).measure(edits, TARGET) == expected
        assert stack_sizes[0] == size
    assert engine(model).measure([], TARGET) == []


def test_only_what_is_said_while_learning_is_learnt():
    model, edits = setup("qwen3")
    ours = engine(model)
    ours.measure(edits, TARGET)
    assert not ours._drafts
    with ours.keeping_drafts():
        ours.measure(edits, TARGET, {"target": 3})  # some of the prompts: no draft for the others
        assert not ours._drafts
        ours.measure(edits, TARGET)
    assert ours._drafts
    known = ours._drafts["target"].after(0, ())
    ours.measure(edits[::-1], TARGET)
    assert ours._drafts["target"].after(0, ()) == known


def test_decided_responses_are_cut_where_decoding_cuts_them():
    model, edits = setup("qwen3")
    asked = [Responses("target", decided=lambda text: len(text) > 4)]
    expected = engine(model).measure(edits, asked)
    ours = engine(model)
    # Whole ones, longer than is asked for; below, cut ones where whole ones are.
    teach(ours, tokens(engine(model).measure(edits, TARGET)))
    assert ours.measure(edits, asked) == expected
    cut = engine(model)
    teach(cut, tokens(expected))
    assert cut.measure(edits, TARGET) == engine(model).measure(edits, TARGET)


def test_a_smaller_limit_than_the_drafts_were_said_under():
    model, edits = setup("gemma4")
    ours = engine(model, limit=5)
    teach(ours, tokens(engine(model).measure(edits, TARGET)))
    assert ours.measure(edits, TARGET) == engine(model, limit=5).measure(edits, TARGET)


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_passes_of_any_size_find_the_same(rows):
    model, edits = setup("gemma4")
    expected = engine(model).measure(edits, TARGET)
    ours = engine(model, Plan(rows=rows, stack=4, decode=30))
    half = [[t if n % 2 else (*t[:4], 7) for n, t in enumerate(row)] for row in tokens(expected)]
    teach(ours, half)
    assert ours.measure(edits, TARGET) == expected


@pytest.mark.parametrize("depth", [0, 2, 5])
def test_out_of_memory_while_drafts_are_read(depth):
    model, edits = setup("gemma4")
    ours, expected = engine(model), engine(model).measure(edits, TARGET)
    teach(ours, tokens(expected))
    calls = 0

    def strike(_module, _args, output):
        nonlocal calls
        calls += 1
        if calls == depth + 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return output

    handle = model.anatomy.layers[5].mlp.down_proj.register_forward_hook(strike)
    assert ours.measure(edits, TARGET) == expected
    handle.remove()
    assert calls > depth + 1
    longest = max(map(len, ours.prompts["target"])) + ours.limit
    assert ours.fitted_plan.fits("rows", longest) < PLAN.fits("rows", longest)


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_a_batch_finds_the_same_whatever_was_measured_between_it_and_the_first(family, pass_shapes):
    """As a resume does; in bfloat16, where anything that rounds otherwise may show."""
    model, _ = setup(family)
    model.model.bfloat16()
    method = builders.method(model)
    batches = [[method.edits(c) for c in builders.candidates(5, seed)] for seed in range(5)]
    unbroken, resumed = engine(model), engine(model)
    for ours in (unbroken, resumed):
        with ours.keeping_drafts():
            ours.measure(batches[0], BOTH)
    for batch in batches[1:4]:
        unbroken.measure(batch, BOTH)
    pass_shapes.clear()
    one, other = (ours.measure(batches[4], BOTH) for ours in (unbroken, resumed))
    half = len(pass_shapes) // 2
    assert pass_shapes[:half] == pass_shapes[half:]  # every pass, so every rounding
    assert tokens(one) == tokens(other)
    for a, b in zip(one, other, strict=True):
        pairs = zip(a.divergence["contrast"], b.divergence["contrast"], strict=True)
        assert all(x.equal(y) for x, y in pairs)


def test_rows_that_are_through_do_not_run_out_of_positions():
    """GPT-2's positions are a table: rows that had said much already stay in the batch for a while."""
    config = families.config("gpt2")
    config.n_positions = 30
    built = families.randomised(AutoModelForCausalLM.from_config(config))
    model = families.loaded(built)
    method = families.method(model.anatomy)
    edits = [method.edits(c) for c in families.candidates(model.anatomy, 2)]
    prompts = {"target": builders.token_ids(6, 1, 18, 18)}

    def fresh():
        return Engine(model, method.writers, prompts, max_new_tokens=12, plan=PLAN)

    expected = fresh().measure(edits, TARGET)
    ours = fresh()
    teach(ours, [[t[:11] if n == 0 else () for n, t in enumerate(r)] for r in tokens(expected)])
    assert ours.measure(edits, TARGET) == expected


@pytest.mark.parametrize("kind", ["qwen3_next", "granitemoehybrid"])
def test_out_of_memory_where_caches_do_not_join(kind):
    model = families.loaded(families.model(kind))
    method = families.method(model.anatomy)
    edits = [method.edits(c) for c in families.candidates(model.anatomy, 3)]
    prompts = {"target": builders.token_ids(12, 1, 6, 6)}

    def fresh():
        plan = Plan(rows=12, stack=3)
        return Engine(model, method.writers, prompts, max_new_tokens=4, plan=plan)

    expected = fresh().measure(edits, TARGET)
    ours, struck = fresh(), []

    def strike(_module, _args, output):
        if not struck:
            struck.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return output

    model.anatomy.layers[0].register_forward_hook(strike)
    assert ours.measure(edits, TARGET) == expected
    assert struck


def without_beginnings(model, plan=PLAN):
    plain = engine(model, plan)
    plain._prefixes = []
    return plain


@pytest.mark.parametrize("family", builders.FAMILIES)
@pytest.mark.parametrize("stack", [1, 2, 3])
def test_no_stack_goes_on_from_anothers_beginning(family, stack):
    """Stacks of one size; the original is measured on the way, as a stack of one."""
    model, edits = setup(family)
    plan = Plan(rows=20, stack=stack, decode=400)
    ours, plain = engine(model, plan), without_beginnings(model, plan)
    for one, other in zip(
        ours.measure(edits[:6], BOTH), plain.measure(edits[:6], BOTH), strict=True
    ):
        assert one.responses == other.responses
        pairs = zip(one.divergence["contrast"], other.divergence["contrast"], strict=True)
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-7) for a, b in pairs)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_beginnings_back_off_with_the_rows_that_fit(most):
    model, edits = setup("gemma4")
    expected = engine(model).measure(edits, BOTH)

    def strike(_module, args):
        if len(args[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = model.anatomy.layers[2].self_attn.o_proj.register_forward_pre_hook(strike)
    found = engine(model).measure(edits, BOTH)
    handle.remove()
    for one, other in zip(found, expected, strict=True):
        assert one.responses == other.responses


@pytest.fixture
def rounds(monkeypatch):
    """How many rows each round of drafts had."""
    found, read = [], ResponseBatch._verify_drafts

    def count(self, likely, past):
        found.append(len(likely))
        return read(self, likely, past)

    monkeypatch.setattr(ResponseBatch, "_verify_drafts", count)
    return found


def test_drafts_that_bring_little_are_not_tried_again(rounds):
    model, edits = setup("qwen3")
    said = tokens(engine(model).measure(edits[:2], TARGET))
    ours = engine(model)
    # Every token is known to be followed by something, and never by what comes.
    teach(ours, [[tuple(n for t in r for n in (t, 299, 298, 297)) for r in one] for one in said])
    assert tokens(ours.measure(edits[:2], TARGET)) == said
    assert rounds == [2 * 9]


@pytest.mark.parametrize("wrong", [True, False])
def test_drafts_are_left_out_where_they_did_not_pay_in_the_first_batch(rounds, wrong):
    model, edits = setup("qwen3")
    said = tokens(engine(model).measure(edits[:2], TARGET))
    ours = engine(model)
    teach(ours, [[(*t[:1], *[299] * (LIMIT - 1)) if wrong else t for t in one] for one in said])
    with ours.keeping_drafts():
        assert tokens(ours.measure(edits[:2], TARGET)) == said
    assert rounds[0] == 2 * 9
    rounds.clear()
    assert tokens(ours.measure(edits[:2], TARGET)) == said  # which are all known by now
    assert rounds[:1] == ([] if wrong else [2 * 9])


def test_a_draft_that_breaks_late_is_followed_by_another(rounds):
    model, edits = setup("qwen3")
    said = tokens(engine(model).measure(edits[:1], TARGET))
    ours = engine(model)
    teach(ours, [[(*r[:6], (r[6] + 1) % 300, *r[7:]) for r in said[0]]])
    assert tokens(ours.measure(edits[:1], TARGET)) == said
    assert rounds[0] == 9
    assert len(rounds) > 1


def test_the_prompts_past_is_let_go_of_before_decoding(monkeypatch):
    """What is decoded after drafts takes the memory that it takes without them."""
    model, edits = setup("llama")
    edits = edits[:4]
    held = []
    plain = answering.greedy

    def look(*args):
        gc.collect()
        layers = [one for one in gc.get_objects() if isinstance(one, RoomyLayer)]
        held.append(sum(one.keys.nbytes for one in layers if one.is_initialized))
        plain(*args)

    monkeypatch.setattr(answering, "greedy", look)
    ours = without_beginnings(model, Plan(rows=1000, stack=4, decode=400))
    expected = ours.measure(edits, TARGET)
    teach(ours, [[(r[0], 299, 299, 299, 299, 299) for r in one] for one in tokens(expected)])
    assert ours.measure(edits, TARGET) == expected
    assert len(held) == 2
    assert held[1] < 1.3 * held[0]
