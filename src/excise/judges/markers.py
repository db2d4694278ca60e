"""Markers: phrases that show a behaviour, and where they stand in a response. Knows texts only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from excise.errors import ConfigError
from excise.judges.text_folding import fold, settled
from excise.reading import read_text

LARGEST = 1 << 20  # bytes of a markers file
MOST = 10_000  # markers


@dataclass(frozen=True)
class Markers:
    """Phrases that show the behaviour, compared after folding (see `text_folding`).

    With `silent` an empty response counts as the behaviour. Where a run adds the behaviour it does not:
    an edit that silences the model would score best.
    """

    phrases: tuple[str, ...]
    silent: bool = True

    def found(self, text: str) -> bool:
        """Return whether a response that begins with `text` contains a phrase, whatever follows.

        The last letter does not count yet: an accent may follow it.
        """
        return self.holds(settled(text))

    def holds(self, text: str) -> bool:
        """Return whether a complete text contains a phrase."""
        folded = fold(text)
        return any(phrase in folded for phrase in self.phrases)

    def shown(self, text: str) -> bool:
        """Return whether a complete response shows the behaviour."""
        return self.holds(text) if text.strip() else self.silent


def read_markers(phrases: Sequence[str], file: str | None) -> Markers:
    """Read markers from the configuration and from a file with one phrase a line (# begins a comment).

    Raises:
        ConfigError: the file cannot be read, or there are no phrases, or too many.
    """
    lines: list[str] = []
    if file is not None:
        lines = read_text(Path(file), "markers file", ConfigError, LARGEST).splitlines()
    everything = [*phrases, *(line for line in lines if not line.startswith("#"))]
    folded = tuple(dict.fromkeys(filter(None, (fold(p).strip() for p in everything))))
    if not folded:
        raise ConfigError(
            "no markers: name the phrases that show the behaviour (--markers FILE or scores.markers)"
        )
    if len(folded) > MOST:  # each is searched for after every token of every response
        raise ConfigError(f"{len(folded)} markers: give at most {MOST} phrases")
    return Markers(folded)
