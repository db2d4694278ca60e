"""Events on standard error: bars on a terminal, plain lines elsewhere, JSON lines for programs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

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

_WITHIN = ("responses", "passes")  # what measuring is made of


def _name(phase: str) -> str:
    return visible(formatting.phase_words(phase))


def _searching(event: events.Progress) -> str:
    """Say how far a search is: by trials, or by its time."""
    if event.left is None:
        return f"Searching: {event.done} of {event.total} trials"
    trials = formatting.count(event.done, "trial")
    if event.done == event.total:
        return f"Searching: {trials}, no time for another batch"
    return f"Searching: {trials} of about {event.total:,}, {formatting.duration(event.left)} left"


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
        self._searching = False
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
        if isinstance(event, events.PhaseStarted | events.PhaseEnded) and event.phase == "search":
            self._searching = isinstance(event, events.PhaseStarted)
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
            if event.phase in _WITHIN and self._searching:
                return  # a search counts its trials
            task = self._task(event.phase, event.total)
            if event.done < bars.tasks[bars.task_ids.index(task)].completed:
                bars.reset(task)  # the same kind of work once more
            bars.update(task, completed=event.done, total=event.total)
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
            indent = "  " if phase.startswith("capture ") or phase in _WITHIN else ""
            self._tasks[phase] = bars.add_task(f"{indent}{escape(_name(phase))}", total=total)
        return self._tasks[phase]

    def _line(self, event: events.Event) -> None:
        self._pulse.heard(event)
        if isinstance(event, events.PhaseEnded):
            name = _name(event.phase)
            self._plain(f"{name}: done in {formatting.duration(event.seconds)}")
        elif isinstance(event, events.Progress) and event.phase == "search":
            self._plain(_searching(event))
        elif isinstance(event, events.Notice):
            self._plain(f"note: {one_line(event.message, _NOTE)}")

    def _plain(self, text: str) -> None:
        self._pulse.spoken()
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class _Steps:
    """Steps that are done, of how many, and when the first began; a `total` of 0 is not known."""

    done: int
    total: int
    begun: float


class _Pulse:
    """A line every half minute for as long as nothing else is said: which phase it is, what is left."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._phases: dict[str, float] = {}  # those that run, innermost last, and when they began
        self._steps: dict[str, _Steps] = {}  # by what they are of, those heard of last at the end
        self._heard = self._spoken = time.monotonic()
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
            self._steps = {name: s for name, s in self._steps.items() if name in self._phases}
        elif isinstance(event, events.Progress):
            known = self._steps.pop(event.phase, None)
            # Steps of a phase began with it, others when what came before ended.
            begun = self._phases.get(event.phase, self._heard)
            if known is not None and known.done <= event.done:
                begun = known.begun
            self._steps[event.phase] = _Steps(event.done, event.total or 0, begun)
        self._heard = now

    def _beat(self) -> None:
        while not self._end.wait(max(0.0, self._spoken + EVERY - time.monotonic())):
            if time.monotonic() >= self._spoken + EVERY:
                self.spoken()
                running = dict(self._phases)
                if running:
                    self._say(self._still(running, dict(self._steps)))

    def _still(self, running: dict[str, float], counted: dict[str, _Steps]) -> str:
        """Say what is left of the outermost phase whose steps are counted, else of what is within."""
        now, phase = time.monotonic(), list(running)[-1]
        for name in [*running, *reversed(counted)]:
            steps = counted.get(name)
            if steps is None or not 0 < steps.done < steps.total:
                continue
            outer = _name(name if name in running else phase)
            inner = "" if name in running else f", {_name(name)}"
            left = formatting.duration(
                (now - steps.begun) * (steps.total - steps.done) / steps.done
            )
            return f"{outer}{inner}: {steps.done} of {steps.total}, about {left} left"
        return f"{_name(phase)}: {formatting.duration(now - running[phase])} so far"
