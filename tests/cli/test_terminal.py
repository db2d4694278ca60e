"""Standard output and error that are full, closed, read by nobody, or of another encoding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import job
from records import make_record

from excise.cli import terminal
from excise.errors import StorageError
from excise.report.stored_record import write_record


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a record: what `front` and `report` need."""
    folder = tmp_path_factory.mktemp("terminal")
    write_record(folder, make_record())
    return folder


def excise(*arguments: str, close: int | None = None, **how: Any) -> Any:
    """The command in a process of its own, with the standard stream `close` closed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | how.pop("environment", {})
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    return subprocess.run(
        [sys.executable, "-m", "excise.cli", *arguments],
        env=environment,
        text=True,
        check=False,
        preexec_fn=None if close is None else lambda: os.close(close),
        **how,
    )


def full() -> Any:
    return Path("/dev/full").open("w")


def test_work_that_is_done_is_done_though_nobody_can_be_told(run: Path) -> None:
    (run / "report.html").unlink(missing_ok=True)
    with full() as stream:
        done = excise("report", str(run), stdout=stream)
    assert done.returncode == 0
    assert (run / "report.html").is_file()
    assert done.stderr.splitlines() == [
        "excise: cannot write to standard output: No space left on device; the work itself is done"
    ]
    for close in (1, 2):
        done = excise("report", str(run), close=close)
        assert (done.returncode, done.stderr) == (0, "")


def test_output_that_is_the_work_is_known_to_be_lost(run: Path) -> None:
    for flags in ([], ["--json"]):
        with full() as stream:
            done = excise("front", str(run), *flags, stdout=stream)
        assert done.returncode == 1
        assert done.stderr == "excise: cannot write to standard output: No space left on device\n"


def test_a_reader_that_went_away_is_no_failure(run: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = excise("front", str(run), stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_characters_that_a_terminal_lacks_are_written_out(run: Path, encoding: str) -> None:
    done = excise("front", str(run), environment={"PYTHONIOENCODING": f"{encoding}:strict"})
    assert (done.returncode, done.stderr) == (0, "")
    done = excise(
        "front", str(run / "\u1e9e"), environment={"PYTHONIOENCODING": f"{encoding}:strict"}
    )
    assert done.returncode == 2
    assert "\\u1e9e" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_full_standard_error_ends_nothing(tiny: Path, tmp_path: Path) -> None:
    """Progress is not the work; nor is the table at the end."""
    arguments = [a for a in job(tiny, tmp_path / "run") if a != "--quiet"]
    with full() as stream:
        done = excise(*arguments, stdout=stream, stderr=stream)
    assert done.returncode == 0
    assert json.loads((tmp_path / "run" / "record.json").read_text())["artifacts"]


def test_events_that_cannot_be_written_end_the_run_in_one_line(tiny: Path, tmp_path: Path) -> None:
    arguments = [a for a in job(tiny, tmp_path / "run", "--json-events") if a != "--quiet"]
    with full() as stream:
        done = excise(*arguments, stdout=stream)
    assert done.returncode == 1
    assert done.stderr == "excise: cannot write to standard output: No space left on device\n"


def test_the_numbers_of_closed_streams_are_not_given_to_files(tmp_path: Path) -> None:
    """What a library prints would else be written into the first file that is opened."""
    code = (
        "import sys; from pathlib import Path; from excise.cli import terminal; terminal.prepare(); "
        "file = Path(sys.argv[1]).open('w'); assert file.fileno() > 2, file.fileno(); "
        "print('noise', flush=True)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    done = subprocess.run(
        command, preexec_fn=lambda: os.close(1), stderr=subprocess.PIPE, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "file").read_text() == ""


def test_data_for_programs(capsys: Any) -> None:
    terminal.show_json({"a": [1, None, float("nan")], "b": (float("inf"), "\ud800")})
    text = capsys.readouterr().out
    assert json.loads(text) == {"a": [1, None, "NaN"], "b": ["Infinity", "\ud800"]}
    assert text.isascii()


def test_lines_for_people(capsys: Any) -> None:
    terminal.say("done \x1b[2J")
    terminal.complain("not done\nat all \x1b[2J")
    out, err = capsys.readouterr()
    assert out == "done \\x1b[2J\n"
    assert err == "excise: not done at all \\x1b[2J\n"


def test_a_failure_to_show_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    with full() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(StorageError, match="No space left"):
            terminal.out("text")
        terminal.out("more")  # goes nowhere from here on
