"""The first page: all runs there are, a form that starts one, and runs compared."""

from __future__ import annotations

from typing import Any, get_args

from nicegui import run, ui

from excise.config import MethodName, behaviours
from excise.errors import RunStateError
from excise.page import drawing
from excise.page.places import Place
from excise.page.shelf import Shelf
from excise.page.styling import attempt, box, text, top
from excise.page.watching import Sight
from excise.report import formatting
from excise.report.views import evidence, score_names

_EVERY = 2.0  # seconds between two looks
_MOST = 12  # runs that are compared


class FrontPage:
    """The list of runs, as one browser's page shows it."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._shown: list[str] | None = None
        self._words: dict[str, tuple[Any, Any]] = {}  # of each run's row: what it is, and does
        self._picked: set[str] = set()
        self._list: Any = None

    def build(self) -> None:
        """Make the page."""
        top("Runs", home=False)
        with box("Runs here"):
            self._list = ui.element("div")
            self._begun = text("", "faint").props("role=status")
            ui.button("Compare those that are ticked", on_click=self._compare, color=None).props(
                "outline"
            )
        self._form()
        ui.timer(_EVERY, self._look)

    async def _look(self) -> None:
        """Show the runs there are now, where that has changed."""
        seen = await run.io_bound(self._seen)
        if seen is None:  # the server is ending
            return
        keys = [place.key for place, _ in seen]
        if keys != self._shown:  # else rows stay, and with them where the keyboard is
            self._shown, self._words = keys, {}
            self._list.clear()
            with self._list:
                if not seen:
                    text("No runs yet: start one below, or with `excise run`.", "faint")
                for place, _ in seen:
                    self._row(place)
        for place, sight in seen:
            what, does = self._words[place.key]
            if sight.record is not None:
                parts = (sight.record.behaviour, sight.record.method, sight.record.model.source)
                what.text = " · ".join(filter(None, parts))
            does.text = self._job_words(place) or sight.state
        begun = self._shelf.jobs.without(place.folder for place, _ in seen)
        self._begun.text = "\n".join(f"{folder.name}: {job.state}" for folder, job in begun)

    def _seen(self) -> list[tuple[Place, Sight]]:
        places = self._shelf.places.runs().values()
        return [(place, self._shelf.watch(place).look()) for place in places]

    def _job_words(self, place: Place) -> str:
        job = self._shelf.jobs.last(place.folder)
        return "" if job is None or not job.runs else job.state

    def _row(self, place: Place) -> None:
        with ui.element("div").classes("line"):
            ticked = ui.checkbox(value=place.key in self._picked)
            ticked.props["aria-label"] = f"compare {place.name}"
            ticked.on_value_change(lambda e: self._tick(place.key, on=e.value))
            ui.link(place.name, f"/run/{place.key}")
            self._words[place.key] = (text("", "faint"), text(""))

    def _tick(self, key: str, *, on: bool) -> None:
        (self._picked.add if on else self._picked.discard)(key)

    def _compare(self) -> None:
        if len(self._picked) < 2:
            ui.notify("Tick two runs or more.", type="warning")
            return
        ui.navigate.to(f"/compare?runs={','.join(sorted(self._picked))}")

    def _form(self) -> None:
        """Add the form that starts a search."""
        with box("Start a search"), ui.element("div").classes("line"):
            name = ui.input("Name of the run").classes("grow")
            model = ui.input("Model", value="demo").classes("grow")
            behaviour = ui.select(list(behaviours()), label="Behaviour", value="demo").classes(
                "grow"
            )
            methods = {"": "default", **{method: method for method in get_args(MethodName)}}
            method = ui.select(methods, label="Method", value="").classes("grow")
            trials = ui.number("Trials", value=120, min=1, precision=0).classes("grow")

            def start() -> None:
                values = (name.value, model.value, behaviour.value, method.value, trials.value)
                self._shelf.begin(*values)
                ui.notify("Started; it appears above once it has read its model.", type="positive")

            ui.button("Start", on_click=lambda: attempt(start))

    # -- comparison --------------------------------------------------------------------------------

    def build_comparison(self, runs: str) -> None:
        """Make the page that compares the runs of these keys."""
        top("Comparison")
        found = {}
        try:
            for key in list(dict.fromkeys(runs.split(",")))[:_MOST]:
                place = self._shelf.places.run(key)
                record = self._shelf.watch(place).look().record
                if record is not None and record.front:
                    found[place.name] = record
        except RunStateError as error:
            text(str(error), "problem").props("role=alert")
            return
        if not found:
            text("None of these runs has measured a trial yet.", "problem").props("role=alert")
            return
        with box("Fronts"):
            ui.plotly(drawing.compared(found))
        with box("What each selected"):
            for name, record in found.items():
                trial = record.chosen()
                shown = evidence(record, trial)
                scores = ", ".join(
                    f"{formatting.inline(score)} {formatting.measured(score, shown.after[score])}"
                    for score in score_names(record.objectives, shown.after)
                )
                text(f"{name}: trial {trial.number} on {shown.name} prompts: {scores}")
