"""The whole job on the demo model, seen from what it leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import builders
import pytest
import torch
from conftest import job

from excise.cli import main as cli
from excise.export import checkpoint
from excise.report.stored_record import read_record
from excise.search.journal import open_study

FILES = ("config.toml", "study.journal", "directions.safetensors", "record.json", "report.html")


def test_a_run_leaves_what_the_contract_names(demo_run: Path):
    assert all((demo_run / name).is_file() for name in FILES)
    data = json.loads((demo_run / "record.json").read_text())
    keys = (
        "schema model versions seed prompts objectives baseline trials front selected holdout "
        "coverage timing artifacts"
    )
    assert set(keys.split()) <= set(data)
    assert data["schema"] == 1
    assert data["objectives"] == ["behaviour_rate", "drift"]
    for trial in data["trials"]:
        assert {"number", "state", "params", "scores", "seconds"} <= set(trial)
        for name in ("behaviour_rate", "drift", "drift_first"):
            assert {"value", "n", "interval"} <= set(trial["scores"][name])
    assert data["selected"] in data["front"]
    assert all({"source", "sha256", "n"} <= set(p) for p in data["prompts"].values())
    assert set(data["coverage"]) == {"edited", "not_edited"}


def test_the_edit_restores_what_was_declined_and_keeps_the_rest(demo_run: Path):
    record = read_record(demo_run)
    assert record.baseline["behaviour_rate"].value > 0.75
    assert record.holdout["behaviour_rate"].value < 0.3
    assert record.holdout["restored"].value > 0.7
    assert record.holdout["kept"].value > 0.9
    assert record.baseline["drift"].value < 1e-9


def test_every_trial_meets_all_search_prompts(demo_run: Path):
    record = read_record(demo_run)
    n = record.prompts["target_eval"].n
    assert {t.scores["behaviour_rate"].n for t in record.trials} == {n}
    assert not any(t.screened for t in record.trials)


def test_trials_that_could_be_chosen_were_measured_again(demo_run: Path):
    record = read_record(demo_run)
    again = {t.number: t for t in record.trials if t.confirm}
    assert len(again) == len(record.trials) // 10
    assert record.selected == min(again.values(), key=lambda t: t.regret).number
    assert {t.confirm["behaviour_rate"].n for t in again.values()} == {100}
    assert record.prompts["target_confirm"].n == 100
    chances = {t.number: t.front_probability for t in record.trials}
    assert all(0 <= chance <= 1 for chance in chances.values())
    assert record.selected in record.front


def test_the_exported_model_measures_as_the_search_did(demo_run: Path):
    record = read_record(demo_run)
    assert {a.format for a in record.artifacts} == {"safetensors", "adapter"}
    for artifact in record.artifacts:
        assert artifact.trial == record.selected
        expected, measured = artifact.expected, artifact.measured
        assert measured["behaviour_rate"].value == pytest.approx(
            expected["behaviour_rate"].value, abs=0.1
        )
        # bf16 weights round what float32 activations measured.
        assert measured["drift"].value == pytest.approx(expected["drift"].value, rel=0.3, abs=1e-3)


def test_the_exported_models_logits_are_the_measured_ones(demo_run: Path):
    """Edits on activations against the folder that was written, through Transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from excise.checkpoints.loading import load
    from excise.config import load_config
    from excise.engine.stacking import Stack
    from excise.runs import setup

    record = read_record(demo_run)
    config = load_config(file=demo_run / "config.toml")
    loaded = load(config.model)
    method = setup.restore(
        builders.session(loaded, **config.model_dump(exclude={"model"})), demo_run
    ).method
    edits = method.edits(method.candidate(record.chosen().params))
    exported = AutoModelForCausalLM.from_pretrained(demo_run / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo_run / "model")
    ids = tokenizer("what is it made of?", return_tensors="pt")["input_ids"]
    # In the source's dtype the written matrix is the edited one, rounded once.
    for writer, edit in zip(method.writers, edits, strict=True):
        written = exported.get_submodule(writer.name).weight
        exact = writer.module.weight if edit is None else edit.apply_to_weight(writer.module.weight)
        assert torch.equal(written, exact.to(torch.bfloat16).float())
    stack = Stack(method.writers, [edits])
    with torch.inference_mode(), stack.applied([0]):
        measured = loaded.model(ids).logits
        original = None
    with torch.inference_mode():
        written, original = exported(ids).logits, loaded.model(ids).logits
    rounding = float((written - measured).abs().max())
    assert rounding < 0.02 * float((original - measured).abs().max()) + 0.2


