"""The fast path against the slow reference: merged weights and Transformers' own `generate`."""

from __future__ import annotations

import copy
from pathlib import Path

import builders
import families
import pytest
import torch

from excise.checkpoints.loading import load
from excise.config import EditSection, load_config
from excise.engine.engine import Engine, Plan
from excise.engine.requests import Divergence, Responses
from excise.engine.stacking import ORIGINAL
from excise.errors import MemoryExhausted
from excise.methods.directional import DirectionalMethod
from excise.methods.profiles import from_params

NEW_TOKENS = 12
REQUESTS = [Responses("target"), Divergence()]


def merged(model, writers, edits):
    """A copy of the model with the edits in its weights."""
    out = copy.deepcopy(model)
    for writer, edit in zip(writers, edits, strict=True):
        if edit is None:
            continue
        linear = out.get_submodule(writer.name)
        linear.weight.copy_(edit.apply_to_weight(linear.weight))
        if linear.bias is not None:
            linear.bias.copy_(edit.apply_to_bias(linear.bias))
    return out


def generated(model, ids, limit, pad=0):
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=limit,
        do_sample=False,
        pad_token_id=pad,
    )
    return tuple(out[0, len(ids) :].tolist())


def generated_together(model, rows, limit, pad=0):
    """`generate` on a left-padded batch: responses without what follows their end."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=limit, do_sample=False, pad_token_id=pad
    )
    return [tuple(t for t in row if t != pad) for row in out[:, width:].tolist()]


def token_divergence(original, edited, ids, response):
    """KL(original || edited) at each response token, in float64, one prompt at a time."""
    full = torch.tensor([[*ids, *response]])
    rows = slice(len(ids) - 1, -1)
    log_p = original(full).logits[0, rows].double().log_softmax(-1)
    log_q = edited(full).logits[0, rows].double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def small_engine(model, plan, **kwargs):
    prompts = {"target": builders.token_ids(13, 1), "contrast": builders.token_ids(11, 2)}
    writers = model.anatomy.select(builders.COMPONENTS)
    return Engine(model, writers, prompts, max_new_tokens=NEW_TOKENS, plan=plan, **kwargs)


@pytest.mark.parametrize("family", builders.FAMILIES)
@pytest.mark.parametrize("decode", [20, 32, 400])
@pytest.mark.parametrize("reuse", [True, False])
def test_stacked_equals_each_candidate_merged_and_generated(family, reuse, decode):
    model = builders.loaded(family)
    method = builders.method(model)
    edits = [method.edits(c) for c in builders.candidates(6)]
    engine = small_engine(model, Plan(rows=20, stack=4, decode=decode, reuse=reuse))
    evidence = engine.measure(edits, REQUESTS)
    original = engine.original("contrast").responses
    for one, found in zip(edits, evidence, strict=True):
        alone = merged(model.model, engine.writers, one)
        for ids, response in zip(engine.prompts["target"], found.responses["target"], strict=True):
            assert response.tokens == generated(alone, ids, NEW_TOKENS)
        total = expected = 0.0
        for ids, response, row in zip(
            engine.prompts["contrast"], original, found.divergence["contrast"], strict=True
        ):
            total += float(row.sum())
            expected += float(token_divergence(model.model, alone, ids, response.tokens).sum())
        assert total == pytest.approx(expected, rel=1e-5)


def test_responses_of_unlike_length_are_read_at_their_own_tokens():
    """Some end early: each token's divergence is that of its prompt and response alone."""
    model = builders.loaded("qwen3")
    prompts = {"contrast": builders.token_ids(10, 2)}
    said = [generated(model.model, ids, 6) for ids in prompts["contrast"]]
    model.model.generation_config.eos_token_id = [1, said[0][2], said[1][4]]
    method = builders.method(model)
    edits = method.edits(builders.candidates(1)[0])
    engine = Engine(model, method.writers, prompts, max_new_tokens=6, plan=Plan(rows=64, stack=4))
    (found,) = engine.measure([edits], [Divergence()])
    responses = engine.original("contrast").responses
    assert len({len(response.tokens) for response in responses}) > 1
    alone = merged(model.model, method.writers, edits)
    for ids, one, row in zip(
        prompts["contrast"], responses, found.divergence["contrast"], strict=True
    ):
        assert len(row) == len(one.tokens)
        expected = token_divergence(model.model, alone, ids, one.tokens)
        assert torch.allclose(row, expected, rtol=1e-3, atol=1e-7)


