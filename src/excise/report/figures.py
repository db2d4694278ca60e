"""The report's figures, from a record: Plotly figures without a theme, which the page applies.

Colours are mid-tones that stand on white and on black. Plotly reads a little HTML in labels, so all
text that comes from a record is escaped here.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from excise.record import Record, Scores, TrialRecord
from excise.report import formatting
from excise.report.views import Shape, drift_axis, front_points

CHOSEN, FRONT, FAINT = "#e0762f", "#3b86d6", "#8b95a1"
SERIES = ("#3b86d6", "#e0762f", "#2f9e77", "#a06bd0", "#c9a227", "#d1548a")
_HEIGHT = 340
_ORIGINAL = -1  # stands for the original model's number among the trials
# A KL divergence this far below the largest is numerical noise: it must not stretch the axis.
_DECADES = 5
_HIGHEST = 308  # power of ten that a float has
_NOTHING = 1e-300  # no logarithm can be taken of half of less


def front_figure(record: Record) -> go.Figure | None:
    """Plot every trial by its first two objectives; None where there are fewer, or no trial."""
    trials = [t for t in record.trials if all(name in t.scores for name in record.objectives)]
    if not trials or len(record.objectives) < 2:
        return None
    x = drift_axis(record)
    y = next(name for name in record.objectives if name != x)
    axis = _CostAxis(x, [t.scores for t in trials])
    drawn, on_front = {t.number for t in trials}, set(record.front)
    front = [p.trial for p in front_points(record) if p.trial.number in drawn]
    others = [t for t in trials if t.number not in on_front]
    figure = _figure(height=480)
    if others:
        figure.add_trace(_points("other trials", others, axis, y, marker=_faint("circle")))
    if front:
        figure.add_trace(_front_line(front, axis, y))
    if record.baseline.keys() >= {x, y}:
        original = TrialRecord(
            number=_ORIGINAL, state="complete", params={}, scores=record.baseline, seconds={}
        )
        marker = {"symbol": "diamond-open", "size": 11, "color": FAINT, "line": {"width": 2}}
        figure.add_trace(_points("original", [original], axis, y, marker=marker))
    chosen = [t for t in trials if t.number == record.selected]
    if chosen:
        marker = {"symbol": "star", "size": 17, "color": CHOSEN}
        figure.add_trace(_points("chosen", chosen, axis, y, marker=marker))
    figure.update_xaxes(title=_escape(formatting.heading(x)), **axis.layout())
    figure.update_yaxes(title=_escape(formatting.heading(y)), **_y_axis(y))
    return figure


def fronts_figure(
    fronts: Mapping[str, Sequence[TrialRecord]], chosen: Mapping[str, TrialRecord | None]
) -> go.Figure:
    """Plot fronts over each other by KL divergence and behaviour rate, each with its chosen trial."""
    x, y = "drift", "behaviour_rate"
    drawn = {
        name: [t for t in front if t.scores.keys() >= {x, y}] for name, front in fronts.items()
    }
    every = [trial.scores for front in drawn.values() for trial in front]
    figure = _figure(height=480)
    if not every:
        return figure
    axis = _CostAxis(x, every)
    for place, (name, front) in enumerate(drawn.items()):
        gentle_first = sorted(front, key=lambda trial: trial.scores[x].value)
        figure.add_trace(
            _front_line(gentle_first, axis, y, name=_escape(name), color=_color(place))
        )
        star = chosen.get(name)
        if star is not None and star.scores.keys() >= {x, y}:
            marker = {"symbol": "star", "size": 16, "color": _color(place)}
            trace = _points("chosen", [star], axis, y, marker=marker)
            figure.add_trace(trace.update(legendgroup=_escape(name), showlegend=False))
    figure.update_xaxes(title=_escape(formatting.heading(x)), **axis.layout())
    figure.update_yaxes(title=_escape(formatting.heading(y)), **_y_axis(y))
    return figure


class _CostAxis:
    """Scale of the axis of a cost: logarithmic for KL divergences, which span decades.

    Zeros and values too small to matter are drawn at the left end, under a tick labelled 0.
    """

    def __init__(self, name: str, scores: Sequence[Scores]) -> None:
        self.name = name
        values = [s[name].value for s in scores]
        top = max(values)
        self.log = name in formatting.NATS and top > _NOTHING
        self.least = min(v for v in values if v > top * 10**-_DECADES) if self.log else 0.0
        self.most = top

    @property
    def left(self) -> float:
        """Position of zero."""
        return self.least / 2

    def place(self, value: float) -> float:
        """Return the value as it is drawn."""
        return max(value, self.left) if self.log else value

    def layout(self) -> dict[str, Any]:
        """Return the axis' settings for Plotly."""
        if not self.log:
            if self.name in formatting.NATS:
                return {"rangemode": "nonnegative"}
            return {"tickformat": ".0%"} if self.name in formatting.RATES else {}
        ticks = [t for t in _round_numbers(self.least, self.most) if t > self.left * 1.2]
        ends = [math.log10(self.left) - 0.08, math.log10(self.most) + 0.12]
        return {
            "type": "log",
            "range": ends,
            "tickvals": [self.left, *ticks],
            "ticktext": ["0", *(f"{tick:g}" for tick in ticks)],
        }


