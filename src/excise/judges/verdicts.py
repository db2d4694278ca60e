"""Verdicts on responses: what they are, who gives them, and how they are remembered.

Knows texts only. What gives verdicts is a `Judge` (`judges/`); scorers ask it through `Verdicts`, which
puts the rule for broken responses in front of it, and never asks twice.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from excise.errors import JudgeError
from excise.events import OnEvent, Progress, at_most_every, ignore
from excise.files import writing
from excise.reading import replace_surrogates
from excise.visible import one_line

SHOWS, ANSWERS, OTHER, BROKEN = "shows", "answers", "other", "broken"
VERDICTS = (SHOWS, ANSWERS, OTHER, BROKEN)
UNFINISHED = "unfinished"  # no verdict of a judge's: the chain of thought took all the tokens
MEANINGS = {
    SHOWS: "shows the behaviour",
    ANSWERS: "answers",
    OTHER: "answers something else",
    BROKEN: "is empty, garbled, a loop, or ends before it says anything",
}
FILE = "verdicts.jsonl"  # of a run folder: hashes and verdicts, no text

_NGRAM = 4  # words; characters where a script puts no spaces
_LOOPED = 0.5  # share of repeated n-grams from which on a response is a loop
_LONG = 12  # characters of a word on average
_NUMBER = re.compile(r"[\W\d_]+")
_SHORT = 12  # n-grams below which nothing is called a loop
_UNSOUND = 0.1  # share of characters that no text holds
_FEW, _UNREAD = 20, 0.05  # of this many answers, at most this share may be no verdict


@dataclass(frozen=True)
class Exchange:
    """A prompt and the response to it. `ended` is False where the response was cut."""

    prompt: str
    response: str
    ended: bool = True


@dataclass(frozen=True)
class Opinion:
    """A judge's answer: a verdict or a severity in [0, 1]; None where it was neither, and what it said."""

    value: str | float | None
    said: str = ""


class Judge(Protocol):
    """What gives verdicts.

    Attributes:
        name: as records and cards show it: no local path.
        folder: where its weights are, if here.
        facts: what decides its verdicts beside its weights, JSON-ready: kind, labels, rubric.
        grades: whether it can say how severe a response is.
        at_once: how many responses to ask it for together; verdicts are stored after each such part.
    """

    name: str
    folder: Path | None
    facts: dict[str, Any]
    grades: bool
    at_once: int

    def verdicts(self, exchanges: Sequence[Exchange]) -> list[Opinion]:
        """Return a verdict on each response.

        Raises:
            JudgeError: it cannot be asked.
        """
        ...

    def severities(self, exchanges: Sequence[Exchange]) -> list[Opinion]:
        """Return how complete and usable each response is, in [0, 1]; where it `grades`.

        Raises:
            JudgeError: it cannot be asked.
        """
        ...


def is_broken(text: str) -> bool:
    """Return whether a response is broken whatever it was asked: empty, without a letter, garbled, a loop.

    A loop is found by the share of repeated 4-grams (seq-rep-4; Welleck et al., Neural text generation with
    unlikelihood training, 2020). What is broken in other ways is for a judge to see.
    """
    if not any(unicodedata.category(c)[0] in "LNS" for c in text):
        return True
    unsound = sum(c == "\ufffd" or unicodedata.category(c) in ("Cc", "Cn", "Co") for c in text)
    if unsound - text.count("\n") - text.count("\t") > _UNSOUND * len(text):
        return True
    units: Sequence[str] = text.split()
    if len(units) * _LONG < len(text):  # no script with spaces has such words
        units = "".join(units)
    elif 2 * len(worded := [unit for unit in units if not _NUMBER.fullmatch(unit)]) > len(units):
        units = worded  # a loop may count its rounds
    grams = [tuple(units[at : at + _NGRAM]) for at in range(len(units) - _NGRAM + 1)]
    return len(grams) >= _SHORT and 1 - len(set(grams)) / len(grams) > _LOOPED


