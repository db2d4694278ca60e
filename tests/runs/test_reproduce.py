"""A model rebuilt from its record alone: the same bytes, or what differs and whether it matters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import job

from excise.checkpoints.loading import load
from excise.cli.main import main
from excise.config import ModelSection
from excise.report.stored_record import read_record
from excise.runs.reproduce import reproduce


@pytest.fixture(scope="module", params=["directional", "ridge"])
def place(request: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of a job, its run, and a copy of the record alone."""
    root = tmp_path_factory.mktemp(request.param)
    shutil.copytree(tiny, root, dirs_exist_ok=True)
    more = ("--method", request.param, "--set", 'export.formats=["safetensors", "adapter"]')
    assert main(job(root, root / "run", *more, "--set", "export.adapter_rank=2")) == 0
    (root / "alone").mkdir()
    shutil.copy(root / "run" / "record.json", root / "alone")
    return root


def test_the_same_machine_gives_the_same_bytes(place: Path, capfd: Any) -> None:
    found = reproduce(place / "alone" / "record.json", place / "again")
    assert found.same
    assert [one.format for one in found.rebuilt] == ["safetensors", "adapter"]
    assert not found.differences
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (place / "again" / name).read_bytes() == (place / "run" / name).read_bytes()
    assert sorted(p.name for p in (place / "again").iterdir()) == ["adapter", "model"]
    assert load(ModelSection(source=str(place / "again" / "model"))).anatomy.model_type == "qwen3"
    assert main(["reproduce", str(place / "alone" / "record.json"), "--quiet"]) == 0
    out = capfd.readouterr().out
    assert "byte for byte" in out
    assert out.count("same bytes") == 2
    assert [p.name for p in (place / "alone").iterdir()] == ["record.json"]


def test_a_trial_without_an_export_is_rebuilt_and_not_compared(place: Path, tmp_path: Path) -> None:
    record = read_record(place / "alone")
    other = next(t.number for t in record.trials if t.number != record.selected)
    found = reproduce(place / "alone", tmp_path / "out", trial=other)
    assert found.same
    assert "no export of it to compare with" in found.verdict
    assert (tmp_path / "out" / "model").is_dir()


def test_other_software_is_named_and_judged(place: Path, tmp_path: Path) -> None:
    data = json.loads((place / "alone" / "record.json").read_text())
    data["versions"] |= {"torch": "1.0", "optuna": "1.0"}
    (tmp_path / "record.json").write_text(json.dumps(data))
    found = reproduce(tmp_path)
    assert found.same
    assert {d.what: d.matters for d in found.differences} == {"torch": True, "optuna": False}


def test_other_prompts_give_other_weights_and_the_reason(
    place: Path, tmp_path: Path, capfd: Any
) -> None:
    lines = (place / "target.jsonl").read_text().splitlines(keepends=True)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(lines[1:2] + lines[:1] + lines[12:14] + lines[2:12] + lines[14:]))
    command = ["reproduce", str(place / "run"), "--quiet"]
    command += ["--set", f"prompts.target.source={json.dumps(str(other))}"]
    assert main(command) == 1
    out = capfd.readouterr().out
    assert "other bytes" in out
    assert "apart by at most" in out
    assert "what can explain it: target prompts" in out
    assert not [p for p in (place / "run").iterdir() if "partial" in p.name]


def test_other_scoring_prompts_do_not_matter(place: Path, tmp_path: Path) -> None:
    lines = (place / "contrast.jsonl").read_text().splitlines(keepends=True)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(lines[:12] + lines[:11:-1]))
    found = reproduce(place / "run", sets=[f"prompts.contrast.source={json.dumps(str(other))}"])
    assert found.same
    named = {d.what: d.matters for d in found.differences}
    assert named
    assert not any(named.values())


def test_no_code_that_a_record_names_is_run(place: Path, tmp_path: Path, capfd: Any) -> None:
    """Leave to run code is the reader's to give: a record may come from anyone."""
    shutil.copytree(place / "model", tmp_path / "model")
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'a').write('x')\n"
    (tmp_path / "scorer.py").write_text(code)
    (tmp_path / "model" / "own.py").write_text(
        code + "from transformers import Qwen3ForCausalLM\nclass Own(Qwen3ForCausalLM): pass\n"
    )
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own.Own"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    data = json.loads((place / "alone" / "record.json").read_text())
    data["config"]["model"] |= {"source": str(tmp_path / "model"), "trust_remote_code": True}
    data["config"]["scores"]["files"] = [str(tmp_path / "scorer.py")]
    (tmp_path / "record.json").write_text(json.dumps(data))
    found = reproduce(tmp_path)
    assert found.same
    assert not ran.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--set", "model.source='/nowhere'"], "neither a folder nor a Hub id"),
        (["--set", "prompts.target.source='none.txt'"], "none.txt"),
        (["--trial", "999"], "no trial 999"),
        (["--set", "nothing=1"], "unknown configuration key"),
        (["--out", "{place}/run"], "already exists"),
    ],
)
def test_bad_input_is_one_line(place: Path, capfd: Any, change: list[str], words: str) -> None:
    before = sorted(place.iterdir())
    flags = [part.replace("{place}", str(place)) for part in change]
    assert main(["reproduce", str(place / "alone"), "--quiet", *flags]) == 2
    said = capfd.readouterr().err.strip()
    assert words in said
    assert "\n" not in said
    assert sorted(place.iterdir()) == before


def test_a_record_that_is_none_is_said(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "record.json").write_text("{}")
    assert main(["reproduce", str(tmp_path / "record.json")]) == 2
    assert "schema" in capfd.readouterr().err
    assert main(["reproduce", str(tmp_path / "none.json")]) == 2