@pytest.fixture(scope="module")
def demo():
    """The demo model, its method and its search prompts."""
    from excise import events
    from excise.prompts.sets import load_prompt_sets
    from excise.runs import setup
    from excise.search.scoring import scoring_of

    flags = {"model.source": "demo", "method": "directional"}
    config = load_config(behaviour="demo", flags=flags)
    loaded = load(config.model)
    sets = load_prompt_sets(config.prompts)
    bare = setup.open_session(config, loaded, sets, scoring_of(config), events.ignore)
    directions, _ = setup.find_directions(bare)
    session = setup.prepare(bare, directions, Path(), setup.observe(bare))
    return session.engine("search", Plan(rows=256, stack=8)), session.method, loaded


def demo_candidates(count, layers):
    """Points of the real search space, drawn as the search draws its first ones."""
    import optuna

    from excise.methods.search_space import distributions

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.RandomSampler(seed=11)
    study = optuna.create_study(sampler=sampler)
    space = distributions(builders.COMPONENTS, layers)
    return [from_params(study.ask(space).params) for _ in range(count)]


def test_forty_stacked_candidates_of_the_demo_model_equal_each_alone(demo):
    engine, method, loaded = demo
    few = {"target": 12, "contrast": 6}
    edits = [method.edits(c) for c in demo_candidates(40, len(loaded.anatomy.layers))]
    evidence = engine.measure(edits, REQUESTS, few)
    original = engine.original("contrast").responses
    for one, found in zip(edits, evidence, strict=True):
        alone = merged(loaded.model, method.writers, one)
        rows = engine.prompts["target"][: few["target"]]
        expected = generated_together(alone, rows, engine.limit)
        assert [r.tokens for r in found.responses["target"]] == expected
        pairs = list(
            zip(engine.prompts["contrast"], original, found.divergence["contrast"], strict=False)
        )
        total = sum(float(row.sum()) for _, _, row in pairs)
        expected = sum(
            float(token_divergence(loaded.model, alone, ids, r.tokens).sum()) for ids, r, _ in pairs
        )
        # Below 1e-9 nats per token lies what float32 logits cannot tell.
        floor = 1e-9 * sum(len(r.tokens) for _, r, _ in pairs)
        assert total == pytest.approx(expected, rel=1e-5, abs=floor)


def test_a_candidates_figures_do_not_depend_on_its_neighbours():
    model = builders.loaded("gemma4")
    method = builders.method(model)
    edits = [method.edits(c) for c in builders.candidates(5)]
    together = small_engine(model, Plan(rows=64, stack=5)).measure(edits, REQUESTS)
    alone = small_engine(model, Plan(rows=64, stack=1)).measure(edits[3:4], REQUESTS)[0]
    assert [r.tokens for r in together[3].responses["target"]] == [
        r.tokens for r in alone.responses["target"]
    ]
    for a, b in zip(together[3].divergence["contrast"], alone.divergence["contrast"], strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-7)


def test_no_edit_means_no_divergence_and_the_original_responses():
    model = builders.loaded("qwen3")
    engine = small_engine(model, Plan(rows=8, stack=2))
    found = engine.measure([ORIGINAL], [Responses("contrast"), Divergence()])[0]
    assert [r.tokens for r in found.responses["contrast"]] == [
        r.tokens for r in engine.original("contrast").responses
    ]
    assert all(float(row.abs().max()) < 1e-9 for row in found.divergence["contrast"])


def test_a_decided_response_stops_early_and_is_a_prefix_of_the_whole():
    model = builders.loaded("llama")
    method = builders.method(model)
    edits = [method.edits(c) for c in builders.candidates(3)]
    engine = small_engine(model, Plan(rows=64, stack=3))
    whole = engine.measure(edits, [Responses("target")])
    cut = engine.measure(edits, [Responses("target", decided=lambda text: len(text) > 4)])
    shorter = 0
    for a, b in zip(whole, cut, strict=True):
        for full, part in zip(a.responses["target"], b.responses["target"], strict=True):
            assert full.tokens[: len(part.tokens)] == part.tokens
            shorter += len(part.tokens) < len(full.tokens)
    assert shorter > 0


