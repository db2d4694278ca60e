"""Runs watched from outside: what their folders say now, whoever searches them. Reads only."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path

from excise.chat.run_so_far import run_so_far
from excise.errors import InputError
from excise.record import Record
from excise.report import formatting
from excise.report.stored_record import FILE as RECORD
from excise.report.views import setting
from excise.run_lock import is_held
from excise.search import journal

_SHARE = 10  # a folder is read again after this many times what reading it took
_SOONEST = 1.0  # seconds between two readings


@dataclass(frozen=True)
class Sight:
    """What was seen of a run. `version` changes whenever anything of it does.

    Attributes:
        record: what it says so far; None where it has no trials yet.
        held: whether a process works on it.
        problem: why there is no record.
        left: seconds until the search ends, where that is known.
    """

    record: Record | None = None
    held: bool = False
    problem: str = ""
    left: float | None = None
    version: int = 0

    @property
    def measured(self) -> int:
        """How many trials were measured."""
        trials = [] if self.record is None else self.record.trials
        return sum(trial.state != "running" for trial in trials)

    @property
    def asked(self) -> int:
        """How many trials the search was asked for; 0 where it ends by time."""
        if self.record is None or setting(self.record, "search", "time") is not None:
            return 0
        return int(setting(self.record, "search", "trials", default=0))

    @property
    def _is_measured(self) -> bool:
        """Whether as many trials were measured as were asked for."""
        return self.measured >= self.asked if self.asked else self.is_finished

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        return self.record is not None and bool(self.record.timing)

    @property
    def state(self) -> str:
        """What the run does now, in words."""
        count = (
            f"{self.measured} of {self.asked} trials" if self.asked else f"{self.measured} trials"
        )
        if self.record is None:
            count = "no trial yet"
        if self.held:
            ends = "" if self.left is None else f", about {formatting.duration(self.left)} left"
            return f"searching: {count}{ends}" if not self._is_measured else f"working: {count}"
        if self.is_finished and self._is_measured:
            return f"finished: {self.measured} trials"
        return f"stopped: {count}; it can be resumed"


class Watch:
    """One run folder, read again when it has changed, and no more often than that is cheap."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._sight = Sight()
        self._seen: tuple[object, ...] = ()
        self._next = 0.0
        self._rate: tuple[float, int] | None = (
            None  # when, and with how many trials, watching began
        )

    def look(self) -> Sight:
        """Return what the folder says now, or said a moment ago."""
        with self._lock:
            signs = tuple(_sign(self._folder / name) for name in (RECORD, journal.FILE))
            held, now = is_held(self._folder), time.monotonic()
            changed = signs != self._seen and now >= self._next
            if changed or held != self._sight.held:
                self._read(held, now, changed=changed)
                self._seen = signs if changed else self._seen
            return self._sight

    def _read(self, held: bool, now: float, *, changed: bool) -> None:
        before = self._sight
        record, problem = before.record, before.problem
        if changed:
            try:
                record, problem = run_so_far(self._folder), ""
            except InputError as error:
                record, problem = None, str(error)
            self._next = time.monotonic() + max(_SOONEST, _SHARE * (time.monotonic() - now))
        found = Sight(record, held, problem, None, before.version + 1)
        self._sight = Sight(record, held, problem, self._left(found, now), found.version)

    def _left(self, sight: Sight, now: float) -> float | None:
        """Estimate the seconds that a search goes on, by the trials measured while it was watched."""
        if not sight.held or not sight.asked:
            self._rate = None
            return None
        if self._rate is None:
            self._rate = (now, sight.measured)
        begun, first = self._rate
        gained = sight.measured - first
        return (sight.asked - sight.measured) * (now - begun) / gained if gained > 0 else None


def _sign(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
