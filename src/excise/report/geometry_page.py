"""Residuals in two dimensions, as one self-contained page that steps through the layers."""

from __future__ import annotations

import plotly.graph_objects as go
from torch import Tensor

_TARGET, _CONTRAST = "#e0762f", "#3b86d6"
_STEP_MS = 450


def projection_page(target: Tensor, contrast: Tensor, title: str, axes: tuple[str, str]) -> str:
    """An animated page of projections (P, L, 2) and (N, L, 2); it needs no network."""
    frames = [
        go.Frame(name=str(layer), data=_traces(target[:, layer], contrast[:, layer]))
        for layer in range(target.shape[1])
    ]
    figure = go.Figure(data=frames[0].data, frames=frames)
    play = {"frame": {"duration": _STEP_MS, "redraw": True}, "fromcurrent": True}
    stop = {"frame": {"duration": 0, "redraw": False}, "mode": "immediate"}
    figure.update_layout(
        title=title,
        template="none",
        height=640,
        xaxis={"title": axes[0], "zeroline": False, "autorange": True},
        yaxis={"title": axes[1], "zeroline": False, "autorange": True},
        updatemenus=[
            {
                "type": "buttons",
                "direction": "left",
                "x": 0.0,
                "y": -0.12,
                "buttons": [
                    {"label": "Play", "method": "animate", "args": [None, play]},
                    {"label": "Pause", "method": "animate", "args": [[None], stop]},
                ],
            }
        ],
        sliders=[
            {
                "x": 0.18,
                "len": 0.8,
                "y": -0.08,
                "currentvalue": {"prefix": "After layer "},
                "steps": [
                    {"label": f.name, "method": "animate", "args": [[f.name], {**stop, **_DRAWN}]}
                    for f in frames
                ],
            }
        ],
    )
    page: str = figure.to_html(include_plotlyjs=True, full_html=True, auto_play=False)
    return page


_DRAWN = {"frame": {"duration": 0, "redraw": True}, "mode": "immediate"}


def _traces(target: Tensor, contrast: Tensor) -> list[go.Scatter]:
    return [
        go.Scatter(
            name=name,
            mode="markers",
            x=[round(v, 4) for v in rows[:, 0].tolist()],
            y=[round(v, 4) for v in rows[:, 1].tolist()],
            marker={"size": 7, "color": color, "opacity": 0.7},
            hoverinfo="skip",
        )
        for name, rows, color in (
            ("contrast prompts", contrast, _CONTRAST),
            ("target prompts", target, _TARGET),
        )
    ]
