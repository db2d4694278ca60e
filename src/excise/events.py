"""Events that the library sends to its caller while it works. The library itself never prints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Event:
    """Base of all events."""

    def as_dict(self) -> dict[str, Any]:
        """Return the event as one JSON-ready object; `event` names its type."""
        return {"event": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class PhaseStarted(Event):
    """Start of a phase; `total` counts its steps where that is known."""

    phase: str
    total: int | None = None


@dataclass(frozen=True)
class Progress(Event):
    """Number of steps of a phase that are done.

    With `left`, the phase ends after so many seconds, and `total` is what it may come to by then.
    """

    phase: str
    done: int
    total: int | None = None
    left: float | None = None


@dataclass(frozen=True)
class PhaseEnded(Event):
    """End of a phase, which took `seconds`."""

    phase: str
    seconds: float


@dataclass(frozen=True)
class TrialMeasured(Event):
    """Scores of one trial of the search."""

    number: int
    scores: dict[str, float]
    on_front: bool


@dataclass(frozen=True)
class Notice(Event):
    """Message that the user should know and that stops nothing."""

    message: str


@dataclass(frozen=True)
class Finished(Event):
    """End of the run; `folder` holds its record."""

    folder: str


@dataclass(frozen=True)
class Result(Event):
    """Result of a command that is over: what it shows to people."""

    result: dict[str, Any]


OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Do nothing: an `OnEvent` for callers that want none."""
    del event


@contextmanager
def phase(name: str, on_event: OnEvent, total: int | None = None) -> Iterator[None]:
    """Report that a phase begins and, when it ends well, how long it took."""
    on_event(PhaseStarted(name, total))
    begun = time.perf_counter()
    yield
    on_event(PhaseEnded(name, time.perf_counter() - begun))


def at_most_every(seconds: float, on_event: OnEvent) -> OnEvent:
    """Return an `OnEvent` that passes on `Progress` at most every so many seconds, but for the last step.

    All other events are passed on.
    """
    last = -seconds

    def passed_on(event: Event) -> None:
        nonlocal last
        now = time.monotonic()
        if isinstance(event, Progress):
            if now - last < seconds and event.done != event.total:
                return
            last = now
        on_event(event)

    return passed_on


def track(items: Iterable[T], phase: str, total: int, on_event: OnEvent) -> Iterator[T]:
    """Yield `items` and report how many are done."""
    for done, item in enumerate(items, start=1):
        yield item
        on_event(Progress(phase, done, total))
