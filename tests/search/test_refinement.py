"""Refinement goes downhill, re-enters the study as ordinary trials, and survives a kill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import builders
import optuna
import pytest
import torch
from bound_methods import method_of, params_of
from conftest import job

from excise.cli import main as cli
from excise.config import SearchSection, load_config, validate
from excise.engine import batch_sizing
from excise.engine.engine import Plan
from excise.errors import MeasurementError
from excise.methods.profiles import from_params, layer_key
from excise.methods.search_space import distributions
from excise.model.forward import Forward
from excise.record import ScoreRecord
from excise.report.stored_record import read_record
from excise.search import refinement
from excise.search.journal import open_study
from excise.search.loop import Measured, Search
from excise.search.pareto import Objective

CPU = torch.device("cpu")


def refiner_of(family: str = "qwen3", *, strengthen: bool = False):
    loaded = builders.loaded(family)
    method = builders.method(loaded)
    method.sign = -1.0 if strengthen else 1.0
    prompts = {s: builders.token_ids(6, seed=n, shortest=4) for n, s in enumerate("tc")}
    answers = {
        s: builders.token_ids(6, seed=9 + n, shortest=3, longest=6) for n, s in enumerate("tc")
    }
    both = [refinement.texts(loaded, prompts[s], answers[s]) for s in "tc"]
    return loaded, method, refinement.Refiner(loaded, method, *both), prompts, answers


def plain_loss(loaded, method, prompts, answers, candidate, weight):
    """One prompt at a time, on merged weights."""
    edits = method.edits(candidate)

    def logits(ids, answer):
        out = loaded.model(torch.tensor([[*ids, *answer[:-1]]])).logits[0, -len(answer) :]
        return out.double().log_softmax(-1)

    before = [logits(p, a) for p, a in zip(prompts["c"], answers["c"], strict=True)]
    saved = [w.module.weight.clone() for w in method.writers]
    for writer, edit in zip(method.writers, edits, strict=True):
        if edit is not None:
            writer.module.weight.copy_(edit.apply_to_weight(writer.module.weight))
    after = [logits(p, a) for p, a in zip(prompts["c"], answers["c"], strict=True)]
    shown = [logits(p, a) for p, a in zip(prompts["t"], answers["t"], strict=True)]
    for writer, weight_before in zip(method.writers, saved, strict=True):
        writer.module.weight.copy_(weight_before)
    kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(before, after, strict=True)])
    sums = torch.stack(
        [row[range(len(a)), a].sum() for row, a in zip(shown, answers["t"], strict=True)]
    )
    floor = torch.tensor(-8.0, dtype=torch.float64)
    return float(kl.mean() + method.sign * weight * torch.logaddexp(sums, floor).mean())


@pytest.mark.parametrize("strengthen", [False, True])
def test_the_loss_is_drift_plus_weighed_likelihood_of_merged_weights(strengthen):
    loaded, method, refiner, prompts, answers = refiner_of(strengthen=strengthen)
    for candidate in builders.candidates(3):
        strengths = torch.tensor(
            [candidate.strength(w.component, w.layer) for w in method.writers], dtype=torch.float64
        )
        found = float(refiner.loss(candidate.index, strengths, 0.01))
        expected = plain_loss(loaded, method, prompts, answers, candidate, 0.01)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_loss_and_gradient_do_not_depend_on_how_much_is_held_at_once(monkeypatch):
    """With a large vocabulary the logits of all tokens, and their graph, would not fit a card."""
    shapes, original = [], Forward.logits

    def logits(self, hidden):
        shapes.append(len(hidden))
        return original(self, hidden)

    monkeypatch.setattr(Forward, "logits", logits)
    found = []
    for rows, tokens in ((8, 1000), (2, 5)):
        shapes.clear()
        monkeypatch.setattr(refinement, "_ROWS", rows)
        room = property(lambda self, n=tokens: 8 * n * self.vocabulary)
        monkeypatch.setattr(Forward, "chunk_bytes", room)
        _, method, refiner, _, _ = refiner_of()
        candidate = builders.candidates(2)[1]
        start = [0.3 + 0.05 * n for n in range(len(method.writers))]
        strengths = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        loss = refiner.loss(candidate.index, strengths, 0.1)
        (gradient,) = torch.autograd.grad(loss, strengths)
        found.append((loss.detach(), gradient))
        assert max(shapes) <= tokens
    assert max(shapes) == 5
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)


def test_the_gradient_is_that_of_differences():
    _, method, refiner, _, _ = refiner_of()
    candidate = builders.candidates(2)[1]
    start = [0.3 + 0.05 * n for n in range(len(method.writers))]
    strengths = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(refiner.loss(candidate.index, strengths, 0.1), strengths)
    for n in (0, 5, 11):
        step = torch.zeros_like(strengths)
        step[n] = 0.02
        with torch.no_grad():
            up, down = (refiner.loss(candidate.index, strengths + s, 0.1) for s in (step, -step))
        assert float(gradient[n]) == pytest.approx(float(up - down) / 0.04, rel=0.05, abs=2e-4)


def test_refining_goes_downhill_and_is_deterministic():
    loaded, method, refiner, _, _ = refiner_of()
    candidate = builders.candidates(2)[1]
    found = refiner.refine(candidate, 0.01)
    assert found == refiner.refine(candidate, 0.01)
    refined = replace(
        candidate,
        refined={
            c: tuple(found[layer_key(c, n)] for n in range(builders.LAYERS))
            for c in builders.COMPONENTS
        },
    )

    def loss(of):
        strengths = [of.strength(w.component, w.layer) for w in method.writers]
        return float(refiner.loss(of.index, torch.tensor(strengths, dtype=torch.float64), 0.01))

    assert loss(refined) < loss(candidate)
    assert all(0.0 <= s <= 2.0 for s in found.values())
    assert not any(w.module._forward_hooks for w in method.writers)
    del loaded


def test_refined_parameters_are_a_candidate():
    space = distributions(builders.COMPONENTS, 3)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    params = optuna.create_study().ask(space).params
    more = {layer_key(c, n): 0.1 * n for c in builders.COMPONENTS for n in range(3)}
    candidate = from_params({**params, **more})
    assert candidate.index == from_params(params).index
    assert [candidate.strength("attn.o_proj", n) for n in range(3)] == [0.0, 0.1, 0.2]
    assert from_params(params).refined is None


# -- in the study ----------------------------------------------------------------------------------

SPACE = distributions(builders.COMPONENTS, 3)
GOALS = [Objective("behaviour_rate", 1, 1.0), Objective("drift", 1, 0.5)]


def measure(params, _finished):
    def score(value):
        return ScoreRecord(value=value, n=1)

    out = []
    for one in params:
        rate = from_params(one).strength("attn.o_proj", 2)
        out.append(Measured({"behaviour_rate": score(rate), "drift": score(1 - rate / 2)}))
    return out


def search_of(study, trials=12):
    section = SearchSection(trials=trials, startup_trials=6)
    return Search(study, SPACE, GOALS, section, batch=4, seed=0)


def propose(points):
    more = {layer_key(c, n): 0.5 for c in builders.COMPONENTS for n in range(3)}
    base = {**optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1)).ask(SPACE).params}
    return [{**base, **more, layer_key("attn.o_proj", 2): 0.01 * n} for n in range(6)]


def whole(study, trials=12):
    search = search_of(study, trials)
    search.run(trials, measure, lambda _: None)
    search.refine(propose, measure, lambda _: None)
    return search


def test_refined_trials_are_ordinary_ones_and_the_search_goes_on():
    search = whole(optuna.create_study(directions=["minimize"] * 2))
    records = search.records()
    assert len(records) == 18
    assert [r.number for r in records] == list(range(18))
    assert all(r.state == "complete" for r in records)
    assert records[12].params[layer_key("attn.o_proj", 2)] == 0.0
    assert len(whole(search.study).records()) == 18  # once per total
    more = whole(search.study, 24).records()
    assert len(more) == 30
    assert more[:18] == records
    assert layer_key("attn.o_proj", 0) not in more[18].params
    assert layer_key("attn.o_proj", 0) in more[24].params


def test_a_refinement_cut_short_is_gone_on_with():
    expected = whole(optuna.create_study(directions=["minimize"] * 2)).records()
    study = optuna.create_study(directions=["minimize"] * 2)
    calls = []

    def dies(params, finished):
        calls.append(len(params))
        if len(calls) == 5:  # three batches of the search, then the second of the refinement
            raise KeyboardInterrupt
        return measure(params, finished)

    search = search_of(study)
    search.run(12, dies, lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        search.refine(propose, dies, lambda _: None)
    assert len(study.trials) == 16

    def never(_points):
        raise AssertionError("what was proposed is stored")

    again = search_of(study)
    again.run(12, measure, lambda _: None)
    again.refine(never, measure, lambda _: None)
    assert [r.params for r in again.records()] == [r.params for r in expected]


def test_a_larger_total_cut_short_is_refined_by_a_plain_resume():
    """A plain resume asks for the total of the configuration; the study knows of the larger one."""
    expected = whole(whole(optuna.create_study(directions=["minimize"] * 2)).study, 24).records()
    study = whole(optuna.create_study(directions=["minimize"] * 2)).study

    def dies(_params, _finished):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_of(study, 24).run(24, dies, lambda _: None)
    assert [r.params for r in whole(study).records()] == [r.params for r in expected]


def test_a_run_with_refinement(tiny: Path, tmp_path: Path, capsys):
    out = tmp_path / "run"
    letters = ", ".join(f'"{letter}"' for letter in "abcdefghijklmnopqrstuvwxyz0123456789")
    markers = ("--set", f"scores.markers=[{letters}]")  # every response of random letters shows it
    assert cli.main(job(tiny, out, "--refine", "3", *markers)) == 0, capsys.readouterr().err
    record = read_record(out)
    assert len(record.trials) == 15
    refined = record.trials[12:]
    assert all(t.params[layer_key("mlp.down_proj", 5)] >= 0 for t in refined)
    assert all(t.state == "complete" for t in refined)
    assert "--refine 3" in (out / "model" / "README.md").read_text()
    assert cli.main(job(tiny, tmp_path / "no", "--refine", "3", "--method", "ridge")) == 2
    error = capsys.readouterr().err
    assert "search.refine moves the strengths of directions" in error
    assert not (tmp_path / "no").exists()


def test_nothing_to_refine_towards_is_said(tiny: Path):
    loaded = builders.loaded("qwen3")
    method = builders.method(loaded)
    tokens = {s: builders.token_ids(4) for s in ("target", "contrast")}
    config = load_config(sets=("scores.max_new_tokens=3",))
    with pytest.raises(MeasurementError, match="none of the original's first 4 responses shows"):
        refinement.refiner_for(loaded, method, tokens, config, lambda _: False)


def test_a_run_with_nothing_to_refine_ends_with_what_it_found(tiny: Path, tmp_path: Path, capsys):
    (tmp_path / "markers.txt").write_text("a phrase that nobody says\n")
    markers = ("--markers", str(tmp_path / "markers.txt"), "--refine", "3", "--json-events")
    arguments = [a for a in job(tiny, tmp_path / "run", *markers) if a != "--quiet"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr()
    assert "nothing whose likelihood could change" in said.out + said.err
    assert len(read_record(tmp_path / "run").trials) == 12


def test_rows_stand_alone_where_padding_is_not_trusted():
    loaded = builders.loaded("qwen3")
    bare = replace(loaded, anatomy=replace(loaded.anatomy, padding=False))
    method = builders.method(loaded)
    rows, answers = builders.token_ids(5, 3), builders.token_ids(5, 4, shortest=3)
    both = [refinement.texts(loaded, rows, answers)] * 2
    candidate = builders.candidates(2)[1]
    strengths = torch.full((len(method.writers),), 0.5, dtype=torch.float64)
    losses = []
    for one in (loaded, bare):
        refiner = refinement.Refiner(one, method, *both)
        losses.append(float(refiner.loss(candidate.index, strengths, 0.1)))
    parts = refiner._target
    assert len(parts) == len(rows)
    assert all(bool(part.batch.mask.all()) for part in parts)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# -- the engine on direction prompts ---------------------------------------------------------------


def test_responses_to_direction_prompts_are_had_within_the_free_memory(monkeypatch):
    loaded = builders.loaded("qwen3")
    prompts = {"contrast": builders.token_ids(40, 5)}
    config = validate({"scores": {"max_new_tokens": 8}})
    roomy = refinement.direction_engine(loaded, prompts, config)
    assert (roomy.fitted_plan.rows, roomy.fitted_plan.decode) == (Plan().rows, Plan().decode)
    few = SimpleNamespace(available=10**6)
    monkeypatch.setattr(batch_sizing.psutil, "virtual_memory", lambda: few)
    tight = refinement.direction_engine(loaded, prompts, config)
    longest = max(map(len, prompts["contrast"])) + 8
    assert tight.fitted_plan.fits("rows", longest) < 40 < roomy.fitted_plan.fits("rows", longest)
    for engine in (roomy, tight):
        engine.original("contrast")
    assert roomy.original("contrast").responses == tight.original("contrast").responses


# -- strengthening ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["directional", "subspace", "ridge"])
def test_strengthening_pushes_the_other_way(name):
    loaded, bench, _, removes = method_of(name)
    _, _, _, adds = method_of(name, goal="strengthen")
    writers = removes.writers
    total = 0.0
    for params in params_of(removes, 6):
        pairs = zip(
            writers,
            removes.edits(removes.candidate(params)),
            adds.edits(adds.candidate(params)),
            strict=True,
        )
        for writer, away, towards in pairs:
            if away is None:
                continue
            w = writer.module.weight
            a, b = (e.apply_to_weight(w) - w for e in (away, towards))
            total += float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-9))
    assert total < 0
    del loaded, bench


def test_a_run_that_strengthens_maximises_the_rate(tiny: Path, tmp_path: Path, capsys):
    out = tmp_path / "run"
    extra = ("--strengthen", "--set", 'search.select="rate>=0.0"')
    assert cli.main(job(tiny, out, *extra)) == 0, capsys.readouterr().err
    record = read_record(out)
    assert record.goals == ["maximize", "minimize"]
    ways = [way.name for way in open_study(out).directions]
    assert ways == ["MAXIMIZE", "MINIMIZE"]  # as the sampler sees them
    assert record.trials[record.selected].scores["drift"].value == min(
        t.scores["drift"].value for t in record.trials if t.number in record.front
    )
    card = (out / "model" / "README.md").read_text()
    assert "edited on purpose to show more of a behaviour of the original model" in card
    assert "edited on purpose to show less" not in card
    assert 'goal="strengthen"' in card
    no = tmp_path / "no"
    assert cli.main(job(tiny, no, "--strengthen", "--method", "ara")) == 2
    assert "cannot strengthen" in capsys.readouterr().err
    assert cli.main(job(tiny, no, "--strengthen", "--set", 'search.select="rate<=0.5"')) == 2
    assert "a limit on rate is rate>=X" in capsys.readouterr().err
    assert not no.exists()
