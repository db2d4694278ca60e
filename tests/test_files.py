"""Unfinished folders and files: what is nobody's goes, what is a living process's stays; permissions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from excise import files
from excise.errors import OutputError, StorageError
from excise.run_lock import hold
from excise.runs import run_folder

_HOLDER = """
import sys
from pathlib import Path
from excise.files import claimed, temporary
with claimed(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    room = temporary("plain")
    print(folder, room.path, sep="\\n", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(place: Path) -> Iterator[tuple[subprocess.Popen[str], list[Path]]]:
    """Another process with a claimed folder beside `place` and one among temporary files."""
    command = [sys.executable, "-c", _HOLDER, str(place)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(place.parent)},
    ) as process:
        assert process.stdout is not None
        yield process, [Path(process.stdout.readline().strip()) for _ in range(2)]
        process.kill()


def test_a_killed_process_leaves_nothing_once_the_next_one_writes(tmp_path: Path) -> None:
    with holder(tmp_path / "model") as (process, folders):
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert all(folder.is_dir() for folder in folders)
        with files.scratch(tmp_path / "other", 0) as mine:
            assert not any(folder.exists() for folder in folders)
            assert mine.is_dir()
    assert not list(tmp_path.iterdir())


def test_what_a_living_process_works_on_stays(tmp_path: Path) -> None:
    with holder(tmp_path / "model") as (process, folders):
        with files.staged(tmp_path / "model", 0) as mine:
            assert mine not in folders
        journal_folder = tmp_path
        with hold(journal_folder):
            pass
        assert (folders[0] / "half").read_text() == "half"
        assert folders[1].is_dir()
        process.communicate()
        assert process.returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "model"]


def test_a_claimed_folder_goes_when_it_is_let_go_of(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    room = files.temporary("plain")
    assert room.path.stat().st_mode & 0o777 == 0o700
    (room.path / "weights").write_bytes(b"0")
    del room
    assert not list(tmp_path.iterdir())


def test_a_link_in_the_place_of_a_lock_leads_nowhere(tmp_path: Path) -> None:
    """A folder that others made may name anything; what a sweep removes is its own."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    (run / ".model.partial-0123abcd").symlink_to(kept)
    (run / ".model.partial-0123abcd.lock").symlink_to(kept / "file")
    (run / ".adapter.partial-0123abcd").symlink_to(kept)
    (run / ".adapter.partial-0123abcd.lock").touch()
    (run / "link").symlink_to(kept)
    (kept / ".card.excise-new").write_text("mine")
    files.sweep_held(run)
    assert (kept / "file").read_text() == "mine"
    assert (kept / ".card.excise-new").exists()


def test_a_held_folder_is_tidied(tmp_path: Path) -> None:
    (tmp_path / ".record.json.excise-new").write_text("{")
    for name in ("model", ".model.excise-old", ".adapter.excise-old"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / ".README.md.excise-new").write_text("#")
    (tmp_path / ".adapter.excise-old" / "weights").write_bytes(b"0")
    (tmp_path / ".mine").write_text("kept")
    with hold(tmp_path):
        found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*"))
    assert found == [".lock", ".mine", "adapter", "adapter/weights", "model"]


def test_a_folder_is_replaced_whole_or_stays(tmp_path: Path, monkeypatch) -> None:
    place = tmp_path / "model"
    for text in ("one", "two"):
        with files.claimed(place) as room:
            (room / "model").mkdir()
            (room / "model" / "file").write_text(text)
            files.publish(room / "model", place, replace=True)
        assert (place / "file").read_text() == text
    real = Path.rename

    def full(self: Path, target: Path) -> Path:
        if self.name == "model" and self.parent != tmp_path:
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with files.claimed(place) as room:
        (room / "model").mkdir()
        with pytest.raises(StorageError, match="No space"):
            files.publish(room / "model", place, replace=True)
    assert (place / "file").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_failure_leaves_no_parents(tmp_path: Path) -> None:
    with pytest.raises(StorageError), files.staged(tmp_path / "a" / "b" / "model", 0):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_have_the_permissions_that_the_umask_says(tmp_path: Path, umask: int) -> None:
    import torch

    files.write_text(tmp_path / "config.toml", "a = 1\n")
    run_folder.save_tensors(tmp_path / "method.safetensors", {"a": torch.zeros(2)}, {})
    with files.staged(tmp_path / "model", 0) as folder:
        files.add_files(folder, {"README.md": "#"})
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")}
    written = ("config.toml", "method.safetensors", "README.md")
    assert {modes[name] for name in written} == {0o666 & ~umask}
    assert modes["model"] == 0o777 & ~umask


def test_destinations_that_cannot_be_are_one_line(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "closed")
    cases = {
        "file/model": "file is a file",
        "round": "symlink loop|symbolic links|is a file",
        "closed/a/b": "closed permits no writing",
        "n" * 300: "name too long",
        "file": "file is a file",
        "empty\0": "null",
    }
    for name, words in cases.items():
        with pytest.raises(OutputError, match=words) as caught:
            files.check_destination(tmp_path / name)
        assert "\n" not in str(caught.value)
