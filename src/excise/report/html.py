"""One self-contained HTML page about a run, from its record alone.

The page needs no network and says so: its content policy forbids every load, and of scripts it
allows only the two that this module writes, by their hashes. Text is escaped by the template.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from excise.record import Record, ScoreRecord, Scores, TrialRecord
from excise.report import figures
from excise.report import formatting as wording
from excise.report.views import (
    FrontPoint,
    PromptSet,
    Row,
    Shape,
    behaviour,
    confirmed,
    evidence,
    formatting_notes,
    front_points,
    prompt_sets,
    score_names,
    setting,
    shape,
    side_by_side,
    total_seconds,
    trial_counts,
)

_DATA = Path(str(resources.files("excise"))) / "data"
# Responses beyond this many are folded away.
_SAMPLES_OPEN = 6
_HASH_CHARS = 12
_STAR = "\u00a0★"


@dataclass(frozen=True)
class Card:
    """One figure of the summary; `before` stands beside it."""

    label: str
    value: str
    before: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Cell:
    """Plain text, with a smaller line below it."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Cells in columns: the first `words` columns are text, the rest are figures."""

    head: list[str]
    rows: list[list[Cell]]
    words: int = 1
    marked: int | None = None


def html_report(record: Record) -> str:
    """Return the report as one HTML document."""
    chosen = None if record.selected is None else record.trial(record.selected)
    profile = shape(record, chosen) if chosen is not None else None
    plots = {name: figure for name, figure in _figures(record, profile).items() if figure}
    return page(
        "report.html.j2",
        plots,
        record=record,
        title=f"{wording.model_name(record.model.source)}: {behaviour(record)}",
        model=wording.model_name(record.model.source),
        behaviour=behaviour(record),
        chosen=chosen,
        effect=_effect(record, chosen),
        cards=_cards(record, chosen),
        profile_note=profile.note if profile else "",
        scores=_scores(record, chosen),
        front=_front(record),
        thresholds=wording.thresholds(),
        parameters=_parameters(record),
        prompts=_prompts(record),
        formatting=formatting_notes(record),
        timing=_timing(record),
        versions=_versions(record),
        facts=_facts(record),
        artifacts=_artifacts(record),
        benchmarks=_benchmarks(record),
        samples_open=_SAMPLES_OPEN,
    )


