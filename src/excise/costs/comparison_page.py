"""A comparison shown: what tables on a console and on a page say, and the page."""

from __future__ import annotations

from typing import Any

from excise.costs.comparison import Comparison, Side, number_of
from excise.record import BenchmarkRecord, Scores
from excise.report import formatting
from excise.report.figures import fronts_figure
from excise.report.html import Cell, Table, measured, page

MARK = "\u00a0†"  # at the head of figures that may not be compared
NONE = "none"


def matched_note() -> str:
    """Return how trials were matched, and what their figures are worth."""
    return (
        "Of each run the trial with the least KL that keeps the limit on the search prompts. Picked on "
        "these, it looks somewhat better there than on fresh ones, the more so the more trials a run has. "
        "Where intervals overlap, call neither better."
    )


def limit_words(found: Comparison, limit: float) -> str:
    """Return a limit of the behaviour rate: '≤ 5 %', '≥ 95 %'."""
    return (
        f"≥\u00a0{100 * (1 - limit):.0f}\u00a0%"
        if found.seeks
        else f"≤\u00a0{100 * limit:.0f}\u00a0%"
    )


def head(name: str, *, alike: bool) -> str:
    """Return the head of a score's column."""
    return formatting.heading(name) + ("" if alike else MARK)


def benchmark_rows(found: Comparison) -> list[tuple[Side, BenchmarkRecord, bool]]:
    """Return (side, one metric of a task, whether all sides with it met the same), by task."""
    rows = [(side, one) for side in found.sides for one in side.benchmarks]
    asked: dict[tuple[str, str], set[str]] = {}
    for _, one in rows:
        asked.setdefault((one.task, one.metric), set()).add(one.samples_sha256)
    rows.sort(key=lambda row: list(asked).index((row[1].task, row[1].metric)))
    models = any(one.what == "original model" for one in found.differences)
    return [(side, one, not models and len(asked[one.task, one.metric]) == 1) for side, one in rows]


def as_json(found: Comparison) -> dict[str, Any]:
    """Return a comparison as `--json` prints it."""
    return {
        "sides": [_side_json(side) for side in found.sides],
        "differences": [
            {"what": d.what, "values": d.shown, "scores": sorted(d.scores), "holdout": d.holdout}
            for d in found.differences
        ],
        "matched": [
            {
                "limit": 1 - match.limit if found.seeks else match.limit,
                "trials": [
                    None
                    if trial is None
                    else {
                        "trial": None if trial.number < 0 else trial.number,
                        "scores": _scores(trial.scores),
                    }
                    for trial in match.trials
                ],
            }
            for match in found.matches
        ],
    }


def _side_json(side: Side) -> dict[str, Any]:
    number = None if side.chosen is None or side.chosen.number < 0 else side.chosen.number
    return {
        "name": side.name,
        "what": side.what,
        "trial": number,
        "prompts": side.quoted.name,
        "original": _scores(side.quoted.before),
        "edited": _scores(side.quoted.after),
        "benchmarks": [one.model_dump(mode="json", exclude_none=True) for one in side.benchmarks],
    }


def _scores(scores: Scores) -> dict[str, Any]:
    return {k: v.model_dump(mode="json", exclude_none=True) for k, v in scores.items()}


def comparison_page(found: Comparison) -> str:
    """Return the comparison as one HTML document."""
    fronts = {side.label: side.front for side in found.sides}
    figure = fronts_figure(fronts, {side.label: side.chosen for side in found.sides})
    return page(
        "comparison.html.j2",
        {"front": figure} if figure.data else {},
        title=formatting.count(len(found.sides), "edit") + " compared",
        sides=Table(["", "", "Original"], [_about(side) for side in found.sides], words=3),
        differences=[one.words() for one in found.differences],
        unlike_axes=not (found.may_compare("drift") and found.may_compare("behaviour_rate")),
        note=matched_note(),
        one_set=found.one_set,
        matched=_matched(found),
        chosen=_chosen(found),
        benchmarks=_benchmarks(found),
    )


def _about(side: Side) -> list[Cell]:
    return [Cell(side.label), Cell(side.what), Cell(side.facts["original model"].shown)]


def _matched(found: Comparison) -> Table:
    names = found.matched_scores()
    rows = []
    for match in found.matches:
        for side, trial in zip(found.sides, match.trials, strict=True):
            first = side is found.sides[0]
            where = Cell(limit_words(found, match.limit) if first else "")
            scores = {} if trial is None else trial.scores
            number = NONE if trial is None else number_of(trial)
            figures = [measured(name, scores.get(name)) for name in names]
            rows.append([where, Cell(side.label), Cell(number), *figures])
    heads = [head(name, alike=found.may_compare(name)) for name in names]
    rate = "Rate" + ("" if found.may_compare("behaviour_rate") else MARK)
    return Table([rate, "", "Trial", *heads], rows, words=2)


def _chosen(found: Comparison) -> Table:
    names = found.quoted_scores()
    rows = []
    for side in found.sides:
        number = NONE if side.chosen is None else number_of(side.chosen)
        figures = [measured(name, side.quoted.after.get(name)) for name in names]
        rows.append([Cell(side.label), Cell(side.quoted.name), Cell(number), *figures])
    heads = [head(name, alike=found.may_quote(name)) for name in names]
    return Table(["", "Prompts", "Trial", *heads], rows, words=2)


def _benchmarks(found: Comparison) -> Table:
    rows = []
    for side, one, alike in benchmark_rows(found):
        name = f"{one.task}, {one.metric}" + ("" if alike else MARK)
        scores = [measured("kept", score) for score in (one.original, one.edited)]
        last = [Cell(formatting.points(one)), Cell(f"{one.n:,}")]
        rows.append([Cell(name), Cell(side.label), *scores, *last])
    return Table(["Task", "", "Original", "Edited", "Difference", "n"], rows, words=2)
