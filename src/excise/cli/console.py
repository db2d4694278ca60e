"""Records on a terminal: tables and panels, of texts that others wrote."""

from __future__ import annotations

import io
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from excise.cli import terminal
from excise.files import CARD
from excise.formats import FORMATS
from excise.record import Record, Scores, TrialRecord
from excise.report import formatting
from excise.report.views import large_groups
from excise.visible import visible

if TYPE_CHECKING:
    from excise.runs.reproduce import Reproduction

_MOST_GROUPS = 4  # of a score, that have a row each

# Names that leave room for figures in 80 columns.
_SHORT = {
    "drift": "KL (full response)",
    "false_rate": "where it should not",
    "restored": "accuracy, target",
    "kept": "accuracy, contrast",
}


def show_result(record: Record, out: Path) -> None:
    """Show what a run found: front, chosen trial, its figures, a few responses, paths."""
    figures = [front_table(record), figures_table(record)]
    show("", *figures, *judge_lines(record), *_samples(record), _places(record, out))


def judge_lines(record: Record) -> list[Text]:
    """Return who judged the responses, if not markers, and how far to believe it."""
    if record.judge is None:
        return []
    return [Text(visible(formatting.judge_words(record.judge)) + "\n", style="dim")]


def show(*parts: RenderableType) -> None:
    """Print tables and panels on standard output."""
    like = Console()  # how standard output takes colours and lines
    page = _Page()
    console = Console(
        file=page, width=like.width, force_terminal=like.is_terminal, no_color=like.no_color
    )
    for part in parts:
        console.print(part)
    terminal.out(page.getvalue())


class _Page(io.StringIO):
    """Text for standard output, drawn with the characters that it has."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Standard output's."""
        return terminal.encoding()


def _row(table: Table, *cells: str | Text, style: str = "") -> None:
    """Add a row of these texts as they are: what looks like markup is none."""
    texts = [cell if isinstance(cell, Text) else Text(visible(cell)) for cell in cells]
    table.add_row(*texts, style=style)


def front_table(record: Record, *, most: int = 12) -> Table:
    """Return the front as a table, thinned evenly when it is long; the selected trial is marked."""
    trials = [record.trial(number) for number in record.front]
    shown = _thin(trials, most, record.selected)
    of = f", {len(shown)} shown" if len(shown) < len(trials) else ""
    table = _table(f"Pareto front: {len(trials)} of {len(record.trials)} trials{of}")
    table.add_column("trial", justify="right")
    known = any(trial.front_probability is not None for trial in shown)
    names = list(dict.fromkeys([*record.objectives, *([] if known else ["drift_first"])]))
    for name in names:
        # Narrow, so that the words at the end fit a line of 80 characters.
        head = Text("\n".join(wrap(visible(_called(name)), 9, break_long_words=False)))
        table.add_column(head, justify="right", vertical="bottom")
    if known:
        table.add_column(Text("on the\nfront"), justify="right", vertical="bottom")
    table.add_column("", style="dim")
    for trial in shown:
        mine = trial.number == record.selected
        words = formatting.assess(trial.scores, record.baseline)
        _row(
            table,
            f"{'* ' if mine else ''}{trial.number}",
            *(_value(name, trial.scores) for name in names),
            *([formatting.chance(trial)] if known else []),
            words.replace(" of the behaviour", "").removeprefix("makes "),
            style="bold" if mine else "",
        )
    return table


