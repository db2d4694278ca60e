"""Every method: one function of the candidate alone; stacked = merged; runs, resumes and exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import builders
import families
import pytest
import torch
from bound_methods import (
    LIMIT,
    bench_of,
    bound,
    directions_of,
    method_of,
    params_of,
)
from conftest import job
from peft import PeftModel
from transformers import AutoModelForCausalLM

from excise.capture.keep_set import Kept
from excise.cli import arguments as command_line
from excise.cli import main as cli
from excise.config import validate
from excise.engine.engine import Engine, Plan
from excise.engine.requests import Divergence
from excise.methods import directional
from excise.methods.ara import AraCandidate
from excise.methods.ara_math import AraPoint
from excise.methods.registry import KINDS, edited_writers, settle
from excise.report.stored_record import read_record
from excise.runs import setup

METHODS = sorted(KINDS)


def change(writer, edit):
    return edit.apply_to_weight(writer.module.weight) - writer.module.weight


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma4"])
def test_on_activations_equals_merged_and_row_norms_are_kept(name, family):
    """Llama has biases here, Gemma 4 post-norms and layers of several shapes."""
    _, _, _, method = method_of(name, family)
    draw = torch.Generator().manual_seed(0)
    edited = 0
    for params in params_of(method, 3):
        for writer, edit in zip(
            method.writers, method.edits(method.candidate(params)), strict=True
        ):
            if edit is None:
                continue
            edited += 1
            w, b = writer.module.weight, writer.module.bias
            merged = edit.apply_to_weight(w)
            assert torch.allclose(merged.norm(dim=1), w.norm(dim=1), rtol=1e-3)
            x = torch.randn(5, w.shape[1], generator=draw)
            y = x @ w.T + (0 if b is None else b)
            expected = x @ merged.T + (0 if b is None else edit.apply_to_bias(b))
            found = edit.apply_to_output(x, y)
            assert float((found - expected).norm()) < 1e-4 * float(expected.norm())
    assert edited


@pytest.mark.parametrize("name", METHODS)
def test_stacked_candidates_equal_each_alone(name):
    loaded, bench, _, method = method_of(name)
    candidates = [method.edits(method.candidate(p)) for p in params_of(method, 5)]
    prompts = {"contrast": bench.tokens["contrast"]}

    def drift(edits, stack):
        engine = Engine(
            loaded, method.writers, prompts, max_new_tokens=LIMIT, plan=Plan(64, stack, 64)
        )
        found = engine.measure(edits, [Divergence()])
        return [torch.cat(e.divergence["contrast"]) for e in found]

    together = drift(candidates, 5)
    assert max(float(d.max()) for d in together) > 1e-6
    for one, edits in zip(together, candidates, strict=True):
        alone = drift([edits], 1)[0]
        assert torch.allclose(one, alone, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_candidate_gives_the_same_edit_whatever_ran_before(name):
    _, bench, captured, method = method_of(name)
    first, *others = params_of(method, 4)
    before = method.edits(method.candidate(first))
    for params in others:
        method.edits(method.candidate(params))
    _, again = bound(bench, captured)  # as a resume or an export makes it
    for found in (method.edits(method.candidate(first)), again.edits(again.candidate(first))):
        for a, b in zip(before, found, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert torch.equal(a.left, b.left)
                assert torch.equal(a.right, b.right)
                assert a.scale is None or torch.equal(a.scale, b.scale)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_resumes_and_exports(name, tiny: Path, tmp_path: Path, capsys):
    out, cut = tmp_path / "whole", tmp_path / "cut"
    more = ("--method", name, "--set", 'export.formats=["safetensors", "adapter"]')
    assert cli.main(job(tiny, out, *more)) == 0, capsys.readouterr().err
    record = read_record(out)
    assert record.method == name
    assert {a.format for a in record.artifacts} == {"safetensors", "adapter"}
    keeps = name in ("ridge", "ara")
    assert ("keep" in record.engine) == ("keep" in record.prompts) == keeps
    model = next(a for a in record.artifacts if a.format == "safetensors")
    for score in ("behaviour_rate", "drift"):
        expected, measured = model.expected[score].value, model.measured[score].value
        assert measured == pytest.approx(expected, rel=0.3, abs=0.11 if "rate" in score else 2e-3)
    # The adapter is the very edit: merged by PEFT, it is the exported checkpoint.
    details = next(a for a in record.artifacts if a.format == "adapter").details
    assert (details["form"], details["error"] < 1e-5) == ("DoRA", True)
    base, whole = (AutoModelForCausalLM.from_pretrained(p) for p in (tiny / "model", out / "model"))
    merged = PeftModel.from_pretrained(base, out / "adapter").merge_and_unload().state_dict()
    for weight, expected in whole.state_dict().items():
        torch.testing.assert_close(merged[weight], expected, atol=1e-6, rtol=1e-5)
    # Cut short after its first trials, and gone on with: the same trials.
    arguments = job(tiny, cut, *more)
    arguments[arguments.index("--trials") + 1] = "8"
    assert cli.main(arguments) == 0
    assert cli.main(["resume", str(cut), "--trials", "12", "--quiet"]) == 0
    a, b = ([t.params for t in read_record(run).trials] for run in (out, cut))
    assert a == b
    assert read_record(cut).engine.get("keep") == record.engine.get("keep")
    to = tmp_path / "again"
    assert cli.main(["export", str(out), "--to", str(to), "--quiet"]) == 0
    first, second = (folder / "model.safetensors" for folder in (out / "model", to))
    assert first.read_bytes() == second.read_bytes()
    assert name in (to / "README.md").read_text()
    report = (out / "report.html").read_text()
    assert ('id="profile"' in report) == (name in ("directional", "ridge"))
    assert ("moves outputs on target prompts" in report) == (name == "ridge")
    json.loads((out / "record.json").read_text())
    shutil.rmtree(out)


@pytest.mark.parametrize("family", ["llama", "gemma4"])
@pytest.mark.parametrize("row_norms", ["full", "pre", "none"])
def test_a_subspace_of_rank_one_is_directional_ablation_exactly(family, row_norms):
    sections = {"edit": {"row_norms": row_norms}, "directions": {"projected": True}}
    _, _, _, several = method_of("subspace", family, **sections)
    _, _, _, single = method_of("directional", family, **sections)
    for params in params_of(several, 6):
        one = several.edits(several.candidate({**params, "rank": 1}))
        expected = single.edits(single.candidate(params))
        # A second direction at strength nought goes the other way through the code: equal as well.
        nought = several.edits(several.candidate({**params, "rank": 2, "share_2": 1e-30}))
        for writer, a, b, c in zip(several.writers, one, expected, nought, strict=True):
            if b is None:
                assert a is None
                continue
            assert torch.equal(a.left, b.left)
            assert torch.equal(a.right, b.right)
            w = writer.module.weight
            assert torch.allclose(c.apply_to_weight(w), b.apply_to_weight(w), atol=2e-5)
            if writer.module.bias is not None:
                bias = writer.module.bias
                assert torch.allclose(c.apply_to_bias(bias), b.apply_to_bias(bias), atol=2e-5)


@pytest.mark.parametrize(
    ("family", "sections", "expected"),
    [
        ("qwen3", {}, "ridge"),
        ("qwen3", {"goal": "strengthen"}, "directional"),
        ("qwen3", {"edit": {"row_norms": "pre"}}, "directional"),
        ("qwen3_moe", {}, "directional"),
        ("qwen3_moe", {"method": "ridge"}, "ridge"),
    ],
)
def test_the_default_method(family, sections, expected):
    config = validate(sections)
    settled = settle(config, families.loaded(families.model(family)))
    assert (settled.method, settled.model.dtype) == (expected, "float32")
    fields = {"method": expected, "model": config.model.model_copy(update={"dtype": "float32"})}
    assert settled.model_dump() == config.model_copy(update=fields).model_dump()
    assert set(METHODS) == set(command_line.METHODS)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--method", "ridge", "--set", "ridge.neighbours=11"],
            "ridge.neighbours is 11, and only 10 contrast prompts",
        ),
        (["--method", "ara", "--set", "ara.neighbours=11"], "ara.neighbours is 11, and only 10"),
        (["--method", "subspace", "--set", "subspace.rank=9"], "subspace.rank"),
        (
            ["--method", "subspace", "--direction-size", "3"],
            "subspace.rank is 4, and only 3 prompts of each side",
        ),
        (["--method", "ridge", "--set", 'edit.row_norms="pre"'], 'edit.row_norms "pre" is for'),
    ],
)
def test_settings_that_do_not_fit_are_one_line(more, message, tiny: Path, tmp_path: Path, capsys):
    out = tmp_path / "run"
    assert cli.main(job(tiny, out, *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()


def test_a_candidate_without_an_edit_is_a_failed_trial_with_a_reason(
    tiny: Path, tmp_path: Path, monkeypatch
):
    """Every second candidate's system is made singular: the others are measured all the same."""
    from excise.errors import MeasurementError
    from excise.methods import ridge as ridge_method

    real = ridge_method.build

    def sometimes(stats, members, point, shares):
        if point.neighbours % 2:
            raise MeasurementError("ridge: a linear system is singular")
        return real(stats, members, point, shares)

    monkeypatch.setattr(ridge_method, "build", sometimes)
    assert cli.main(job(tiny, tmp_path / "run", "--method", "ridge")) == 0
    record = read_record(tmp_path / "run")
    failed = [t for t in record.trials if t.state == "failed"]
    assert failed
    assert len(failed) < len(record.trials)
    for trial in record.trials:
        assert (trial.state == "failed") == (trial.params["neighbours"] % 2 == 1)
    assert all("singular" in str(t.reason) for t in failed)