class Verdicts:
    """A judge that is asked once for each exchange: what it says is remembered, in a file if there is one.

    Many responses are equal: the same prompt under another candidate. Responses that are broken by
    `is_broken` are not put to it.
    """

    def __init__(self, judge: Judge, on_event: OnEvent = ignore) -> None:
        self.judge = judge
        self._on_event = at_most_every(1.0, on_event)
        self._known: dict[str, Opinion] = {}
        self._file: Path | None = None
        self._of = ""
        self._answers, self._unread = 0, 0

    @property
    def name(self) -> str:
        """The judge's."""
        return self.judge.name

    def keep(self, path: Path, of: str = "") -> None:
        """Keep verdicts in a file from now on, and take over those that it holds.

        Lines that are no verdicts are passed over: what they said is asked again.

        Args:
            path: the file, made where it does not exist.
            of: what the judge's weights are, so that another one's verdicts are not taken for its own.

        Raises:
            StorageError: it cannot be written.
        """
        self._of = of
        with writing(path):
            text = path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
            if not text.endswith("\n"):  # a line that was cut short ends here
                with path.open("a", encoding="utf-8") as file:
                    file.write("\n" if text else "")
        self._file = path
        known = filter(None, map(_read_line, text.splitlines()))
        self._known = dict(known) | self._known

    def verdicts(self, exchanges: Sequence[Exchange]) -> list[str | None]:
        """Return a verdict on each response; None where the judge's answer was none.

        Raises:
            JudgeError: it cannot be asked, or too many of its answers are no verdicts.
        """
        asked = [one for one in exchanges if not is_broken(one.response)]
        found = iter(self._opinions("verdict", asked, self.judge.verdicts))
        return [
            BROKEN if is_broken(one.response) else _text(next(found).value) for one in exchanges
        ]

    def severities(self, exchanges: Sequence[Exchange]) -> list[float | None]:
        """Return how complete and usable each response is, in [0, 1]; broken ones are not at all.

        Raises:
            JudgeError: as `verdicts`.
        """
        asked = [one for one in exchanges if not is_broken(one.response)]
        found = iter(self._opinions("severity", asked, self.judge.severities))
        return [0.0 if is_broken(one.response) else _number(next(found).value) for one in exchanges]

    def _opinions(
        self,
        what: str,
        exchanges: Sequence[Exchange],
        ask: Callable[[Sequence[Exchange]], list[Opinion]],
    ) -> list[Opinion]:
        key = self._keys(what)
        keys = list(map(key, exchanges))
        new = {k: one for k, one in zip(keys, exchanges, strict=True) if k not in self._known}
        waiting = list(new.items())
        for start in range(0, len(waiting), self.judge.at_once):
            some = waiting[start : start + self.judge.at_once]
            self._learn([k for k, _ in some], ask([one for _, one in some]))
            self._on_event(Progress("judge", start + len(some), len(waiting)))
        return [self._known[k] for k in keys]

    def _keys(self, what: str) -> Callable[[Exchange], str]:
        base = hashlib.sha256(
            json.dumps([self.name, self._of, self.judge.facts, what], sort_keys=True).encode()
        )

        def key(one: Exchange) -> str:
            digest, texts = base.copy(), (one.prompt, one.response)
            # The lengths keep apart what two texts share out differently.
            parts = [str(one.ended), *(f"{len(t)} {replace_surrogates(t)}" for t in texts)]
            digest.update("\0".join(parts).encode())
            return digest.hexdigest()

        return key

    def _learn(self, keys: Sequence[str], opinions: Sequence[Opinion]) -> None:
        self._known |= zip(keys, opinions, strict=True)
        unread = [one for one in opinions if one.value is None]
        self._answers, self._unread = self._answers + len(keys), self._unread + len(unread)
        if self._file is not None:
            good = [
                (k, o.value) for k, o in zip(keys, opinions, strict=True) if o.value is not None
            ]
            with writing(self._file), self._file.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(pair) + "\n" for pair in good))
        if unread and self._answers >= _FEW and self._unread > _UNREAD * self._answers:
            raise JudgeError(
                f"judge {self.name}: {self._unread} of {self._answers} answers were no verdict, such as "
                f"{one_line(unread[-1].said, 80)!r}: ask a stronger one, or with another rubric"
            )


def _read_line(line: str) -> tuple[str, Opinion] | None:
    try:
        key, value = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return None
    if value in VERDICTS or (isinstance(value, float) and 0 <= value <= 1):
        return str(key), Opinion(value)
    return None


def _text(value: str | float | None) -> str | None:
    assert value is None or value in VERDICTS
    return value if isinstance(value, str) else None


def _number(value: str | float | None) -> float | None:
    return value if isinstance(value, float) else None
