"""A run that is not finished says what its journal holds."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from excise.chat.run_so_far import run_so_far, trial_of
from excise.errors import RunStateError
from excise.report.stored_record import read_record
from excise.search import journal


@pytest.fixture
def unfinished(tiny_run, tmp_path):
    """A copy of the run as it stood before its record was written."""
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / "record.json").unlink()
    return folder


def measured(trial):
    """What the search knew of a trial; how it stands among all others is known at the end."""
    return trial.number, trial.state, trial.params, trial.scores


def test_a_finished_run_is_its_record(tiny_run):
    assert run_so_far(tiny_run) == read_record(tiny_run)


def test_a_run_without_a_record_is_its_journal(tiny_run, unfinished):
    before = {path.name: path.read_bytes() for path in unfinished.iterdir() if path.is_file()}
    found, whole = run_so_far(unfinished), read_record(tiny_run)
    assert list(map(measured, found.trials)) == list(map(measured, whole.trials))
    assert found.front == whole.front
    assert found.selected in found.front  # the knee, until the choice is measured on fresh prompts
    assert found.identity == whole.identity
    assert found.files == whole.files
    assert found.config == whole.config
    assert (found.model.layers, found.model.width) == (whole.model.layers, whole.model.width)
    assert {p.name: p.read_bytes() for p in unfinished.iterdir() if p.is_file()} == before


def test_trials_after_the_record_are_added_to_it(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    record = json.loads((folder / "record.json").read_text())
    kept = [trial for trial in record["trials"] if trial["number"] < 8]
    front = [number for number in record["front"] if number < 8]
    selected = record["selected"] if record["selected"] < 8 else (front or [0])[0]
    record |= {"trials": kept, "front": front, "selected": selected, "artifacts": []}
    record.pop("figures_sha256")
    (folder / "record.json").write_text(json.dumps(record))
    os.utime(folder / "record.json", (1, 1))
    found, whole = run_so_far(folder), read_record(tiny_run)
    assert (len(found.trials), found.front) == (len(whole.trials), whole.front)
    assert found.selected == selected
    assert found.holdout == whole.holdout


@pytest.mark.parametrize("lines", [1, 9, 40])
def test_a_run_that_was_cut_short(unfinished, lines):
    path = unfinished / journal.FILE
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]) + b'{"op')
    if lines == 1:
        with pytest.raises(RunStateError, match="has not finished"):
            run_so_far(unfinished)
        return
    states = {trial.state for trial in run_so_far(unfinished).trials}
    assert states <= {"complete", "running"}


def test_what_is_no_run_is_said_in_a_line(tmp_path, unfinished):
    with pytest.raises(RunStateError, match="not a run folder"):
        run_so_far(tmp_path / "none")
    with pytest.raises(RunStateError, match="not a run folder"):
        run_so_far(tmp_path)
    (unfinished / "directions.safetensors").write_bytes(b"none")
    with pytest.raises(RunStateError, match="put it back"):
        run_so_far(unfinished)


def test_a_trial_that_is_not_there(tiny_run):
    record = read_record(tiny_run)
    assert trial_of(record, 3).number == 3
    with pytest.raises(RunStateError, match="no trial 99"):
        trial_of(record, 99)