def inputs_of(loaded, writer, ids):
    """A writer's inputs (T, I) over one text."""
    seen = []
    handle = writer.module.register_forward_hook(lambda _m, args, _y: seen.append(args[0][0]))
    with torch.inference_mode():
        loaded.anatomy.backbone(input_ids=torch.tensor([ids]), use_cache=False)
    handle.remove()
    return seen[0].double()


def test_ridge_keeps_what_responses_write_apart_from_their_prompts_and_no_token_of_targets():
    loaded, bench, captured, method = method_of("ridge", ridge={"basis": 4096})
    writer = method.writers[-1]
    written, before = [], []
    for ids, answer in zip(bench.tokens["contrast"], bench.responses(), strict=True):
        x = inputs_of(loaded, writer, [*ids, *answer[:-1]])
        written.append(x[len(ids) - 1 :])
        before.append(x[: len(ids) - 1])
    for what, rows in (("keep", torch.cat(written)), ("prompts", torch.cat(before))):
        expected = (rows.T @ rows / len(rows)).float()
        found = captured[f"{writer.name}/{what}"]
        assert float((found - expected).norm()) < 1e-3 * float(expected.norm())


@pytest.mark.parametrize("basis", [4096, 40])
def test_half_of_what_ridge_keeps_are_responses_to_the_keep_set(basis):
    loaded, bench, captured, method = method_of("ridge", ridge={"basis": basis})
    kept = Kept(bench.tokens["target"][:3], [[5, 6, 7, 8]] * 3)
    found = kept_too(bench, kept)
    assert found.keys() == captured.keys()
    writer = method.writers[-1]
    means = []
    for prompts, answers in (
        (bench.tokens["contrast"], bench.responses()),
        (kept.ids, kept.responses),
    ):
        pairs = zip(prompts, answers, strict=True)
        xs = [inputs_of(loaded, writer, [*ids, *a[:-1]])[len(ids) - 1 :] for ids, a in pairs]
        x = torch.cat(xs).double()
        means.append(x.T @ x / len(x))
    expected = (means[0] + means[1]) / 2
    diagonal = expected.diagonal().mean()
    assert float(found[f"{writer.name}/diagonal"]) == pytest.approx(float(diagonal), rel=1e-3)
    if basis < 64:
        q = found[f"{writer.name}/basis"].double()
        expected = q @ expected @ q.T
    error = (found[f"{writer.name}/keep"].double() - expected).norm()
    assert float(error) < 1e-3 * float(expected.norm())
    for what in ("prompts", "first", "target", "contrast"):
        if basis >= 64:
            name = f"{writer.name}/{what}"
            assert torch.equal(found[name], captured[name])


