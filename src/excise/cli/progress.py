"""Events on standard error: bars on a terminal, plain lines elsewhere, JSON lines for programs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from excise import events
from excise.cli import terminal
from excise.report import formatting
from excise.visible import one_line, visible

_NOTE = 2000  # characters of a note
EVERY = 30.0  # seconds after which a line says that the work goes on, where nothing else did


def _name(phase: str) -> str:
    return visible(formatting.phase_words(phase))


class _Count(ProgressColumn):
    """Column of the steps that are done, where there are steps to count."""

    def render(self, task: Task) -> Text:
        """Return '12/120', or nothing for a phase of one step."""
        if task.total is None or task.total <= 1:
            return Text("")
        return Text(f"{task.completed:.0f}/{task.total:.0f}")


class _Rate(ProgressColumn):
    """Column of the steps per minute, once some are done."""

    def render(self, task: Task) -> Text:
        """Return the rate of a task whose length is known."""
        if task.total is None or not task.speed:
            return Text("")
        return Text(f"{60 * task.speed:.0f}/min", style="dim")


class Reporter:
    """An `OnEvent` for people: bars on a terminal, plain lines elsewhere."""

    def __init__(self, *, quiet: bool = False, json_events: bool = False) -> None:
        self._quiet = quiet
        self._json = json_events
        self._console = Console(file=terminal.errors())
        self._pulse = _Pulse(self._plain)
        self._tasks: dict[str, TaskID] = {}
        self._progress: Progress | None = None
        self._best: dict[int, dict[str, float]] = {}
        if not quiet and not json_events and self._console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(finished_text="[green]✓"),
                TextColumn("{task.description}"),
                BarColumn(bar_width=16),
                _Count(),
                _Rate(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )

    def __enter__(self) -> Reporter:
        if self._progress is not None:
            self._progress.start()
        elif not self._quiet and not self._json:
            self._pulse.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._pulse.stop()
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, event: events.Event) -> None:
        """Show one event."""
        if self._json:
            terminal.show_json(event.as_dict(), indent=None)
        elif not self._quiet:
            self._bar(event) if self._progress is not None else self._line(event)

    def _bar(self, event: events.Event) -> None:
        bars = self._progress
        assert bars is not None
        if isinstance(event, events.PhaseStarted):
            self._task(event.phase, event.total)
        elif isinstance(event, events.Progress):
            bars.update(self._task(event.phase, event.total), completed=event.done)
        elif isinstance(event, events.PhaseEnded):
            task = self._task(event.phase, None)
            total = bars.tasks[bars.task_ids.index(task)].total or 1
            bars.update(task, total=total, completed=total)
        elif isinstance(event, events.Notice):
            self._console.print(Text.assemble(("note ", "yellow"), one_line(event.message, _NOTE)))
        elif isinstance(event, events.TrialMeasured) and event.on_front:
            self._best[event.number] = event.scores
            text = f"Searching  [dim]{len(self._best)} found on the front[/]"
            bars.update(self._task("search", None), description=text)

    def _task(self, phase: str, total: int | None) -> TaskID:
        bars = self._progress
        assert bars is not None
        if phase not in self._tasks:
            indent = "  " if phase.startswith("capture ") else ""
            self._tasks[phase] = bars.add_task(f"{indent}{escape(_name(phase))}", total=total)
        return self._tasks[phase]

    def _line(self, event: events.Event) -> None:
        self._pulse.heard(event)
        if isinstance(event, events.PhaseEnded):
            name = _name(event.phase)
            self._plain(f"{name}: done in {formatting.duration(event.seconds)}")
        elif isinstance(event, events.Progress) and event.phase == "search":
            self._plain(f"Searching: {event.done} of {event.total} trials")
        elif isinstance(event, events.Notice):
            self._plain(f"note: {one_line(event.message, _NOTE)}")

    def _plain(self, text: str) -> None:
        self._pulse.spoken()
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class _Pulse:
    """A line every half minute for as long as nothing else is said: which phase it is, what is left."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._phases: dict[str, float] = {}  # those that run, innermost last, and when they began
        self._steps: events.Progress | None = None
        self._turn = self._heard = self._spoken = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="excise-pulse", daemon=True)

    def start(self) -> None:
        """Begin to say it."""
        self._thread.start()

    def stop(self) -> None:
        """Say no more."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def spoken(self) -> None:
        """Note that a line was just printed."""
        self._spoken = time.monotonic()

    def heard(self, event: events.Event) -> None:
        """Note which phase runs, and how far it is."""
        now = time.monotonic()
        if isinstance(event, events.PhaseStarted | events.PhaseEnded):
            self._phases.pop(event.phase, None)
            if isinstance(event, events.PhaseStarted):
                self._phases[event.phase] = now
            self._steps, self._turn = None, now
        elif isinstance(event, events.Progress):
            if self._steps is not None and self._steps.phase != event.phase:
                self._turn = self._heard  # these steps began when the others ended
            self._steps = event
        self._heard = now

    def _beat(self) -> None:
        while not self._end.wait(max(0.0, self._spoken + EVERY - time.monotonic())):
            if time.monotonic() >= self._spoken + EVERY:
                self.spoken()
                running = list(self._phases.items())
                if running:
                    self._say(self._still(*running[-1]))

    def _still(self, phase: str, begun: float) -> str:
        steps, now, name = self._steps, time.monotonic(), _name(phase)
        if steps is None or not steps.total or not 0 < steps.done < steps.total:
            return f"{name}: {formatting.duration(now - begun)} so far"
        inner = "" if steps.phase == phase else f", {_name(steps.phase)}"
        left = formatting.duration((now - self._turn) * (steps.total - steps.done) / steps.done)
        return f"{name}{inner}: {steps.done} of {steps.total}, about {left} left"
