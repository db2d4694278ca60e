"""Launcher of every child process, called with PARENT PROGRAM ARGUMENTS...

It makes sure that the program ends when its parent ends, and then executes it. It runs as a file and
imports nothing of the package, so that it starts fast.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG, of Linux' prctl
_LOOK = 0.5  # seconds between two checks of the parent, on other systems


def launch(arguments: Sequence[str]) -> None:
    """Execute the program; where the system has no death signal, run it and watch the parent instead."""
    parent, command = int(arguments[0]), list(arguments[1:])
    if _set_death_signal():
        if os.getppid() != parent:  # it ended before the signal was asked for
            raise SystemExit(1)
        try:
            os.execv(command[0], command)
        except OSError as error:
            raise SystemExit(f"{command[0]}: {error.strerror}") from None
    raise SystemExit(supervise(parent, command))


def _set_death_signal() -> bool:
    """Ask Linux to kill this process when its parent ends; say whether it will."""
    if sys.platform != "linux":
        return False
    import ctypes

    return bool(ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0) == 0)


def supervise(parent: int, command: Sequence[str]) -> int:
    """Run the program while `parent` lives; return its exit code."""
    try:
        child = subprocess.Popen(command)
    except OSError as error:
        raise SystemExit(f"{command[0]}: {error.strerror}") from None
    lives = _watch(parent)
    while True:
        try:
            return child.wait(_LOOK)
        except subprocess.TimeoutExpired:
            if not lives():
                child.kill()
                return 1


def _watch(parent: int):  # type: ignore[no-untyped-def]
    if os.name == "posix":
        return lambda: os.getppid() == parent
    import psutil

    return psutil.Process(parent).is_running  # compares creation times too: Windows reuses ids


if __name__ == "__main__":
    launch(sys.argv[1:])
