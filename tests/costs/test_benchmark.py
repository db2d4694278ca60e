from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from excise.cli.main import main
from excise.costs.benchmark import Outcome, compared
from excise.errors import MeasurementError
from excise.report.stored_record import read_record

CHOICE = """
task: local_choice
dataset_kwargs: {data_files: samples.jsonl}
output_type: multiple_choice
doc_to_text: "Which is it, {{ text }}?"
doc_to_choice: ["one", "two", "three"]
doc_to_target: right
"""
WRITE = """
task: local_write
dataset_kwargs: {data_files: samples.jsonl}
output_type: generate_until
doc_to_text: text
doc_to_target: "{{ right }}"
generation_kwargs: {max_gen_toks: 3, until: ["."], do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two task files that need no network."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"text": f"orb {n}", "right": n % 3} for n in range(12)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in {"choice": CHOICE, "write": WRITE}.items():
        (folder / f"{name}.yaml").write_text(text)
    return [str(folder / "choice.yaml"), str(folder / "write.yaml")]


def test_original_and_edit_meet_the_same_samples(tiny_run: Path, tasks, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    assert main(["bench", str(run), "--tasks", *tasks, "--limit", "10", "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)["benchmarks"]
    assert {(one["task"], one["metric"]) for one in found} == {
        ("local_choice", "acc"),
        ("local_choice", "acc_norm"),
        ("local_write", "exact_match"),
    }
    record = read_record(run)
    assert [one.model_dump(exclude_none=True, mode="json") for one in record.benchmarks] == found
    for one in record.benchmarks:
        assert one.trial == record.selected
        assert one.n == 10
        assert one.difference == pytest.approx(one.edited.value - one.original.value)
        assert one.gained - one.lost == round(10 * one.difference)
    assert "Benchmarks" in (run / "report.html").read_text()
    # The edit as hooks is what a model with the edit in its weights gives.
    exported = str(run / "model")
    command = ["bench", exported, "--against", record.model.source, "--tasks", *tasks, "--json"]
    assert main([*command, "--limit", "10", "--quiet"]) == 0
    other = json.loads(capsys.readouterr().out)["benchmarks"]
    for mine, theirs in zip(found, other, strict=True):
        assert mine["samples_sha256"] == theirs["samples_sha256"]
        assert mine["original"] == theirs["original"]
        assert mine["edited"]["value"] == pytest.approx(theirs["edited"]["value"], abs=0.11)


def test_models_that_were_asked_different_things_are_not_compared():
    one, other = (Outcome({("t", "acc"): [1.0]}, {"t": asked}) for asked in "ab")
    with pytest.raises(MeasurementError, match="not asked the same"):
        compared(one, other, 0)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--tasks", "gone.yaml"], "gone.yaml"),
        (["--trial", "99"], "no trial 99"),
        (["--against", "x"], "own original"),
        (["--limit", "-1"], "--limit"),
    ],
)
def test_what_cannot_be_measured_is_one_line(tiny_run: Path, tasks, more, words, capsys):
    given = [] if "--tasks" in more else ["--tasks", *tasks]
    assert main(["bench", str(tiny_run), *given, *more, "--quiet"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.strip().splitlines()) == 1