def test_ara_is_given_the_last_tokens_of_the_keep_set():
    loaded, bench, captured, method = method_of("ara")
    assert not any(name.endswith("/keep") for name in captured)
    kept = Kept(bench.tokens["target"][:3], [[5]] * 3)
    found = kept_too(bench, kept)
    _, with_keep = bound(bench, found)
    writer = method.writers[-1]
    expected = torch.stack([inputs_of(loaded, writer, ids)[-1] for ids in kept.ids])
    assert float((found[f"{writer.name}/keep"] - expected).abs().max()) < 1e-4
    assert all(edit is None or torch.isfinite(edit.left).all() for edit in edits_of(with_keep))


def kept_too(bench, kept):
    """What the bench's method captures where this is kept too."""
    capture = KINDS[bench.config.method].capture(bench)
    seen = setup.with_keep(bench.observe(capture), kept)
    return setup.captured_of(bench, directions_of(bench.loaded, bench.tokens), seen)


def edits_of(method):
    return method.edits(method.candidate(params_of(method, 1)[0]))


def test_ridge_lets_mlps_go_a_share_of_the_way_or_none_of_it():
    _, _, _, method = method_of("ridge", edit={"row_norms": "none"})
    params = params_of(method, 1)[0] | {"min_weight": 1.0}

    def changes(share):
        edits = method.edits(method.candidate(params | {"mlp.down_proj.share": share}))
        return {w.key: e and change(w, e) for w, e in zip(method.writers, edits, strict=True)}

    whole, half, none = changes(1.0), changes(0.5), changes(-0.3)
    for key, most in whole.items():
        if most is None:
            assert half[key] is none[key] is None
        elif key.startswith("mlp"):
            assert none[key] is None
            assert torch.allclose(half[key], most / 2, rtol=1e-4, atol=1e-7)
        else:
            assert torch.equal(half[key], most)
            assert torch.equal(none[key], most)
    assert {key.partition(".")[0] for key, d in whole.items() if d is not None} == {"attn", "mlp"}


