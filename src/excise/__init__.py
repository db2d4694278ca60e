"""Excise edits one behaviour out of an open-weight language model and proves what it cost.

The names below are the public interface: `run` and what it takes and returns, and, from `Divergence` on,
what a scorer of your own is written with. They load on first use, so that `import excise` (and
`excise --help`) stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "Config": "config",
    "ExciseError": "errors",
    "Record": "record",
    "load_config": "config",
    "run": "runs.pipeline",
    "Divergence": "engine.requests",
    "Responses": "engine.requests",
    "Score": "search.scorers",
    "ratio": "intervals",
    "scorer": "search.scorers",
}

__all__ = [
    "Config",
    "Divergence",
    "ExciseError",
    "Record",
    "Responses",
    "Score",
    "__version__",
    "load_config",
    "ratio",
    "run",
    "scorer",
]

if TYPE_CHECKING:
    from excise.config import Config, load_config
    from excise.engine.requests import Divergence, Responses
    from excise.errors import ExciseError
    from excise.intervals import ratio
    from excise.record import Record
    from excise.runs.pipeline import run
    from excise.search.scorers import Score, scorer


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"excise.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'excise' has no attribute {name!r}")
