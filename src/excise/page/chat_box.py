"""The part of a run's page in which its points are talked to, side by side, and their responses read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nicegui import ui

from excise.chat.conversation import Manner, Reply
from excise.chat.opened_run import Point
from excise.chat.sampling import Sampling
from excise.errors import RunStateError
from excise.page.styling import attempt, box, head, text
from excise.page.talking import Talker
from excise.report import formatting

_EVERY = 0.1  # seconds between two looks at what is said
_MOST = 3  # trials beside the original


class ChatBox:
    """A conversation, as one browser's page shows it; it lies in the `Talker`."""

    def __init__(self, talker: Talker, folder: Path, picked: Callable[[], int | None]) -> None:
        self._talker, self._folder, self._picked = talker, folder, picked
        self._trials: list[int] = []
        self._version = -1
        self._drawn: object = None
        self._live: list[Any] = []

    def build(self) -> None:
        """Add it to the page."""
        with box("Talk to it"):
            with ui.element("div").classes("line"):
                self._base = ui.checkbox("base", value=True)
                self._chips = ui.element("div").classes("line")
                ui.button("Add the point", on_click=lambda: attempt(self._add), color=None).props(
                    "outline"
                )
                ui.button(
                    "Read its responses", on_click=lambda: attempt(self._read), color=None
                ).props("outline")
            with ui.element("div").classes("line"):
                self._system = ui.input("System prompt (empty: the run's)").classes("grow")
                self._heat = ui.number("Temperature", value=0, min=0, max=5, step=0.1).classes(
                    "short"
                )
                self._limit = ui.number("Most tokens", value=200, min=1, precision=0).classes(
                    "short"
                )
                self._thinks = ui.checkbox("thinking")
            with ui.element("div").classes("line"):
                self._message = ui.input("Message").classes("grow")
                self._message.on("keydown.enter", lambda: attempt(self._say))
                self._buttons = [
                    ui.button("Say", on_click=lambda: attempt(self._say)),
                    ui.button("Again", on_click=lambda: self._talker.again(self._folder)),
                    ui.button("New", on_click=self._talker.clear),
                    ui.button("Save", on_click=lambda: attempt(self._save)),
                ]
                self._stop = ui.button(
                    "Stop the reply", on_click=self._talker.stop, color=None
                ).props("outline")
            self._does = text("", "faint").props("role=status")
            self._problem = text("", "problem").props("role=alert")
            self._talk = ui.element("div")
        ui.timer(_EVERY, self._hear)

    def _add(self) -> None:
        """Add the point that is picked to those that are talked to."""
        trial = self._picked()
        if trial is None:
            raise RunStateError("pick a point first")
        if trial not in self._trials:
            self._trials = [*self._trials, trial][-_MOST:]
            self._show_chips()

    def _show_chips(self) -> None:
        self._chips.clear()
        with self._chips:
            for trial in self._trials:
                words = f"trial {trial} ✕"
                button = ui.button(words, on_click=lambda _, t=trial: self._remove(t), color=None)
                button.props(f'flat dense aria-label="take trial {trial} away"')

    def _remove(self, trial: int) -> None:
        self._trials = [one for one in self._trials if one != trial]
        self._show_chips()

    def _say(self) -> None:
        if not self._trials and self._picked() is not None:
            self._add()
        points = [Point()] * bool(self._base.value) + [Point(trial) for trial in self._trials]
        sampling = Sampling(float(self._heat.value or 0), int(self._limit.value or 1))
        manner = Manner(self._system.value or None, bool(self._thinks.value), sampling)
        if not self._talker.now.does:
            self._talker.say(self._folder, points, self._message.value or "", manner)
            self._message.value = ""

    def _save(self) -> None:
        """Hand the conversation to the browser, a line of JSON per turn."""
        now = self._talker.now
        if now.folder != self._folder or not now.turns:
            raise RunStateError("nothing was said yet")
        lines = [json.dumps(turn.as_dict(), ensure_ascii=False) for turn in now.turns]
        ui.download.content("".join(f"{line}\n" for line in lines), "talk.jsonl")

    def _read(self) -> None:
        trial = self._picked()
        if trial is None:
            raise RunStateError("pick a point first")
        self._talker.read(self._folder, trial)

    # -- what was said -----------------------------------------------------------------------------

    def _hear(self) -> None:
        """Show what is said, where that has changed."""
        now = self._talker.now
        if now.version == self._version:
            return
        self._version = now.version
        mine = now.folder == self._folder
        busy = bool(now.does)
        self._does.text = f"{now.does} …" if busy and mine else "another run is talked to" * busy
        self._problem.text, self._problem.visible = now.problem, bool(now.problem)
        for button in self._buttons:
            button.set_enabled(not busy)
        self._stop.visible = busy
        state = (now.turns, now.message, len(now.replies), now.heard) if mine else None
        if state != self._drawn:
            self._drawn = state
            self._draw()
        for label, reply in zip(self._live, now.replies, strict=False):
            label.text = reply.text

    def _draw(self) -> None:
        now, self._live = self._talker.now, []
        self._talk.clear()
        if now.folder != self._folder:
            return
        with self._talk:
            if not now.turns and not now.message and not now.heard:
                text("Nothing was said yet. The original and up to three trials answer.", "faint")
            for turn in now.turns:
                self._turn(turn.message, turn.replies)
            if now.message:
                self._live = self._turn(now.message, now.replies)
            for heard in now.heard:
                text(f"{heard.side}: {heard.prompt}")
                with ui.element("div").classes("columns"):
                    for name, words in (
                        ("base", heard.before),
                        (f"trial {heard.trial}", heard.after),
                    ):
                        with ui.element("div").classes("box"):
                            head(3, name)
                            text(words)

    def _turn(self, message: str, replies: Sequence[Reply]) -> list[Any]:
        """Add a message with its replies; return the labels of their texts."""
        labels = []
        text(f"> {message}")
        with ui.element("div").classes("columns"):
            for reply in replies:
                with ui.element("div").classes("box reply"):
                    head(3, reply.name)
                    labels.append(text(reply.text))
                    with ui.expansion("First token"):
                        lines = (f"{formatting.percent(p)}  {token!r}" for token, p in reply.first)
                        text("\n".join(lines), "faint")
        return labels