def test_where_nothing_stands_for_attention_all_components_go_the_whole_way():
    _, _, _, method = method_of("ridge", edit={"components": ("mlp.down_proj",)})
    assert not [name for name in method.space() if name.endswith(".share")]


@pytest.mark.parametrize("name", METHODS)
def test_a_model_of_one_layer_is_searched_at_that_layer(name):
    loaded = builders.loaded("llama", num_hidden_layers=1)
    bench = bench_of(loaded, name, {})
    _, method = bound(bench)
    for params in params_of(method, 8):
        edits = method.edits(method.candidate(params))
        assert any(edit is not None for edit in edits)
        if name == "directional":
            strengths = method.candidate(params).profiles["attn.o_proj"].strengths(1)
            assert strengths == [params["attn.o_proj.max_weight"]]


@pytest.mark.parametrize("name", METHODS)
def test_what_is_computed_together_lies_on_one_device(name, monkeypatch):
    """As where `device_map` spreads a model over several; "meta" stands in for another one."""
    _, bench, captured, _ = method_of(name)
    directions = directions_of(bench.loaded, bench.tokens)
    for writer in edited_writers(bench):
        if writer.layer == 2:
            writer.module.to("meta")
    monkeypatch.setattr(directional, "prepare", lambda *_a, **_k: None)  # it looks at values
    _, method = bound(bench, captured, directions)
    groups = [members for members, _ in getattr(method, "_single", method)._groups]
    for members in groups:
        assert len({method.writers[n].like.device for n in members}) == 1
    assert sorted(n for members in groups for n in members) == list(range(len(method.writers)))


def rows_of(loaded, writer, rows):
    """A writer's inputs and outputs at the last token of each prompt, one prompt at a time."""
    seen = []
    hook = writer.module.register_forward_hook(
        lambda _m, a, y: seen.append((a[0][0, -1], y[0, -1]))
    )
    for ids in rows:
        loaded.model(torch.tensor([ids]))
    hook.remove()
    return (torch.stack(part) for part in zip(*seen, strict=True))


def test_ridge_has_targets_outputs_and_those_that_they_should_go_to():
    loaded, bench, captured, method = method_of("ridge")
    for writer in method.writers[::5]:
        for side, what in (("target", "outputs"), ("contrast", "contrast")):
            _, expected = rows_of(loaded, writer, bench.tokens[side])
            found = captured[f"{writer.name}/{what}"]
            assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_ara_moves_targets_outputs_to_contrast_and_not_the_other_way():
    loaded, bench, _, method = method_of("ara")
    point = AraPoint(preserve=0.0, steer=1.0, overshoot=0.0, neighbours=1)
    edits = method.edits(AraCandidate(1, 4, point))
    for writer, edit in zip(method.writers, edits, strict=True):
        assert (edit is not None) == (1 <= writer.layer < 4)
        if edit is None:
            continue
        x, before = rows_of(loaded, writer, bench.tokens["target"])
        _, contrast = rows_of(loaded, writer, bench.tokens["contrast"])
        after = edit.apply_to_output(x, before)
        near, far = (torch.cdist(y, contrast).min(1).values.mean() for y in (after, before))
        assert float(near) < 0.7 * float(far)


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