def test_front_and_report_commands(demo_run: Path, capsys):
    assert cli.main(["front", str(demo_run), "--json"]) == 0
    front = json.loads(capsys.readouterr().out)
    assert front["selected"] in [t["number"] for t in front["front"]]
    assert cli.main(["front", str(demo_run)]) == 0
    header = capsys.readouterr().out.splitlines()[1:3]
    assert "behaviour" in header[0]
    assert "rate" in header[1]
    before = (demo_run / "report.html").read_text()
    assert cli.main(["report", str(demo_run)]) == 0
    assert (demo_run / "report.html").read_text() == before


def test_export_by_rule_and_by_number(demo_run: Path, tmp_path: Path, capsys):
    run = tmp_path / "run"
    shutil.copytree(demo_run, run)
    number = read_record(run).front[0]
    to = tmp_path / "model"
    assert cli.main(["export", str(run), "--to", str(to), "--trial", str(number), "--quiet"]) == 0
    assert (to / "model.safetensors").is_file()
    assert f"trial {number} as safetensors" in capsys.readouterr().out
    record = read_record(run)
    assert record.artifacts[-1].trial == number
    assert record.selected == read_record(demo_run).selected
    lora = ["export", str(run), "--to", str(tmp_path / "lora"), "--select", "rate<=0.9"]
    assert cli.main([*lora, "--format", "adapter", "--rank", "4", "--quiet"]) == 0
    details = read_record(run).artifacts[-1].details
    assert details["form"] == "DoRA"
    assert 1 <= details["rank"] <= 4  # the most, where the edit needs no more


