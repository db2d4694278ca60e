"""Signals that stop a command: all alike, unless they are ignored, and whatever is made of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from excise.cli import main as cli
from excise.cli.signals import Stoppable

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_interrupts(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), Stoppable():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", SIGNALS)
def test_what_a_library_makes_of_it_is_still_an_interrupt(number: signal.Signals) -> None:
    def imported() -> None:
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            raise ImportError("numpy could not be imported") from None

    with pytest.raises(KeyboardInterrupt) as caught, Stoppable():
        imported()
    assert isinstance(caught.value.__cause__, ImportError)


@pytest.mark.parametrize("number", SIGNALS)
def test_an_ignored_signal_stays_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Stoppable():
            os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)


def test_errors_without_a_signal_are_what_they_are() -> None:
    with pytest.raises(ImportError), Stoppable():
        raise ImportError("none")


@pytest.mark.parametrize("number", SIGNALS)
def test_the_command_line_ends_with_130(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "excise.cli.inspect_model.inspect_model", lambda _: os.kill(os.getpid(), number)
    )
    assert cli.main(["inspect", "demo"]) == 130
    assert capsys.readouterr().err == "excise: interrupted\n"


def test_an_interrupt_of_code_given_as_text_is_an_exit_code_too(tmp_path: Path) -> None:
    """`python -m` would end by the signal: dataclasses are made of such code, in every import."""
    (tmp_path / "struck.py").write_text(
        "import sys\n"
        "from excise.cli import inspect_model, main\n"
        "inspect_model.inspect_model = lambda _: exec('raise KeyboardInterrupt')\n"
        "sys.exit(main.main(['inspect', 'demo']))\n"
    )
    command = [sys.executable, "-m", "struck"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "excise: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_after_the_work_is_done_changes_nothing(number: signal.Signals) -> None:
    program = (
        "import atexit, os, sys; sys.argv = ['excise', 'report', '/none/such']; "
        f"atexit.register(os.kill, os.getpid(), {int(number)}); "
        "from excise.cli.main import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert b"Traceback" not in done.stderr
