"""What every child process of ours is at first, called with PARENT PROGRAM ARGUMENTS...

It sees to it that the program ends with its parent, however that ends, and then becomes it. A file
to be run, which imports nothing of the package: it must begin in no time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG, of Linux' prctl
_LOOK = 0.5  # seconds between two looks at the parent, on other systems


def launch(arguments: Sequence[str]) -> None:
    """Become the program, or run it beside a watch of the parent where a system has no signal for that."""
    parent, command = int(arguments[0]), list(arguments[1:])
    if _is_told_of_the_end():
        if os.getppid() != parent:  # it ended before the signal was asked for
            raise SystemExit(1)
        try:
            os.execv(command[0], command)
        except OSError as error:
            raise SystemExit(f"{command[0]}: {error.strerror}") from None
    raise SystemExit(supervise(parent, command))


def _is_told_of_the_end() -> bool:
    """Ask Linux to kill this process when its parent ends; whether it will."""
    if sys.platform != "linux":
        return False
    import ctypes

    return bool(ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0) == 0)


def supervise(parent: int, command: Sequence[str]) -> int:
    """Run the program while `parent` lives; returns its exit code."""
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

    return psutil.Process(
        parent
    ).is_running  # by its time of creation too: Windows uses numbers again


if __name__ == "__main__":
    launch(sys.argv[1:])
