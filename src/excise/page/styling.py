"""How pages look, and the parts that several have: heads, sections, failures said in a line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nicegui import ui

from excise.errors import ExciseError
from excise.visible import one_line

CSS = """
.nicegui-content { max-width: 1500px; margin: 0 auto; padding: 12px; gap: 12px; align-items: stretch; }
h1, h2, h3 { font-size: 1.3rem; line-height: 1.5; font-weight: 600; margin: 0; }
h2 { font-size: 1.1rem; } h3 { font-size: 0.95rem; }
.box { border: 1px solid rgba(128, 128, 128, .35); border-radius: 8px; padding: 12px; min-width: 0; }
.pair, .columns { display: grid; gap: 12px; }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
.line { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; }
.columns { grid-template-columns: repeat(auto-fit, minmax(min(100%, 220px), 1fr)); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.faint { opacity: .8; }
.figures { display: grid; grid-template-columns: auto auto auto; gap: 2px 18px; width: fit-content; }
.problem { border-left: 4px solid #b3261e; padding: 4px 10px; overflow-wrap: anywhere; }
a { color: inherit; text-decoration: underline; }
a:focus-visible, button:focus-visible { outline: 3px solid #3b86d6; outline-offset: 2px; }
.q-btn { text-transform: none; }
.grow { flex: 1 1 240px; } .short { flex: 0 1 160px; }
.js-plotly-plot { width: 100%; min-height: 240px; }
"""


def head(level: int, text: str) -> Any:
    """Add a heading."""
    element = ui.element(f"h{level}")
    with element:
        ui.label(text)
    return element


@contextmanager
def box(title: str) -> Iterator[Any]:
    """Add a section with a heading; what is made in the context is in it."""
    with ui.element("section").classes("box") as section:
        head(2, title)
        yield section


def text(words: str, *classes: str) -> Any:
    """Add text of others as it is: what looks like markup is none."""
    return ui.label(words).classes(" ".join(("text", *classes)))


def attempt(work: Callable[[], Any]) -> None:
    """Do what was asked for; say in a line why not, where that fails."""
    try:
        work()
    except ExciseError as error:
        ui.notify(one_line(str(error)), type="negative", multi_line=True, timeout=8000)


def top(title: str, *, home: bool = True) -> None:
    """Begin a page: its title, and the way back."""
    ui.colors(primary="#2b6cb0")  # white on it can be read
    ui.page_title(f"{title} · Excise")
    with ui.element("div").classes("line"):
        if home:
            ui.link("All runs", "/")
        head(1, title)
