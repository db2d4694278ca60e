"""Events and records on a terminal: the only module that prints.

Progress goes to standard error, results to standard output, so that `--json` can be piped.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.panel import Panel
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
from rich.table import Table
from rich.text import Text

from excise import events, wording
from excise.record import Record, Scores, TrialRecord

if TYPE_CHECKING:
    from excise.reproduce import Reproduction

_NAMES = {
    "prompts": "Reading prompts",
    "load": "Loading the model",
    "capture": "Capturing residuals",
    "capture target": "  target prompts",
    "capture contrast": "  contrast prompts",
    "capture target writers": "  writers, target prompts",
    "capture contrast writers": "  writers, contrast prompts",
    "capture range": "  range of the writers' inputs",
    "capture responses": "  writers, responses",
    "capture prompts": "  writers, prompts of responses",
    "project": "Projecting residuals",
    "plan": "Finding the batch size",
    "baseline": "Measuring the original",
    "search": "Searching",
    "refine": "Refining",
    "holdout": "Measuring on the holdout",
    "export": "Exporting",
    "load edited": "Loading the edited model",
    "measure safetensors": "Measuring the edited model",
    "measure adapter": "Measuring the adapter",
    "push": "Uploading",
}
_VERBS = {"convert": "Converting to", "quantise": "Quantising to", "measure": "Measuring"}


# Names that leave room for figures in 80 columns.
_SHORT = {"drift_first": "first token", "restored": "restored", "kept": "kept"}


def _name(phase: str) -> str:
    """A phase as people read it; those of file types are named by their verb."""
    verb, _, kind = phase.partition(" ")
    return _NAMES.get(phase) or (f"{_VERBS[verb]} {kind}" if verb in _VERBS else phase)


class _Count(ProgressColumn):
    """Steps done, where there are steps to count."""

    def render(self, task: Task) -> Text:
        """'12/120', or nothing for a phase that is one step."""
        if task.total is None or task.total <= 1:
            return Text("")
        return Text(f"{task.completed:.0f}/{task.total:.0f}")


class _Rate(ProgressColumn):
    """Steps per minute, once some are done."""

    def render(self, task: Task) -> Text:
        """The rate of a task whose length is known."""
        if task.total is None or not task.speed:
            return Text("")
        return Text(f"{60 * task.speed:.0f}/min", style="dim")


class Reporter:
    """An `OnEvent` for people: bars on a terminal, plain lines elsewhere."""

    def __init__(self, *, quiet: bool = False, json_events: bool = False) -> None:
        self._quiet = quiet
        self._json = json_events
        self._console = Console(stderr=True)
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
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, event: events.Event) -> None:
        """Show one event."""
        if self._json:
            sys.stdout.write(json.dumps(event.as_dict()) + "\n")
            sys.stdout.flush()
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
            self._console.print(Text.assemble(("note ", "yellow"), event.message))
        elif isinstance(event, events.TrialMeasured) and event.on_front:
            self._best[event.number] = event.scores
            text = f"Searching  [dim]{len(self._best)} found on the front[/]"
            bars.update(self._task("search", None), description=text)

    def _task(self, phase: str, total: int | None) -> TaskID:
        bars = self._progress
        assert bars is not None
        if phase not in self._tasks:
            self._tasks[phase] = bars.add_task(_name(phase), total=total)
        return self._tasks[phase]

    def _line(self, event: events.Event) -> None:
        if isinstance(event, events.PhaseEnded):
            name = _name(event.phase).strip()
            self._plain(f"{name}: done in {wording.duration(event.seconds)}")
        elif isinstance(event, events.Progress) and event.phase == "search":
            self._plain(f"Searching: {event.done} of {event.total} trials")
        elif isinstance(event, events.Notice):
            self._plain(f"note: {event.message}")

    def _plain(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def say(text: str) -> None:
    """One line on standard output."""
    sys.stdout.write(text + "\n")


def complain(text: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"excise: {text}\n")


def show_json(data: Any) -> None:
    """Data for programs, on standard output."""
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


def show_result(record: Record, out: Path) -> None:
    """What a run found: the front, the choice, its figures, a few responses, and where things lie."""
    console = Console()
    console.print()
    console.print(front_table(record))
    console.print(figures_table(record))
    for panel in _samples(record):
        console.print(panel)
    console.print(_places(record, out))


def front_table(record: Record, *, most: int = 12) -> Table:
    """The front, thinned evenly when it is long; the selected trial is marked."""
    trials = [record.trial(number) for number in record.front]
    shown = _thin(trials, most, record.selected)
    of = f", {len(shown)} shown" if len(shown) < len(trials) else ""
    table = _table(f"Front: {len(trials)} of {len(record.trials)} trials{of}")
    table.add_column("trial", justify="right")
    names = list(dict.fromkeys([*record.objectives, "drift_first"]))
    for name in names:
        # One word to a line, so that the words at the end fit a line of 80 characters.
        table.add_column(_called(name).replace(" ", "\n"), justify="right", vertical="bottom")
    table.add_column("", style="dim")
    for trial in shown:
        mine = trial.number == record.selected
        words = wording.assess(trial.scores, record.baseline)
        table.add_row(
            f"{'* ' if mine else ''}{trial.number}",
            *(_value(name, trial.scores) for name in names),
            words.replace(" of the behaviour", "").removeprefix("makes "),
            style="bold" if mine else "",
        )
    return table


def figures_table(record: Record) -> Table:
    """The chosen edit beside the original, on search and on holdout prompts."""
    number = record.chosen().number
    table = _table(f"\nChosen: trial {number} by {record.selection}")
    table.add_column("")
    for heading in ("original", "edited (95 %)"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", style="dim")
    chosen = record.chosen().scores
    parts: list[tuple[str, Scores, Scores]] = [
        ("on search prompts", record.baseline | record.final_baseline, chosen | record.final),
        ("on holdout prompts", record.holdout_baseline, record.holdout),
    ]
    for where, before, after in parts:
        if after:
            table.add_row(Text(where, style="dim"))
        for name, score in after.items():
            n = wording.sample(name, score)
            row = _value(name, before), wording.measured(name, score), n
            table.add_row(f"  {_called(name)}", *row)
            for group, part in (score.parts or {}).items():
                old = (before[name].parts or {}).get(group) if name in before else None
                was = "–" if old is None else wording.number(name, old.value)
                now = wording.measured(name, part)
                table.add_row(Text(f"    {group}"), was, now, wording.sample(name, part))
    return table


def _called(name: str) -> str:
    """A score's name at the head of a column or a row."""
    return _SHORT.get(name, wording.title(name).lower())


