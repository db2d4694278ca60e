"""Figures of pages: the report's, with ink that can be read on white and on black, and a few more."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from excise.record import Record
from excise.report import formatting
from excise.report.figures import SERIES, front_figure, fronts_figure
from excise.report.views import drift_axis, front_points

_INK, _GRID = "#767c84", "rgba(128, 128, 128, 0.25)"


def drawn(figure: go.Figure | None) -> dict[str, Any]:
    """Return a figure as a page draws it; an empty one where there is none."""
    figure = go.Figure() if figure is None else figure
    figure.update_layout(
        font={"color": _INK, "size": 13},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"align": "left"},
        autosize=True,
    )
    figure.update_xaxes(gridcolor=_GRID, zerolinecolor=_GRID)
    figure.update_yaxes(gridcolor=_GRID, zerolinecolor=_GRID)
    return {**figure.to_plotly_json(), "config": {"displaylogo": False, "responsive": True}}


def front(record: Record | None) -> dict[str, Any]:
    """Draw the front of a run, as far as it is."""
    return drawn(None if record is None else front_figure(record))


def history(record: Record) -> dict[str, Any]:
    """Draw the first objective and the cost of every trial, in the order of the search."""
    figure = go.Figure(layout={"template": "none", "height": 300, "margin": {"t": 30, "r": 80}})
    cost = drift_axis(record)
    names = [next((n for n in record.objectives if n != cost), cost), cost]
    for place, name in enumerate(dict.fromkeys(names)):
        trials = [trial for trial in record.trials if name in trial.scores]
        figure.add_trace(
            go.Scatter(
                name=html.escape(formatting.title(name)),
                mode="markers",
                x=[trial.number for trial in trials],
                y=[trial.scores[name].value for trial in trials],
                marker={"size": 5, "color": SERIES[place], "opacity": 0.7},
                yaxis="y2" if place else "y",
                hovertemplate="trial %{x}: %{y:.3g}",
            )
        )
    figure.update_layout(
        xaxis={"title": "Trial"},
        yaxis={"title": html.escape(formatting.title(names[0]))},
        yaxis2={
            "title": html.escape(formatting.title(cost)),
            "overlaying": "y",
            "side": "right",
            "showgrid": False,
        },
        legend={"orientation": "h", "y": 1.15},
    )
    return drawn(figure)


def compared(records: Mapping[str, Record]) -> dict[str, Any]:
    """Draw the fronts of several runs over each other, by behaviour rate and drift."""
    fronts = {name: [p.trial for p in front_points(record)] for name, record in records.items()}
    return drawn(fronts_figure(fronts, {}))