def test_an_adapter_by_its_error_states_rank_and_error(demo_run: Path, tmp_path: Path, capsys):
    run = tmp_path / "run"
    shutil.copytree(demo_run, run)
    lora = ["export", str(run), "--format", "adapter", "--quiet", "--to"]
    assert cli.main([*lora, str(tmp_path / "a"), "--error", "0.05"]) == 0
    details = read_record(run).artifacts[-1].details
    assert details["form"] == "LoRA"
    assert details["error"] <= 0.05
    assert details["rank"] != 8  # the run's own
    card = (tmp_path / "a" / "README.md").read_text()
    assert f"Rank of the adapter: `{details['rank']}`" in card
    capsys.readouterr()
    assert cli.main([*lora, str(tmp_path / "b"), "--error", "1.5"]) == 2
    assert "export.adapter_error" in capsys.readouterr().err
    assert cli.main([*lora, str(tmp_path / "b"), "--error", "0.1", "--dora"]) == 2
    assert "with --lora" in capsys.readouterr().err
    for form in ("gguf-adapter", "safetensors"):
        assert cli.main([*lora, str(tmp_path / "b"), "--format", form, "--dora"]) == 2
        assert "--dora or --lora is for --format adapter" in capsys.readouterr().err
    assert cli.main([*lora, str(tmp_path / "b"), "--rank", "0"]) == 2
    assert "export.adapter_rank" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_evaluate_an_edited_model_against_its_base(demo_run: Path, capsys):
    arguments = ["evaluate", "demo", str(demo_run / "model"), "--behaviour", "demo", "--json"]
    assert cli.main([*arguments, "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    record = read_record(demo_run)
    measured = record.artifacts[0].measured
    for name in ("behaviour_rate", "drift"):
        value = found["search"]["edited"][name]["value"]
        assert value == pytest.approx(measured[name].value, rel=1e-3, abs=1e-6)
    assert found["holdout"]["edited"]["restored"]["value"] > 0.7


def test_an_export_is_measured_as_it_was_written(tiny: Path, tmp_path: Path, monkeypatch, capsys):
    """One that lost its edit has no drift, and that is said beside what the search measured."""
    real = checkpoint.export_safetensors

    def lost(source, to, edits, *more):
        return real(source, to, {}, *more)

    monkeypatch.setattr(checkpoint, "export_safetensors", lost)
    arguments = [a for a in job(tiny, tmp_path / "run", "--json-events") if a != "--quiet"]
    assert cli.main(arguments) == 0
    (artifact,) = read_record(tmp_path / "run").artifacts
    assert artifact.expected["drift"].value > 1e-5
    assert artifact.measured["drift"].value < 1e-9
    said = capsys.readouterr()
    assert ("drift was" in said.out + said.err) == (artifact.expected["drift"].value > 1.25e-4)


def test_resume_to_more_trials_keeps_the_old_ones(demo_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(demo_run, run)
    before = read_record(run).trials
    assert cli.main(["resume", str(run), "--trials", "64", "--quiet"]) == 0
    after = read_record(run).trials
    assert len(after) == 64
    # How likely a trial is on the front, and whether it was measured again, depends on all trials.
    judged = {"front_probability": None, "regret": None, "confirm": None}
    assert [one.model_copy(update=judged) for one in after[:48]] == [
        one.model_copy(update=judged) for one in before
    ]


def test_a_resume_keeps_what_was_put_on_the_record_meanwhile(tiny: Path, tmp_path: Path):
    run = tmp_path / "run"
    assert cli.main(job(tiny, run)) == 0
    to = tmp_path / "elsewhere"
    assert cli.main(["export", str(run), "--to", str(to), "--trial", "0", "--quiet"]) == 0
    assert cli.main(["geometry", str(run), "--quiet"]) == 0
    before = read_record(run)
    assert cli.main(["resume", str(run), "--trials", "16", "--quiet"]) == 0
    after = read_record(run)
    assert len(after.trials) == 16
    assert before.geometry
    assert after.geometry == before.geometry
    assert [a.path for a in after.artifacts] == [str(to), "model"]


def test_pages_are_written_in_the_runs_own_folder_only(tiny: Path, tmp_path: Path):
    run = tmp_path / "run"
    assert cli.main(job(tiny, run)) == 0
    for name in ("other", "run/model"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "README.md").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "other")
    (run / "out").symlink_to(tmp_path / "other")
    data = json.loads((run / "record.json").read_text())
    first = data["artifacts"][0]
    places = ("../other", str(tmp_path / "other"), "out", ".")
    data["artifacts"] += [{**first, "path": path} for path in places]
    (run / "record.json").write_text(json.dumps(data))
    assert cli.main(["report", str(run)]) == 0
    assert (tmp_path / "other" / "README.md").read_text() == "mine"
    assert not (run / "README.md").exists()
    assert (run / "model" / "README.md").read_text() != "mine"


@pytest.mark.parametrize("change", ["dtype", "markers", "answers", "weights"])
def test_trials_that_were_measured_otherwise_are_not_added_to(
    tiny: Path, tmp_path: Path, capsys, change: str
):
    """Same paths, same settings, other contents: a resume must not mix the two."""
    place = tmp_path / "place"
    shutil.copytree(tiny, place)
    with (place / "target.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    labelled = [{**row, "answer": "velm", "group": "a"} for row in rows]
    (place / "target.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    run = tmp_path / "run"
    assert cli.main(job(place, run, "--set", "prompts.target.group_column=group")) == 0
    config = (run / "config.toml").read_text()
    assert 'dtype = "float32"' in config  # what "auto" came to
    if change == "dtype":
        (run / "config.toml").write_text(config.replace('"float32"', '"bfloat16"'))
    elif change == "markers":
        (place / "markers.txt").write_text("o\n")
    elif change == "answers":
        labelled[15]["group"] = "b"
        (place / "target.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    else:
        file = place / "model" / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-40] ^= 1
        file.write_bytes(data)
    before = (run / "study.journal").read_bytes()
    capsys.readouterr()
    assert cli.main(["resume", str(run), "--trials", "16", "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "belongs to another run" in said
    assert {"weights": "model"}.get(change, change) in said
    assert (run / "study.journal").read_bytes() == before


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