def _round_numbers(low: float, high: float) -> list[float]:
    """Return 1, 2, 5 times powers of ten from low to high; powers alone where there would be many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 3 else (1,)
    numbers = [
        step * 10.0**power for power in range(first, min(last, _HIGHEST) + 1) for step in steps
    ]
    return [n for n in numbers if low * 0.8 <= n <= high * 1.2]


def _faint(symbol: str) -> dict[str, Any]:
    stroke = 1.5 if symbol.endswith("open") else 0
    return {"symbol": symbol, "size": 7, "color": FAINT, "opacity": 0.45, "line": {"width": stroke}}


def _points(
    label: str, trials: Sequence[TrialRecord], axis: _CostAxis, y: str, **style: Any
) -> go.Scatter:
    return go.Scatter(
        name=label,
        mode="markers",
        x=[axis.place(t.scores[axis.name].value) for t in trials],
        y=[t.scores[y].value for t in trials],
        hovertext=[_hover(t) for t in trials],
        hoverinfo="text",
        **style,
    )


def _front_line(
    front: Sequence[TrialRecord], axis: _CostAxis, y: str, name: str = "front", color: str = FRONT
) -> go.Scatter:
    """Join the front's points in steps: between two of them no trial was measured."""
    trace = _points(name, front, axis, y, marker={"size": 9, "color": color})
    bars = {"thickness": 1, "width": 2, "color": color}
    trace.update(
        mode="lines+markers",
        legendgroup=name,
        line={"shape": "hv", "width": 1.5, "color": color},
        error_x=_error_bars([t.scores for t in front], axis.name, axis.place) | bars,
        error_y=_error_bars([t.scores for t in front], y, lambda value: value) | bars,
    )
    return trace


def _error_bars(
    scores: Sequence[Scores], name: str, place: Callable[[float], float]
) -> dict[str, Any]:
    above, below = [], []
    for score in (s[name] for s in scores):
        low, high = score.interval or (score.value, score.value)
        above.append(max(0.0, place(high) - place(score.value)))
        below.append(max(0.0, place(score.value) - place(low)))
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below}


def _y_axis(name: str) -> dict[str, Any]:
    if name in formatting.RATES:
        return {"tickformat": ".0%", "range": [-0.04, 1.04]}
    return {}


def _hover(trial: TrialRecord) -> str:
    head = f"<b>trial {trial.number}</b>" if trial.number >= 0 else "<b>a model</b>"
    head = "<b>original</b>" if trial.number == _ORIGINAL else head
    lines = [
        f"{formatting.heading(name)}: {formatting.measured(name, score)}"
        for name, score in trial.scores.items()
    ]
    lines += [f"{key}: {formatting.parameter(value)}" for key, value in trial.params.items()]
    return "<br>".join([head, *map(_escape, lines)])


def profile_figure(shape: Shape) -> go.Figure:
    """Plot the strength per layer and component, and the layer of the direction."""
    figure = _figure()
    for number, (name, strengths) in enumerate(shape.strengths.items()):
        figure.add_trace(
            go.Scatter(
                name=_escape(name),
                mode="lines+markers",
                x=list(range(len(strengths))),
                y=strengths,
                line={"color": _color(number), "width": 2},
                marker={"size": 6},
                hovertemplate="layer %{x}: %{y:.3g}",
            )
        )
    _mark_direction(figure, shape.index)
    _layer_axis(figure, max(map(len, shape.strengths.values()), default=0))
    peak = max((max(s, default=0.0) for s in shape.strengths.values()), default=0.0)
    figure.update_yaxes(title="Strength", range=[-0.05 * (peak or 1), 1.18 * (peak or 1)])
    return figure


