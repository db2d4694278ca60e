"""A run watched from outside: searching, stopped, finished, as its folder shows."""

from __future__ import annotations

import os
import shutil

from excise.page.watching import Watch
from excise.run_lock import LOCK, hold, is_held


def watched(folder):
    """What a page sees that has just been opened."""
    return Watch(folder).look()


def test_a_run_from_its_first_file_to_its_record(tiny_run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(tiny_run / "config.toml", folder)
    assert watched(folder).state == "stopped: no trial yet; it can be resumed"
    shutil.copy(tiny_run / "directions.safetensors", folder)
    shutil.copy(tiny_run / "study.journal", folder)
    with hold(folder):
        assert watched(folder).state == "working: 12 of 12 trials"
    assert watched(folder).state == "stopped: 12 of 12 trials; it can be resumed"
    shutil.copy(tiny_run / "record.json", folder)
    sight = watched(folder)
    assert (sight.state, sight.problem) == ("finished: 12 trials", "")
    assert sight.record.selected is not None


def test_a_search_that_is_killed_is_seen_to_be_stopped(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / "record.json").unlink()
    journal = folder / "study.journal"
    whole = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(whole[: len(whole) // 2]))
    watch = Watch(folder)
    with hold(folder):
        first = watch.look()
        assert first.state.startswith("searching: ")
        assert first.measured < 12
        assert watch.look() is first  # nothing has changed
        watch._next = 0.0
        journal.write_bytes(b"".join(whole))
        later = watch.look()
        assert (later.measured, later.version) == (12, first.version + 1)
    assert watch.look().state.startswith("stopped: ")


def test_looking_changes_nothing(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / LOCK).unlink(missing_ok=True)
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir()}
    assert watched(folder).record is not None
    assert not is_held(folder)
    assert {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.iterdir()} == before


def test_what_cannot_be_read_is_said(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / "record.json").write_text("{")
    os.utime(folder / "record.json")
    sight = watched(folder)
    assert sight.record is None
    assert "record.json" in sight.problem
