"""A direction planted at one layer of a model: where it is found, what an edit there removes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import builders
import pytest
import torch

from excise import events
from excise.capture.directions import normalise
from excise.checkpoints.loading import load
from excise.config import EditSection, load_config, validate
from excise.judges.markers import Markers
from excise.judges.text_folding import fold
from excise.methods.directional import DirectionalMethod
from excise.methods.profiles import Candidate, Profile
from excise.prompts.measured_sets import Opening
from excise.prompts.sets import load_prompt_sets
from excise.record import Separation
from excise.runs import setup
from excise.runs.run_folder import read_directions, read_opening, save_directions
from excise.search.scoring import Scoring, scoring_of

PLANTED, MARK, OTHER = 3, 7, 8  # the layer, and the last tokens of target and contrast prompts


@pytest.fixture(scope="module")
def planted():
    """A model in which one MLP writes a direction when it reads the mark, and the two tokens are alike."""
    model = builders.loaded("llama")
    inner = model.model
    table = inner.get_input_embeddings().weight
    draw = torch.Generator().manual_seed(1)
    v = normalise(torch.randn(builders.WIDTH, generator=draw))
    table[MARK] = table[OTHER] + 0.01 * torch.randn(builders.WIDTH, generator=draw)
    marks: list[torch.Tensor] = []
    inner.model.embed_tokens.register_forward_hook(
        lambda _m, args, _out: marks.append(args[0] == MARK)
    )
    inner.model.layers[PLANTED].mlp.down_proj.register_forward_hook(
        lambda _m, _a, out: out + 50 * marks[-1][..., None] * v
    )
    rows = builders.token_ids(12, 5)
    tokens = {
        "target": [[*row, MARK] for row in rows[:6]],
        "contrast": [[*row, OTHER] for row in rows[:6]],
    }
    return model, v, tokens


@pytest.mark.parametrize("center", ["mean", "geometric_median"])
def test_it_is_found_after_the_layer_that_writes_it(planted, center):
    model, v, tokens = planted
    session = builders.session(model, tokens, directions={"center": center})
    directions, separation = setup.find_directions(session)
    assert directions.unit.shape == (builders.LAYERS, builders.WIDTH)
    assert float(directions.unit[PLANTED] @ v) > 0.99  # from contrast to target, not the other way
    assert abs(float(directions.unit[PLANTED - 1] @ v)) < 0.6
    assert separation.auc[PLANTED] == 1.0
    target, contrast = setup.residuals(session)
    along = (target - contrast).mean(0) @ v
    assert float(along[PLANTED]) == pytest.approx(50, rel=0.1)
    assert abs(float(along[PLANTED - 1])) < 1


def test_an_edit_by_its_index_or_at_its_own_layer_removes_it_there(planted):
    model, v, tokens = planted
    directions, _ = setup.find_directions(builders.session(model, tokens))
    writers = model.anatomy.select(builders.COMPONENTS)
    method = DirectionalMethod(writers, directions, EditSection(row_norms="none"))
    profiles = {name: Profile(1.0, PLANTED, 1.0, 10.0) for name in builders.COMPONENTS}
    for index in (float(PLANTED), None):
        for writer, edit in zip(writers, method.edits(Candidate(index, profiles)), strict=True):
            left = float((edit.apply_to_weight(writer.weight).T @ v).norm())
            before = float((writer.weight.T @ v).norm())
            if index is not None or writer.layer == PLANTED:
                assert left < 0.1 * before
            elif writer.layer == PLANTED - 1:
                assert left > 0.5 * before


def test_residuals_come_in_the_order_of_the_prompts_whatever_their_lengths(planted):
    model, _, tokens = planted
    rows = tokens["target"]
    assert sorted(map(len, rows), reverse=True) != list(map(len, rows))
    found, _ = setup.residuals(builders.session(model, tokens))
    for ids, x in zip(rows, found, strict=True):
        some = tokens | {"target": [ids]}
        (alone,) = setup.residuals(builders.session(model, some))[0]
        assert torch.allclose(x, alone, rtol=1e-3, atol=1e-3)


def test_a_geometric_median_is_taken_where_it_is_asked_for(planted):
    model, _, tokens = planted
    session = builders.session(model, tokens, directions={"center": "geometric_median"})
    found, _ = setup.find_directions(session)
    centres = []
    for x in map(torch.Tensor.double, setup.residuals(session)):
        centre = x.mean(0)
        for _ in range(300):
            w = 1 / (x - centre).norm(dim=-1, keepdim=True).clamp_min(1e-9)
            centre = (w * x).sum(0) / w.sum(0)
        centres.append((centre, x.mean(0)))
    (target, target_mean), (contrast, contrast_mean) = centres
    median, mean = normalise(target - contrast), normalise(target_mean - contrast_mean)
    near, far = (float((found.unit[0] - v[0]).norm()) for v in (median, mean))
    assert near < 0.1 * far


def test_strengthening_adds_what_removal_takes(planted):
    model, _, tokens = planted
    directions, _ = setup.find_directions(builders.session(model, tokens))
    writers = [w for w in model.anatomy.select(builders.COMPONENTS) if w.layer == PLANTED]
    section = EditSection(row_norms="none")
    method = DirectionalMethod(writers, directions, section, strengthen=True)
    profiles = {name: Profile(1.0, PLANTED, 1.0, 10.0) for name in builders.COMPONENTS}
    for writer, edit in zip(writers, method.edits(Candidate(None, profiles)), strict=True):
        u = directions.unit[PLANTED]
        assert torch.allclose(
            edit.apply_to_weight(writer.weight).T @ u, 2 * writer.weight.T @ u, atol=1e-4
        )


def test_a_run_that_strengthens_seeks_all_of_the_behaviour():
    remove, strengthen = (
        scoring_of(validate({"goal": goal, "scores": {"markers": ["no"]}}))
        for goal in ("remove", "strengthen")
    )
    assert [(goal.name, goal.sign) for goal in remove.goals()] == [
        ("behaviour_rate", 1),
        ("drift", 1),
    ]
    assert [goal.sign for goal in strengthen.goals()] == [-1, 1]


def test_what_is_kept_lies_on_the_contrast_side_and_shows_nothing_of_the_behaviour(planted):
    """What tokenizer and positions cannot take is left out too, and nothing of it is an error."""
    model, tokens = builders.loaded("qwen3"), planted[2]
    rows = builders.token_ids(14, 9)
    near, plain = ([[*row, mark] for row in rows[:5]] for mark in (MARK, OTHER))
    sets = {**tokens, "keep": [*near, *plain]}
    said: list[Any] = []
    session = builders.session(model, sets, method="ridge", scores={"max_new_tokens": 4})
    session = replace(session, on_event=said.append)
    directions, _ = setup.find_directions(session)
    kept = setup.choose_keep(session, directions)
    assert kept.ids == plain
    assert kept.left_out == {"unknown": 0, "too_long": 0, "near_target": 5, "shows_behaviour": 0}
    for ids, answer in zip(kept.ids, kept.responses, strict=True):
        whole = model.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=4)
        assert list(answer) == whole[0, len(ids) :].tolist()
    assert any("5 of 10 prompts are used" in str(event) for event in said)
    # One whose response shows the behaviour in its first tokens.
    shown = model.tokenizer.decode(kept.responses[2])
    marked = replace(session, scoring=Scoring(Markers((fold(shown).strip(),))))
    fewer = setup.choose_keep(marked, directions)
    assert fewer.left_out["shows_behaviour"] >= 1
    assert plain[2] not in fewer.ids
    # One that leaves no room for a response, where positions are learned.
    model.model.config.rope_parameters, known = None, model.model.config.rope_parameters
    model.model.config.max_position_embeddings = len(plain[0]) + 3
    try:
        found = setup.choose_keep(session, directions)
    finally:
        model.model.config.rope_parameters = known
    assert found.left_out["too_long"] >= 1
    assert plain[0] not in found.ids


def test_the_demos_tokenizer_does_not_know_the_keep_set_and_nothing_changes():
    sizes = {"direction_size": 12, "eval_size": 4, "holdout_size": 1}
    flags = {"model.source": "demo", "method": "ridge", "scores.max_new_tokens": 4}
    flags |= {f"prompts.{name}": size for name, size in sizes.items()}
    found = []
    for keep in ({}, {"prompts.keep": []}):
        config = load_config(behaviour="demo", flags={**flags, **keep})
        loaded, sets = load(config.model), load_prompt_sets(config.prompts)
        session = setup.open_session(config, loaded, sets, scoring_of(config), events.ignore)
        seen = setup.observe(session)
        directions, _ = setup.find_directions(session, seen)
        kept = setup.choose_keep(session, directions)
        assert not kept.ids
        assert kept.left_out.get("unknown", 0) == len(sets.keep)
        seen = setup.with_keep(seen, kept)
        found.append(setup.captured_of(session, directions, seen))
    assert len(sets.keep) == 0
    first, second = found
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_methods_without_use_for_a_keep_set_are_given_none():
    config = load_config(behaviour="demo", flags={"model.source": "demo", "method": "directional"})
    sets = load_prompt_sets(config.prompts)
    assert len(sets.keep) == 256
    loaded = load(config.model)
    session = setup.open_session(config, loaded, sets, scoring_of(config), events.ignore)
    assert "keep" not in session.sets


def test_methods_are_given_what_the_run_is_about(planted):
    """The model's own responses to contrast prompts, and residuals that are winsorised as asked."""
    model, tokens = builders.loaded("qwen3"), planted[2]
    sections = {"directions": {"winsor": 0.8}, "scores": {"max_new_tokens": 3}}
    session = builders.session(model, tokens, **sections)
    for ids, said in zip(tokens["contrast"], session.responses(), strict=True):
        whole = model.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=3)
        assert list(said) == whole[0, len(ids) :].tolist()
    (_, x), *_ = setup.observe(session).residuals["target"]()
    plain, _ = setup.residuals(builders.session(model, tokens))
    limits = x[:, 1:].abs().amax(-1)
    assert bool((limits < plain.abs().amax(-1).max()).all())
    share = (x[:, 1:].abs() >= limits[..., None]).double().mean(-1)
    assert bool((share > 0.15).all())  # what lies beyond the quantile lies on it now


@pytest.mark.parametrize("projected", [True, False])
def test_stored_directions_come_back_as_they_were(tmp_path, projected):
    found = builders.directions(projected=projected)
    opening = Opening((5, 6, 7), (7,), {"target": 0.9}, "a note")
    place = tmp_path / "directions.safetensors"
    save_directions(place, found, Separation(auc=[0.5] * builders.LAYERS), opening)
    again, separation = read_directions(place)
    assert (again.projected, separation.auc) == (projected, [0.5] * builders.LAYERS)
    assert torch.equal(again.unit, found.unit)
    assert torch.equal(again.contrast, found.contrast)
    assert read_opening(place) == opening