@pytest.mark.parametrize("depth", [0, 3, 15])
@pytest.mark.parametrize("kind", ["cuda", "cpu", "python"])
def test_out_of_memory_halves_the_pass_and_goes_on(depth, kind):
    errors = {
        "cuda": torch.OutOfMemoryError("CUDA out of memory."),
        "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
        "python": MemoryError(),
    }
    model = builders.loaded("gemma4")
    method = builders.method(model)
    edits = [method.edits(c) for c in builders.candidates(4)]
    expected = small_engine(model, Plan(rows=64, stack=4)).measure(edits, REQUESTS)
    engine = small_engine(model, Plan(rows=64, stack=4))
    calls = 0

    def strike(_module, _args, output):
        nonlocal calls
        calls += 1
        if calls == depth + 1:
            raise errors[kind]
        return output

    handle = model.anatomy.layers[2].mlp.down_proj.register_forward_hook(strike)
    found = engine.measure(edits, REQUESTS)
    handle.remove()
    longest = max(map(len, engine.prompts["target"] + engine.prompts["contrast"])) + engine.limit
    assert 0 < engine.fitted_plan.tokens < 64 * longest
    for a, b in zip(expected, found, strict=True):
        assert [r.tokens for r in a.responses["target"]] == [
            r.tokens for r in b.responses["target"]
        ]


def long_and_short(count):
    """Prompts of which one is much longer than the others."""
    long = builders.token_ids(1, 3, 90, 90)
    return [*builders.token_ids(count - 1, 1, 3, 9), *long]


