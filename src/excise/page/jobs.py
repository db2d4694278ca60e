"""Commands that a page starts: children of its process, which tell it of their progress as JSON lines.

A child ends with the page's process, however that ends; what a run has measured by then is kept, and
`resume` goes on. Closing the page in the browser ends nothing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from excise.children import Child
from excise.errors import EXIT_DONE, EXIT_INTERRUPTED, RunStateError
from excise.report import formatting
from excise.visible import one_line

_PATIENCE = 20.0  # seconds that a child has to end by itself, once it was asked to
_MOST_NOTES = 20


class Job:
    """One command; start it in the main thread, as it ends with the thread that started it.

    Attributes:
        verb: "run", "resume", "export".
        notes: what it said that stops nothing.
        code: its exit code, once it has ended.
    """

    def __init__(self, verb: str, arguments: Sequence[str]) -> None:
        self.verb = verb
        self.notes: list[str] = []
        self.code: int | None = None
        self._phase, self._done, self._total = "starting", 0, 0
        self._began = time.monotonic()
        self._error = ""
        command = [sys.executable, "-P", "-m", "excise.cli", verb, *arguments, "--json-events"]
        self._child = Child(command, f"excise {verb}", talks=True)
        self._thread = threading.Thread(target=self._follow, name="excise-job", daemon=True)
        self._thread.start()

    @property
    def runs(self) -> bool:
        """Whether it still works."""
        return self.code is None

    @property
    def state(self) -> str:
        """What it does, in words, or how it ended."""
        if self.code is None:
            done, total = self._done, self._total
            count = f": {done} of {total}" if total > 1 else ""
            left = ""
            if 0 < done < total:
                seconds = (time.monotonic() - self._began) * (total - done) / done
                left = f", about {formatting.duration(seconds)} left"
            return f"{formatting.phase_words(self._phase)}{count}{left}"
        words = {EXIT_DONE: "done", EXIT_INTERRUPTED: "stopped; what was finished is kept"}
        return words.get(self.code) or self._error or f"ended with exit code {self.code}"

    def stop(self) -> None:
        """Ask it to end with its state kept; end it where it does not."""
        if self.code is None and self._child.process.poll() is None:
            os.kill(self._child.process.pid, signal.SIGTERM)
            timer = threading.Timer(_PATIENCE, self.kill)
            timer.daemon = True
            timer.start()

    def kill(self) -> None:
        """End it now."""
        if self.code is None:
            self._child.process.kill()

    def _follow(self) -> None:
        """Read what it tells until it ends."""
        pipe = self._child.process.stdout
        assert pipe is not None
        for line in pipe:
            try:
                event = json.loads(line)
            except ValueError:  # what a library prints
                continue
            if isinstance(event, dict):
                self._hear(event)
        code = self._child.process.wait()
        tail = self._child.stderr_tail().strip().splitlines()
        self._error = one_line(tail[-1]).removeprefix("excise: ") if tail else ""
        self._child.stop()
        self.code = code

    def _hear(self, event: dict[str, Any]) -> None:
        kind = event.get("event")
        if kind == "PhaseStarted" or (kind == "Progress" and event["phase"] != self._phase):
            if self._phase == "search" and event["phase"] in ("responses", "passes"):
                return  # a search counts its trials
            self._phase, self._began = str(event["phase"]), time.monotonic()
            self._done, self._total = 0, int(event.get("total") or 0)
        if kind == "Progress":
            self._done, self._total = int(event["done"]), int(event.get("total") or 0)
        elif kind == "Notice":
            self.notes = [*self.notes, one_line(str(event["message"]))][-_MOST_NOTES:]


class Jobs:
    """The last job of each run folder."""

    def __init__(self) -> None:
        self._last: dict[Path, Job] = {}

    def start(self, folder: Path, verb: str, arguments: Sequence[str]) -> Job:
        """Start a command that works on a run folder.

        Raises:
            RunStateError: another one works on it.
        """
        if self.runs(folder):
            raise RunStateError("something works on this run already: wait for it or stop it")
        self._last[folder] = job = Job(verb, arguments)
        return job

    def last(self, folder: Path) -> Job | None:
        """Return the job of a folder that was started last."""
        return self._last.get(folder)

    def without(self, folders: Iterable[Path]) -> list[tuple[Path, Job]]:
        """Return the jobs of all other folders: runs that have not begun, or failed before that."""
        there = set(folders)
        return [(folder, job) for folder, job in self._last.items() if folder not in there]

    def runs(self, folder: Path) -> bool:
        """Return whether a job works on a folder."""
        job = self._last.get(folder)
        return job is not None and job.runs

    def stop_all(self) -> None:
        """End all of them; runs can be resumed."""
        for job in self._last.values():
            job.stop()
        end = time.monotonic() + _PATIENCE
        for job in self._last.values():
            while job.runs and time.monotonic() < end:
                time.sleep(0.05)
            job.kill()
