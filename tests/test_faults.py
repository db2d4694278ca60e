"""Interrupts and full disks: no finished trial is lost, nothing half-written stays."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import job
from kills import facts

from excise.cli import main as cli
from excise.events import PhaseStarted, Progress
from excise.export import checkpoint
from excise.runs import pipeline


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    """The command as from a terminal, where Ctrl-C interrupts: a background shell has it ignored."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "excise.cli", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def finished_trials(out: Path) -> set[int]:
    """Trials whose end stands in the journal."""
    path = out / "study.journal"
    if not path.is_file():
        return set()
    ended = set()
    for line in path.read_bytes().split(b"\n")[:-1]:
        entry = json.loads(line)
        if entry.get("op_code") == 6 and entry.get("state") == 1:
            ended.add(entry["trial_id"])
    return ended


PHASES = ["load", "capture", "plan", "baseline", "search", "holdout", "export"]


@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_in_each_phase_keeps_the_run(tiny: Path, tmp_path: Path, phase, monkeypatch, capsys):
    out = tmp_path / "run"
    real = pipeline.run

    def interrupted(config, folder, on_event, **more):
        def strike(event):
            on_event(event)
            begun = isinstance(event, PhaseStarted) and event.phase == phase
            within = isinstance(event, Progress) and event.phase == phase
            if within or (begun and phase != "search"):
                raise KeyboardInterrupt

        return real(config, folder, strike, **more)

    monkeypatch.setattr(pipeline, "run", interrupted)
    assert cli.main(job(tiny, out)) == 130
    assert "interrupted" in capsys.readouterr().err
    monkeypatch.setattr(pipeline, "run", real)
    if phase == "load":  # nothing was written yet, so there is nothing to resume
        assert not out.exists()
        assert cli.main(job(tiny, out)) == 0
    else:
        assert cli.main(["resume", str(out), "--quiet"]) == 0
    assert not [p for p in out.iterdir() if "partial" in p.name]
    reference = tmp_path / "reference"
    assert cli.main(job(tiny, reference)) == 0
    assert facts(out) == facts(reference)


def test_an_interrupted_export_leaves_the_model_of_before(tiny: Path, tmp_path: Path, monkeypatch):
    out = tmp_path / "run"
    assert cli.main(job(tiny, out)) == 0
    before = (out / "model" / "model.safetensors").read_bytes()

    def strike(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "export_safetensors", strike)
        assert cli.main(["resume", str(out), "--trials", "16", "--quiet"]) == 130
    assert (out / "model" / "model.safetensors").read_bytes() == before
    assert cli.main(["resume", str(out), "--quiet"]) == 0
    assert (out / "model" / "model.safetensors").is_file()
    assert not [p for p in out.iterdir() if p.name.startswith(".") and p.name != ".lock"]


def test_a_run_whose_reader_went_away_has_not_succeeded(tiny: Path, tmp_path: Path):
    arguments = [a for a in job(tiny, tmp_path / "run", "--json-events") if a != "--quiet"]
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "excise.cli", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert found.returncode == 1
    assert b"Traceback" not in found.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_real_signal_exits_130_and_says_how_to_go_on(tiny: Path, tmp_path: Path, number):
    out = tmp_path / "run"
    process = start(job(tiny, out, "--trials", "400"))
    while len(finished_trials(out)) < 8:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) == 130
    message = process.stderr.read().decode()
    assert f"excise resume {out}" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("name", ["append_logs", "write_text", "save_file"])
def test_a_full_disk_is_one_line_and_exit_code_1(
    tiny: Path, tmp_path: Path, name, monkeypatch, capsys
):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "run"
    if name == "append_logs":
        from excise.search.journal import Journal

        monkeypatch.setattr(Journal, "_write", full)
    elif name == "write_text":
        monkeypatch.setattr("excise.files.os.fsync", full)
    else:
        monkeypatch.setattr("excise.runs.run_folder.save_file", full)
    assert cli.main(job(tiny, out)) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert len(error.strip().splitlines()) == 1
    assert not (out / "record.json").exists()
    assert not [p for p in out.iterdir() if p.name.endswith((".partial", ".tmp", ".excise-new"))]