def _table(title: str | None = None, *, header: bool = True) -> Table:
    """A table without lines: columns two spaces apart."""
    return Table(
        title=title,
        title_justify="left",
        show_header=header,
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )


def _samples(record: Record) -> list[Panel]:
    panels = []
    for sample in record.samples[:3]:
        lines = [
            Text.assemble(("before  ", "dim"), sample.before or "(empty)"),
            Text.assemble(("after   ", "dim"), sample.after or "(empty)"),
        ]
        if sample.answer is not None:
            lines.append(Text.assemble(("truth   ", "dim"), sample.answer))
        title = Text(sample.prompt, style="bold")
        panels.append(Panel(Group(*lines), title=title, title_align="left", border_style="dim"))
    return panels


def _places(record: Record, out: Path) -> Table:
    table = _table(header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for artifact in record.artifacts:
        name = "edited model" if artifact.format == "safetensors" else artifact.format
        table.add_row(name, Text(str(out / artifact.path)))
        table.add_row(f"{name}'s card", Text(str(out / artifact.path / "README.md")))
    table.add_row("report", Text(str(out / "report.html")))
    table.add_row("record", Text(str(out / "record.json")))
    return table


def comparison_table(rows: list[tuple[str, Scores, Scores]]) -> Table:
    """(set, original's scores, edited model's scores) as a table."""
    table = _table()
    for heading in ("", "original", "edited", "on"):
        table.add_column(heading, justify="left" if heading in ("", "on") else "right")
    for where, before, after in rows:
        for name, score in after.items():
            table.add_row(
                wording.title(name),
                wording.measured(name, before.get(name)),
                wording.measured(name, score),
                f"{where}, {wording.sample(name, score)}",
            )
    return table


_GEOMETRY = {
    "layer": "layer",
    "target_norm": "target norm",
    "contrast_norm": "contrast norm",
    "difference_norm": "difference",
    "cosine": "cosine",
    "silhouette": "silhouette",
    "auc": "AUC",
    "effective_rank": "rank",
}


def geometry_table(layers: list[dict[str, float]]) -> Table:
    """What `excise geometry` found, a row per layer."""
    table = _table()
    for heading in _GEOMETRY.values():
        table.add_column(heading, justify="right")
    for row in layers:
        values = (row[key] for key in _GEOMETRY if key != "layer")
        table.add_row(f"{row['layer']:.0f}", *(wording.significant(value) for value in values))
    return table


def show_reproduction(found: Reproduction) -> None:
    """What `excise reproduce` found: hashes, what differs and whether it matters, the verdict."""
    table = _table()
    for heading in ("", "record", "now", ""):
        table.add_column(heading)
    for one in found.rebuilt:
        words = "not on the record" if one.then is None else "same bytes"
        words = words if one.same else "other bytes"
        table.add_row(one.format, (one.then or "–")[:12], one.now[:12], words)
    for part in found.differences:
        words = "can change weights" if part.matters else "cannot change weights"
        table.add_row(Text(part.what), Text(part.then), Text(part.now), words)
    Console().print(table)
    for name in found.left_out:
        say(f"{name}: not rebuilt; `excise export --format {name}` writes it from the run")
    say(found.verdict)


def show(table: Table) -> None:
    """A table on standard output."""
    Console().print(table)


def _thin(trials: list[TrialRecord], most: int, always: int | None) -> list[TrialRecord]:
    if len(trials) <= most:
        return trials
    step = (len(trials) - 1) / (most - 1)
    kept = {round(i * step) for i in range(most)}
    return [t for i, t in enumerate(trials) if i in kept or t.number == always]


def _value(name: str, scores: Scores) -> str:
    return wording.number(name, scores[name].value) if name in scores else "–"
