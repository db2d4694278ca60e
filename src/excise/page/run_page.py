"""The page of one run: its front as it grows, what it does now, a point looked at, talked to, exported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nicegui import run, ui

from excise.errors import RunStateError
from excise.files import CARD
from excise.formats import FORMATS
from excise.page import drawing
from excise.page.chat_box import ChatBox
from excise.page.places import Place
from excise.page.shelf import Shelf
from excise.page.styling import attempt, box, head, text, top
from excise.page.watching import Sight
from excise.reading import read_text
from excise.record import Record, TrialRecord
from excise.report import formatting
from excise.report.figures import importance_figure, profile_figure
from excise.report.views import score_names, shape

_EVERY = 1.0  # seconds between two looks
_TRIALS_A_SECOND = 300  # figures of more trials are drawn less often
_POINT = re.compile(r"<b>trial (\d+)</b>")


class RunPage:
    """A run, as one browser's page shows it."""

    def __init__(self, shelf: Shelf, key: str) -> None:
        self._shelf, self._key = shelf, key
        self._place: Place
        self._sight = Sight()
        self._shown = -1
        self._wait = 0
        self._trial: int | None = None
        self._exports = -1

    def build(self) -> None:
        """Make the page."""
        try:
            self._place = self._shelf.places.run(self._key)
        except RunStateError as error:
            top("No such run")
            text(str(error), "problem").props("role=alert")
            return
        top(self._place.name)
        self._state = text("reading the run …").props("role=status")
        self._problem = text("", "problem").props("role=alert")
        self._problem.visible = False
        self._control()
        with ui.element("div").classes("pair"):
            with box("Front"):
                self._front = ui.plotly(drawing.front(None))
                self._front.on("plotly_click", self._click)
            with box("Point"):
                with ui.element("div").classes("line"):
                    self._choice = ui.select({}, label="On the front").classes("grow")
                    self._choice.on_value_change(lambda e: self._pick(e.value))
                    self._number = ui.number("Any trial", min=0, precision=0).classes("grow")
                    self._number.on_value_change(lambda e: self._pick(e.value))
                self._detail = ui.element("div")
        self._chat = ChatBox(self._shelf.talker, self._place.folder, lambda: self._trial)
        self._chat.build()
        self._exporting()
        with ui.element("div").classes("pair"):
            with box("History"):
                self._history = ui.plotly(drawing.drawn(None))
            with box("Importance of parameters"):
                self._importance = ui.element("div")
        ui.timer(_EVERY, self._look)

    # -- what the run does -------------------------------------------------------------------------

    def _control(self) -> None:
        with ui.element("div").classes("line"):
            self._stop = ui.button("Stop", on_click=self._stop_job, color=None).props("outline")
            self._trials = ui.number("Trials in all", min=1, precision=0)
            self._resume = ui.button("Resume", on_click=lambda: attempt(self._resume_job))
            self._stop.visible = False

    def _stop_job(self) -> None:
        job = self._shelf.jobs.last(self._place.folder)
        if job is not None:
            job.stop()

    def _resume_job(self) -> None:
        self._shelf.resume(self._place, self._trials.value)

    async def _look(self) -> None:
        """Show what the run does now, and its figures where they have changed."""
        sight = await run.io_bound(self._shelf.watch(self._place).look)
        if sight is None:  # the server is ending
            return
        job = self._shelf.jobs.last(self._place.folder)
        mine = job is not None and job.runs
        self._state.text = (
            sight.state if job is None or not mine else f"{sight.state} · {job.state}"
        )
        problem = "" if job is None or mine or job.code == 0 else f"{job.verb}: {job.state}"
        if sight.record is None and not mine and not sight.held:
            problem = problem or sight.problem
        self._problem.text, self._problem.visible = problem, bool(problem)
        self._stop.visible = mine
        self._resume.visible = self._trials.visible = not mine and not sight.held
        self._wait -= 1
        if sight.version != self._shown and self._wait <= 0:
            self._shown, self._sight = sight.version, sight
            if sight.record is not None:
                self._show(sight.record)
                self._wait = len(sight.record.trials) // _TRIALS_A_SECOND

    def _show(self, record: Record) -> None:
        self._front.update_figure(drawing.front(record))
        self._history.update_figure(drawing.history(record))
        if not self._trials.value:
            self._trials.value = self._sight.asked or None
        self._choice.set_options({n: _called(record.trial(n)) for n in record.front})
        if self._trial is None and record.selected is not None:
            self._pick(record.selected)
        self._importance.clear()
        with self._importance:
            if record.importance:
                ui.plotly(drawing.drawn(importance_figure(record.importance)))
            else:
                text("It is known when the run ends.", "faint")
        self._show_exports(record)

    # -- a point -----------------------------------------------------------------------------------

    def _click(self, event: Any) -> None:
        points = event.args.get("points") if isinstance(event.args, dict) else None
        match = _POINT.search(str(points[0].get("hovertext", ""))) if points else None
        if match is not None:
            self._pick(int(match[1]))

    def _pick(self, number: Any) -> None:
        """Show a trial, where there is such a one."""
        record = self._sight.record
        if record is None or not isinstance(number, int | float) or number == self._trial:
            return
        if not 0 <= number < len(record.trials):
            ui.notify(f"There is no trial {number:g}.", type="warning")
            return
        self._trial = int(number)
        self._number.value = self._trial
        if self._trial in record.front:
            self._choice.value = self._trial
        self._detail.clear()
        with self._detail:
            self._describe(record, record.trial(self._trial))

    def _describe(self, record: Record, trial: TrialRecord) -> None:
        head(3, f"Trial {trial.number}: {trial.reason or trial.state}")
        with ui.element("div").classes("figures"):
            for words in ("", "original", "edited (95 %)"):
                text(words, "faint")
            for name in score_names(record.objectives, trial.scores):
                before = record.baseline.get(name)
                text(formatting.heading(name))
                text("–" if before is None else formatting.number(name, before.value))
                text(formatting.measured(name, trial.scores[name]))
        drawn = shape(record, trial)
        if drawn is not None:
            ui.plotly(drawing.drawn(profile_figure(drawn)))
        with ui.expansion("Parameters"):
            text("\n".join(f"{k}: {formatting.parameter(v)}" for k, v in trial.params.items()))
        if trial.number == record.selected and record.samples:
            with ui.expansion("Responses before and after"):
                for sample in record.samples:
                    text(sample.prompt)
                    text(f"before: {sample.before}\nafter: {sample.after}", "faint")

    # -- exports -----------------------------------------------------------------------------------

    def _exporting(self) -> None:
        with box("Export"):
            with ui.element("div").classes("line"):
                formats = {name: form.label for name, form in FORMATS.items()}
                form = ui.select(formats, label="Format", value=next(iter(formats))).classes("grow")
                name = ui.input("Name of its folder").classes("grow")

                def start() -> None:
                    if self._trial is None:
                        raise RunStateError("pick a point first")
                    self._shelf.export(self._place, self._trial, form.value, name.value)

                ui.button("Export the point", on_click=lambda: attempt(start))
            self._artifacts = ui.element("div")

    def _show_exports(self, record: Record) -> None:
        if len(record.artifacts) == self._exports:
            return
        self._exports = len(record.artifacts)
        self._artifacts.clear()
        with self._artifacts:
            for artifact in record.artifacts:
                with ui.element("div").classes("line"):
                    text(f"trial {artifact.trial} as {artifact.format}: {artifact.path}")
                    card = self._place.folder / artifact.path / CARD
                    label = f"Card of {Path(artifact.path).name}"
                    ui.button(label, on_click=lambda _, c=card: attempt(lambda: self._open(c)))

    def _open(self, card: Path) -> None:
        """Show a card's text; a record may name any path, so it must lie in the folders that are shown."""
        if not self._shelf.places.within(card):
            raise RunStateError("this export lies outside of the folders that are shown")
        words = read_text(card, "card", RunStateError)
        with ui.dialog() as dialog, ui.card():
            text(words)
            ui.button("Close", on_click=dialog.close)
        dialog.open()


def _called(trial: TrialRecord) -> str:
    scores = (formatting.number(name, score.value) for name, score in trial.scores.items())
    return f"trial {trial.number}: {', '.join(list(scores)[:2])}"
