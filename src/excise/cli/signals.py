"""Interrupts: Ctrl-C, SIGTERM and SIGHUP all stop a command with its state kept."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # the last is not on every system


class Stoppable:
    """Context in which these signals interrupt, unless they are ignored, as under nohup.

    Leaving it raises a KeyboardInterrupt where one came, whatever the code that it struck made of it:
    libraries turn an interrupt into errors of their own, an import into an ImportError.

    `last`: the process ends with it. How it ends is known then, and a request to end changes it no more;
    only Ctrl-C does, should the end hang.
    """

    def __init__(self, *, last: bool = False) -> None:
        self._last = last
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stoppable:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self._before.items():
            kept = self._last and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if kept else handler)
        # One that struck code given as text, as dataclasses are made of, marks the whole process as
        # ended by SIGINT, whatever its exit code; running any such code takes that mark away.
        eval("0")
        if self._asked and error is not None and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.default_int_handler(number, frame)


class Haltable:
    """Context in which Ctrl-C asks for a halt, once; a second one interrupts."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Haltable:
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as under nohup
        if threading.current_thread() is threading.main_thread() and not ignored:
            self._before = signal.signal(signal.SIGINT, self._halt)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _halt(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            signal.default_int_handler(number, frame)
        self.asked = True