def page(template: str, plots: Mapping[str, go.Figure], **parts: Any) -> str:
    """Return a self-contained HTML document.

    Args:
        template: its file in the package's data.
        plots: what is drawn where the template has `plot-NAME`, by name.
        parts: what the template shows.
    """
    scripts = [get_plotlyjs(), (_DATA / "report.js").read_text(encoding="utf-8")]
    return (
        _environment()
        .get_template(template)
        .render(
            **parts,
            plots={name: json.loads(figure.to_json()) for name, figure in plots.items()},
            style=(_DATA / "report.css").read_text(encoding="utf-8"),
            scripts=scripts,
            hashes=[_content_hash(script) for script in scripts],
        )
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_DATA),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _content_hash(script: str) -> str:
    """Return the source that a content security policy names this script by."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _figures(record: Record, profile: Shape | None) -> dict[str, go.Figure | None]:
    auc = record.separation.auc if record.separation else []
    geometry = figures.geometry_figures(record.geometry)
    return {
        "front": figures.front_figure(record),
        "profile": figures.profile_figure(profile) if profile else None,
        "separation": figures.separation_figure(auc, profile.index if profile else None)
        if auc
        else None,
        "importance": figures.importance_figure(record.importance)
        if any(record.importance.values())
        else None,
        **geometry,
    }


def _effect(record: Record, chosen: TrialRecord | None) -> str:
    if chosen is None:
        return ""
    prompts = evidence(record, chosen)
    return wording.assess(prompts.after, prompts.before)


def _cards(record: Record, chosen: TrialRecord | None) -> list[Card]:
    cards = []
    for prompts in prompt_sets(record, chosen) if chosen is not None else []:
        for name in ("behaviour_rate", "drift"):
            if name in prompts.after:
                label = f"{wording.title(name)}, {prompts.name}"
                card = _score_card(label, name, prompts.before, prompts.after)
                by = wording.judged_by(name, record)
                cards.append(replace(card, notes=[*card.notes, by] if by else card.notes))
    notes = [", ".join(f"{n:,} {word}" for word, n in trial_counts(record).items())]
    if record.timing:
        notes.append(f"{wording.duration(total_seconds(record))} in all")
    return [*cards, Card("Trials", f"{len(record.trials):,}", notes=notes)]


def _score_card(label: str, name: str, before: Scores, after: Scores) -> Card:
    score, old = after[name], before.get(name)
    interval = wording.interval(name, score)
    # Drift is zero before any edit, by its definition.
    shown = wording.number(name, old.value) if old is not None and name != "drift" else ""
    notes = [f"95 %: {interval}" if interval else "", wording.unit(name)]
    notes.append(wording.sample(name, score))
    return Card(label, wording.number(name, score.value), shown, [note for note in notes if note])


def _scores(record: Record, chosen: TrialRecord | None) -> Table:
    sets = [PromptSet("search", record.baseline, {})]
    columns = ["original", "n"]
    if chosen is not None:
        sets, columns = prompt_sets(record, chosen), ["original", "edited", "n"]
    head = ["Score", *(f"{s.name.capitalize()}: {c}" for s in sets for c in columns)]
    rows = []
    for row in side_by_side(record, sets):
        rows.append(_score_row(row, record, edited=chosen is not None))
        if row.group is None and any(c.after and c.after.spread for c in row.cells.values()):
            rows.append(_spread_row(row))
    return Table(head, rows)


def _score_row(row: Row, record: Record, *, edited: bool) -> list[Cell]:
    note = wording.unit(row.name) or wording.judged_by(row.name, record)
    title = Cell(wording.title(row.name), note)
    cells = [title if row.group is None else Cell(f"{wording.MISSING} group {row.group}")]
    for pair in row.cells.values():
        scores = [pair.before, pair.after] if edited else [pair.before]
        cells += [measured(row.name, score) for score in scores]
        cells.append(_sample(row.name, pair.after or pair.before))
    return cells


def _spread_row(row: Row) -> list[Cell]:
    """Return how the samples behind an edited model's means lie, in a row of its own."""
    cells = [Cell(f"{wording.MISSING} single tokens")]
    for pair in row.cells.values():
        first, *others = wording.spread(pair.after).split(", ")
        cells += [Cell(""), Cell(first, ", ".join(others)), Cell("")]
    return cells


def measured(name: str, score: ScoreRecord | None) -> Cell:
    """Return a score's value with its interval below it; a dash where nothing was measured."""
    if score is None:
        return Cell(wording.MISSING)
    return Cell(wording.number(name, score.value), wording.interval(name, score))


def _sample(name: str, score: ScoreRecord | None) -> Cell:
    number, _, noun = wording.sample(name, score).partition(" ")
    return Cell(number, noun)


def _front(record: Record) -> Table:
    points = front_points(record)
    names = score_names(record.objectives, *(p.trial.scores for p in points))
    rows = [
        [
            *(_number(p), Cell(p.words), Cell(wording.chance(p.trial))),
            *(measured(name, p.trial.scores.get(name)) for name in names),
        ]
        for p in points
    ]
    head = ["Trial", "In words", "On the front", *(wording.heading(name) for name in names)]
    return Table(head, rows, words=2, marked=_marked(points))


def _parameters(record: Record) -> Table:
    points = front_points(record)
    keys = list(dict.fromkeys(key for p in points for key in p.trial.params))
    rows = [
        [
            _number(p),
            *(Cell(wording.parameter(p.trial.params.get(key, wording.MISSING))) for key in keys),
        ]
        for p in points
    ]
    return Table(["Trial", *keys], rows if keys else [], marked=_marked(points))