def figures_table(record: Record) -> Table:
    """Return the chosen edit beside the original, on search and on holdout prompts."""
    number = record.chosen().number
    table = _table(f"\nChosen: trial {number} by {visible(record.selection)}")
    table.add_column("")
    for heading in ("original", "edited (95 %)"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", style="dim")
    chosen = record.chosen().scores
    parts: list[tuple[str, Scores, Scores]] = [
        ("on search prompts", record.baseline | record.final_baseline, chosen | record.final),
        ("on confirm prompts", {}, record.chosen().confirm or {}),
        ("on holdout prompts", record.holdout_baseline, record.holdout),
    ]
    for where, before, after in parts:
        if after:
            _row(table, Text(where, style="dim"))
        for name, score in after.items():
            n = formatting.sample(name, score)
            if record.judge is not None and name in record.judge.scores:
                n = f"{score.n}, {formatting.trust(record.judge, name).partition(' (')[0]}"
            row = _value(name, before), formatting.measured(name, score), n
            _row(table, f"  {_called(name)}", *row)
            if score.spread:
                each = ", ".join(map(formatting.significant, score.spread.values()))
                _row(table, "    " + ", ".join(score.spread), "", each, "single tokens")
            groups = large_groups(score)
            shown = _ends(groups)
            for group, part in shown.items():
                old = (before[name].parts or {}).get(group) if name in before else None
                was = "–" if old is None else formatting.number(name, old.value)
                now = formatting.measured(name, part)
                _row(table, f"    {group}", was, now, formatting.sample(name, part))
            if len(shown) < len(groups):
                more = f"    {len(groups) - len(shown)} more in report"
                _row(table, Text(more, style="dim"))
    return table


def _ends(groups: Scores) -> Scores:
    """Return the groups of the lowest and the highest value, where there are many; else all."""
    if len(groups) <= _MOST_GROUPS:
        return groups
    ordered = sorted(groups, key=lambda group: groups[group].value)
    return {group: groups[group] for group in (ordered[0], ordered[-1])}


def _called(name: str) -> str:
    """Return a score's name at the head of a row."""
    return _SHORT.get(name) or formatting.inline(name)


def _table(title: str | None = None, *, header: bool = True) -> Table:
    """Return a table without lines: columns two spaces apart."""
    return Table(
        title=None if title is None else Text(title),
        title_justify="left",
        show_header=header,
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )


def _samples(record: Record) -> list[Panel]:
    panels = []
    for sample in record.samples[:3]:
        lines = _table(header=False)
        for label, text in (
            ("before", sample.before or "(empty)"),
            ("after", sample.after or "(empty)"),
            ("correct", sample.answer),
        ):
            if text is not None:
                lines.add_row(Text(label, style="dim"), Text(visible(text, lines=True)))
        title = Text(visible(sample.prompt), style="bold")
        panels.append(Panel(lines, title=title, title_align="left", border_style="dim"))
    return panels


def _places(record: Record, out: Path) -> Table:
    table = _table(header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for artifact in record.artifacts:
        form = FORMATS.get(artifact.format)
        name = artifact.format if form is None else form.label
        _row(table, name, str(out / artifact.path))
        _row(table, "model card", str(out / artifact.path / CARD))
    _row(table, "report", str(out / "report.html"))
    _row(table, "record", str(out / "record.json"))
    return table


def comparison_table(rows: list[tuple[str, Scores, Scores]]) -> Table:
    """Return (set, original's scores, edited model's scores) as a table."""
    table = _table()
    for heading in ("", "original", "edited", "on"):
        table.add_column(heading, justify="left" if heading in ("", "on") else "right")
    for where, before, after in rows:
        for name, score in after.items():
            _row(
                table,
                _called(name),
                formatting.measured(name, before.get(name)),
                formatting.measured(name, score),
                f"{where}, {formatting.sample(name, score)}",
            )
    return table


_GEOMETRY = {
    "layer": "layer",
    "target_norm": "target norm",
    "contrast_norm": "contrast norm",
    "difference_norm": "difference norm",
    "cosine": "cosine",
    "silhouette": "silhouette",
    "auc": "AUC",
    "effective_rank": "effective rank",
}


def geometry_table(layers: list[dict[str, float]]) -> Table:
    """Return what `excise geometry` measured, a row per layer."""
    table = _table()
    for heading in _GEOMETRY.values():
        table.add_column(heading, justify="right")
    for row in layers:
        values = (row[key] for key in _GEOMETRY if key != "layer")
        _row(table, f"{row['layer']:.0f}", *(formatting.significant(value) for value in values))
    return table


def show_reproduction(found: Reproduction) -> None:
    """Show what `excise reproduce` found: hashes, what differs and whether it matters, the verdict."""
    table = _table()
    for heading in ("", "record", "now", ""):
        table.add_column(heading)
    for one in found.rebuilt:
        words = "not on the record" if one.then is None else "same bytes"
        words = words if one.same else "other bytes"
        _row(table, one.format, (one.then or "–")[:12], one.now[:12], words)
    for part in found.differences:
        words = "can change weights" if part.matters else "cannot change weights"
        _row(table, part.what, part.then, part.now, words)
    show(table)
    for name in found.left_out:
        terminal.say(f"{name}: not rebuilt; `excise export --format {name}` writes it from the run")
    terminal.say(found.verdict)


def _thin(trials: list[TrialRecord], most: int, always: int | None) -> list[TrialRecord]:
    if len(trials) <= most:
        return trials
    step = (len(trials) - 1) / (most - 1)
    kept = {round(i * step) for i in range(most)}
    return [t for i, t in enumerate(trials) if i in kept or t.number == always]


def _value(name: str, scores: Scores) -> str:
    return formatting.number(name, scores[name].value) if name in scores else "–"