@pytest.mark.parametrize("family", ["gemma4", "falcon"])
def test_long_texts_have_fewer_rows_and_short_ones_as_many_as_before(family, pass_shapes):
    """In a family whose layers ignore padding, and in one that is not known to."""
    model = families.loaded(families.model("falcon")) if family == "falcon" else None
    model = model or builders.loaded(family)
    prompts = {side: long_and_short(12) for side in ("target", "contrast")}
    method = families.method(model.anatomy) if family == "falcon" else builders.method(model)
    drawn = families.candidates(model.anatomy, 4) if family == "falcon" else builders.candidates(4)
    edits = [method.edits(one) for one in drawn]
    found = []
    for plan in (Plan(rows=64, stack=4, decode=64), Plan(64, 4, 64, tokens=200)):
        engine = Engine(model, method.writers, prompts, max_new_tokens=3, plan=plan)
        engine.original("contrast")
        pass_shapes.clear()
        found.append(engine.measure(edits, REQUESTS))
        widest = max(rows * tokens for rows, tokens in pass_shapes)
        assert (widest <= 200) == (plan.tokens is not None)
    # Twelve rows of the nine tokens and less that the others have.
    assert max(rows for rows, tokens in pass_shapes if tokens > 1) >= 12
    for whole, few in zip(*found, strict=True):
        for a, b in zip(whole.responses["target"], few.responses["target"], strict=True):
            assert a.tokens == b.tokens
        for a, b in zip(whole.divergence["contrast"], few.divergence["contrast"], strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_a_long_text_that_does_not_fit_leaves_passes_of_short_ones_as_they_are(pass_shapes):
    model = builders.loaded("llama")
    prompts = {"target": long_and_short(12)}
    engine = Engine(model, (), prompts, max_new_tokens=3, plan=Plan(rows=64, stack=4))

    def strike(_module, args, output):
        if args[0].shape[0] > 1 and args[0].shape[1] > 60:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return output

    handle = model.anatomy.layers[2].mlp.down_proj.register_forward_hook(strike)
    engine.measure([ORIGINAL], [Responses("target")])
    handle.remove()
    assert (1, 90) in pass_shapes
    assert max(rows for rows, tokens in pass_shapes if 1 < tokens < 60) > 4


def test_memory_that_never_suffices_is_said_and_other_errors_are_not_swallowed():
    model = builders.loaded("qwen3")
    engine = small_engine(model, Plan(rows=16, stack=2))

    def always(error):
        def strike(_module, _args, output):
            raise error

        return model.anatomy.layers[1].mlp.down_proj.register_forward_hook(strike)

    handle = always(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(MemoryExhausted, match="one prompt at a time"):
        engine.measure([ORIGINAL], [Responses("target")])
    handle.remove()
    handle = always(RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        engine.measure([ORIGINAL], [Responses("target")])
    handle.remove()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")])
@pytest.mark.parametrize("depth", [0, 5, 12])
def test_the_model_is_restored_exactly_whatever_ends_a_pass(error, depth):
    model = builders.loaded("gemma4")
    method = builders.method(model)
    edits = [method.edits(c) for c in builders.candidates(4)]
    engine = small_engine(model, Plan(rows=64, stack=4))
    ids = torch.tensor([engine.prompts["target"][0]])
    before = model.model(ids).logits
    weights = {n: (p.data_ptr(), p._version) for n, p in model.model.named_parameters()}
    calls = 0

    def strike(_module, _args, output):
        nonlocal calls
        calls += 1
        if calls > depth:
            raise error
        return output

    handle = model.anatomy.layers[4].mlp.down_proj.register_forward_hook(strike)
    with pytest.raises(type(error)):
        engine.measure(edits, REQUESTS)
    handle.remove()
    assert all(not m._forward_hooks and "forward" not in m.__dict__ for m in model.model.modules())
    assert weights == {n: (p.data_ptr(), p._version) for n, p in model.model.named_parameters()}
    assert torch.equal(model.model(ids).logits, before)


@pytest.mark.parametrize("post_norms", [True, False])
@pytest.mark.parametrize("family", builders.FAMILIES)
def test_whole_ablation_leaves_nothing_in_what_a_writer_adds(family, post_norms):
    """lambda = 1 with `none`, measured where the residual is added, post-norms and biases included."""
    model = builders.loaded(family)
    section = EditSection(row_norms="none", post_norms=post_norms)
    writers = model.anatomy.select(builders.COMPONENTS)
    directions = builders.directions()
    method = DirectionalMethod(writers, directions, section)
    from excise.methods.profiles import Candidate, Profile

    flat = {c: Profile(1.0, 3.0, 1.0, 100.0) for c in builders.COMPONENTS}
    alone = merged(model.model, writers, method.edits(Candidate(2.5, flat)))
    added = {}
    sites = {
        "attn.o_proj": "post_attention_layernorm",
        "mlp.down_proj": "post_feedforward_layernorm",
    }
    for writer in writers:
        layer = alone.get_submodule(f"model.layers.{writer.layer}")
        normed = family == "gemma4"
        site = (
            layer.get_submodule(sites[writer.component])
            if normed
            else alone.get_submodule(writer.name)
        )
        site.register_forward_hook(
            lambda _m, _a, out, key=writer.key: added.__setitem__(key, out.detach())
        )
    alone(torch.tensor([builders.token_ids(1, 9, 12, 12)[0]]))
    v = directions.at(0, 2.5)
    shares = [float((out @ v).abs().max() / out.norm(dim=-1).max()) for out in added.values()]
    assert len(shares) == len(writers)
    if family == "gemma4" and not post_norms:
        assert max(shares) > 1e-3  # ablating v itself does not remove it: why post-norms count
    else:
        assert max(shares) < 1e-5


def test_it_tells_how_far_a_long_measurement_is(monkeypatch):
    """Of whole rows and of decode steps, up to all of them."""
    monkeypatch.setattr("excise.engine.engine.EVENT_EVERY", 0.0)
    told = []
    engine = small_engine(builders.loaded("qwen3"), Plan(rows=4, decode=6), on_event=told.append)
    engine.original("target")
    steps = [one for one in told if one.phase == "responses"]
    assert {one.total for one in steps} == {13 * NEW_TOKENS}
    assert [one.done for one in steps] == sorted(one.done for one in steps)
    assert 0 < steps[0].done < steps[-1].done == 13 * NEW_TOKENS
    rows = [(one.done, one.total) for one in told if one.phase == "passes"]
    assert rows == [(4, 13), (8, 13), (12, 13), (13, 13)]


def test_progress_comes_at_most_once_a_second_and_at_the_end():
    told = []
    engine = small_engine(builders.loaded("qwen3"), Plan(rows=4, decode=6), on_event=told.append)
    engine.original("target")
    assert len(told) < 13
    assert [one.phase for one in told if one.done == one.total] == ["responses", "passes"]