def _number(point: FrontPoint) -> Cell:
    return Cell(f"{point.trial.number}{_STAR if point.chosen else ''}")


def _marked(points: list[FrontPoint]) -> int | None:
    return next((row for row, point in enumerate(points) if point.chosen), None)


def _prompts(record: Record) -> Table:
    rows = [
        [
            Cell(role, wording.role_words(role, record)),
            *_cells(wording.public_source(p.source), p.sha256[:_HASH_CHARS], f"{p.n:,}"),
        ]
        for role, p in record.prompts.items()
    ]
    return Table(["Prompt set", "Source", "SHA-256", "n"], rows, words=3)


def _timing(record: Record) -> list[tuple[str, str, float]]:
    """Return each phase and its time in words, and its share of the longest phase in percent."""
    phases = {phase: s for phase, s in record.timing.items() if phase != "total"}
    longest = max(phases.values(), default=0.0) or 1.0
    return [
        (wording.phase_words(phase), wording.duration(s), 100 * s / longest)
        for phase, s in phases.items()
    ]


def _versions(record: Record) -> Table:
    rows = [_cells(name, version) for name, version in record.versions.items()]
    return Table(["Software", "Version"], rows, words=2)


def _facts(record: Record) -> Table:
    model = record.model
    limit = setting(record, "scores", "max_new_tokens")
    facts = {
        "Model": wording.model_name(model.source),
        "Origin": wording.origin(model.source),
        "Revision": model.revision,
        "Licence": model.license,
        "Architecture": f"{model.model_type}, {model.layers} layers of width {model.width}",
        "Parameters": wording.large(model.parameters),
        "Weights": " ".join(model.notes),
        "Measured in": f"{model.dtype} on {model.device}",
        "Method": record.method,
        "Judge": None if record.judge is None else wording.judge_words(record.judge),
        "Objectives": "; ".join(map(wording.title, record.objectives)),
        "Chosen by": record.selection,
        "Measured again": wording.count(confirmed(record), "trial") if confirmed(record) else None,
        "Seed": str(record.seed),
        "Response limit": None if limit is None else wording.count(int(limit), "token"),
        "Configuration": f"SHA-256 {model.config_sha256[:_HASH_CHARS]}",
    }
    return Table(["", ""], [_cells(name, fact) for name, fact in facts.items() if fact], words=2)


def _benchmarks(record: Record) -> Table:
    rows = [
        [
            *_cells(f"{one.task}, {one.metric}", str(one.trial)),
            *(measured("kept", score) for score in (one.original, one.edited)),
            *_cells(wording.points(one), wording.MISSING if one.p is None else f"{one.p:.2g}"),
            Cell(f"{one.n:,}"),
        ]
        for one in record.benchmarks
    ]
    return Table(["Task", "Trial", "Original", "Edited", "Difference", "p", "n"], rows, words=1)


def _artifacts(record: Record) -> Table:
    """List exports, with the search's figures and those of the loaded files."""
    names = score_names((), *(t for a in record.artifacts for t in (a.expected, a.measured)))
    rows = [
        [
            *_cells(wording.public_source(a.path), a.format, a.sha256[:_HASH_CHARS]),
            *_cells(str(a.trial), wording.size(a.bytes)),
            *(_expected_and_measured(name, a.expected, a.measured) for name in names),
        ]
        for a in record.artifacts
    ]
    head = ["Export", "Format", "SHA-256", "Trial", "Size", *map(wording.heading, names)]
    return Table(head, rows, words=3)


def _expected_and_measured(name: str, expected: Scores, found: Scores) -> Cell:
    old, new = measured(name, expected.get(name)), measured(name, found.get(name))
    return Cell(f"{old.text} → {new.text}")


def _cells(*texts: str) -> list[Cell]:
    return [Cell(text) for text in texts]