def separation_figure(auc: Sequence[float], index: float | None) -> go.Figure:
    """Plot the AUC of each layer's direction between the two prompt sets."""
    figure = _figure()
    figure.add_trace(
        go.Scatter(
            name="separation",
            mode="lines+markers",
            x=list(range(len(auc))),
            y=list(auc),
            line={"color": FRONT, "width": 2},
            marker={"size": 6},
            hovertemplate="after layer %{x}: %{y:.3f}<extra></extra>",
        )
    )
    figure.add_hline(y=0.5, line={"dash": "dot", "width": 1, "color": FAINT})
    _mark_direction(figure, index)
    _layer_axis(figure, len(auc))
    figure.update_yaxes(title="Area under the ROC", range=[min([0.45, *auc]) - 0.02, 1.09])
    figure.update_layout(showlegend=False)
    return figure


_GEOMETRY = {
    "geometry-norms": {
        "target_norm": "target, mean norm",
        "contrast_norm": "contrast, mean norm",
        "difference_norm": "difference of means",
    },
    "geometry-apart": {"cosine": "cosine of the means", "silhouette": "silhouette", "auc": "AUC"},
    "geometry-rank": {"effective_rank": "effective rank of the difference"},
}


def geometry_figures(layers: Sequence[dict[str, float]]) -> dict[str, go.Figure]:
    """Plot what `excise geometry` measured by layer: norms, separation, effective rank."""
    out = {}
    for name, lines in _GEOMETRY.items() if layers else ():
        out[name] = figure = _figure()
        for number, (key, label) in enumerate(lines.items()):
            figure.add_trace(
                go.Scatter(
                    name=label,
                    mode="lines+markers",
                    x=[row["layer"] for row in layers],
                    y=[row[key] for row in layers],
                    line={"color": _color(number), "width": 2},
                    marker={"size": 6},
                    hovertemplate="after layer %{x}: %{y:.3g}",
                )
            )
        _layer_axis(figure, len(layers))
    return out


def importance_figure(importance: dict[str, dict[str, float]]) -> go.Figure:
    """Plot the share of each objective's variance that each parameter explains."""
    shares = {name: max(t.get(name, 0.0) for t in importance.values())
              for name in dict.fromkeys(p for t in importance.values() for p in t)}  # fmt: skip
    names = sorted(shares, key=lambda name: shares[name])
    figure = _figure(height=120 + 34 * len(names))
    for number, (objective, table) in enumerate(importance.items()):
        figure.add_trace(
            go.Bar(
                name=_escape(formatting.title(objective)),
                orientation="h",
                x=[table.get(name, 0.0) for name in names],
                y=[_escape(name) for name in names],
                marker={"color": _color(number)},
                hovertemplate="%{y}: %{x:.0%}",
            )
        )
    figure.update_layout(barmode="group", bargap=0.3)
    figure.update_xaxes(title="Importance", tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(automargin=True, showgrid=False)
    return figure


def _figure(height: int = _HEIGHT) -> go.Figure:
    return go.Figure(
        layout={
            "template": "none",
            "height": height,
            "margin": {"l": 64, "r": 20, "t": 44, "b": 56},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "hoverlabel": {"align": "left"},
            "showlegend": True,
        }
    )


def _mark_direction(figure: go.Figure, index: float | None) -> None:
    if index is None:
        return
    figure.add_vline(
        x=index,
        line={"dash": "dash", "width": 1.5, "color": CHOSEN},
        annotation={"text": f"direction {index:.1f}", "font": {"color": CHOSEN, "size": 12}},
        annotation_position="top left",
    )


def _layer_axis(figure: go.Figure, layers: int) -> None:
    step = max(1, math.ceil(layers / 16))
    figure.update_xaxes(title="Layer", tick0=0, dtick=step, range=[-0.5, layers - 0.5])


def _color(number: int) -> str:
    return SERIES[number % len(SERIES)]


def _escape(text: str) -> str:
    return html.escape(text, quote=False)
