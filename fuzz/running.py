"""A function in a process of its own: what it printed, how it ended, what it took."""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

SECONDS, BYTES = 60.0, 4 * 2**30
_SLACK = 2**30
_POLL, _LOOK = 0.004, 0.05  # seconds between looks at whether it ended, and at its memory


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: its exit code; minus the signal where one ended it.
        out: its standard output.
        err: its standard error.
        seconds: how long it took.
        peak: the most bytes that it and its children held.
        stopped: the limit that it was stopped at, or "".
        left: processes of its own still ran when it had ended.
    """

    code: int
    out: str
    err: str
    seconds: float
    peak: int
    stopped: str = ""
    left: bool = False


def run(
    function: Callable[[], int],
    folder: Path,
    *,
    seconds: float = SECONDS,
    most: int = BYTES,
) -> Outcome:
    """Fork, and call the function within `folder` as a program of its own would be.

    Args:
        function: gives the exit code.
        folder: where it works, and where its output is kept (`stdout`, `stderr`) and its scratch.
        seconds: stopped after that.
        most: stopped beyond so many bytes.
    """
    scratch = folder / "tmp"
    scratch.mkdir(exist_ok=True)
    begun = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _be_a_program(function, folder, scratch, most)
    stopped, peak, looked = "", 0, 0.0
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        now = time.monotonic()
        if ended:
            break
        if now - looked >= _LOOK:
            looked, peak = now, max(peak, _held(child))
            stopped = stopped or (
                "time" if now - begun > seconds else "memory" if peak > most else ""
            )
            if stopped:
                os.killpg(child, signal.SIGKILL)
        time.sleep(_POLL)
    left = _strays(child)
    peak = max(peak, usage.ru_maxrss * 1024)
    stopped = stopped or ("memory" if peak > most else "")
    return Outcome(
        os.waitstatus_to_exitcode(status),
        _text(folder / "stdout"),
        _text(folder / "stderr"),
        now - begun,
        peak,
        stopped,
        left,
    )


def _be_a_program(function: Callable[[], int], folder: Path, scratch: Path, most: int) -> None:
    """What a forked child does, to its end."""
    code = 1
    try:
        os.setsid()
        torch.set_num_threads(1)  # one thread makes the pool anew, before several would at once
        faulthandler.disable()  # a program's own is off
        _hold_memory(most)
        for number, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
            os.close(file)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
        sys.stderr = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
        _follow_stderr()
        os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
        os.chdir(folder)
        try:
            code = function()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:  # noqa: BLE001 (as the interpreter does)
            traceback.print_exc()
        gc.collect()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _hold_memory(most: int) -> None:
    """A wall beyond the limit: what grows faster than it is looked at takes no other process's memory."""
    room = psutil.Process().memory_info().vms + most + _SLACK
    resource.setrlimit(resource.RLIMIT_AS, (room, room))


def _follow_stderr() -> None:
    """Loggers that were set up before the fork write to this process's standard error."""
    known = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    for logger in (logging.root, *known):
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.stderr)


def _held(child: int) -> int:
    try:
        whole = psutil.Process(child)
        return sum(p.memory_info().rss for p in (whole, *whole.children(recursive=True)))
    except psutil.Error:  # it ended while it was looked at
        return 0


def _strays(group: int) -> bool:
    """Whether processes of a group live whose leader has ended; they are ended too."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    alive = [p for p in psutil.process_iter() if _group(p) == group]
    for process in alive:
        process.kill()
    return bool(alive)


def _group(process: psutil.Process) -> int | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else os.getpgid(process.pid)
    except (psutil.Error, ProcessLookupError):
        return None


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "backslashreplace") if path.is_file() else ""
