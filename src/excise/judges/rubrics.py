"""Rubrics: a question on a response, and what each of its one-token answers means.

A rubric is a TOML file, or one of those in `data/rubrics`. Knows texts, not who answers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from excise.errors import ConfigError
from excise.judges.verdicts import SHOWS, VERDICTS, Exchange, Opinion
from excise.reading import is_file, is_unicode, read_text, read_toml

_FOLDER = Path(str(resources.files("excise"))) / "data" / "rubrics"
_LARGEST = 1 << 16  # bytes of a rubric file
_FIELD = re.compile(r"\{(prompt|response|behaviour)\}")
_ANSWER = re.compile(r"[A-Za-z0-9]{1,8}")
_CUT = " [the response was cut here]"
_MOST = 26  # answers of one rubric


@dataclass(frozen=True)
class Rubric:
    """A question and its answers.

    Attributes:
        name: built-in, or the file's.
        question: with the fields {prompt}, {response} and {behaviour}.
        answers: what is replied -> a verdict, or a severity in [0, 1]; all of one kind.
        sha256: of the file.
    """

    name: str
    question: str
    answers: dict[str, str | float]
    sha256: str

    @property
    def grades(self) -> bool:
        """Whether it asks how severe a response is, rather than for a verdict."""
        return all(isinstance(value, float) for value in self.answers.values())

    @property
    def facts(self) -> dict[str, Any]:
        """What a judge's verdicts depend on, JSON-ready."""
        return {"name": self.name, "sha256": self.sha256}

    def ask(self, exchange: Exchange, behaviour: str) -> str:
        """Return the question on one exchange. What a response says is not read as a field."""
        texts = {
            "prompt": exchange.prompt,
            "response": exchange.response + ("" if exchange.ended else _CUT),
            "behaviour": behaviour,
        }
        return _FIELD.sub(lambda match: texts[match[1]], self.question)

    def opinion(self, weights: Sequence[float]) -> Opinion:
        """Return what the answers' probabilities come to.

        Args:
            weights: one per answer, in order; they need not sum to one.
        """
        pairs = list(zip(self.answers.values(), weights, strict=True))
        if self.grades:
            total = sum(weights)
            return Opinion(sum(float(value) * weight for value, weight in pairs) / total)
        return Opinion(max(pairs, key=lambda pair: pair[1])[0])

    def read(self, reply: str) -> Opinion:
        """Return what a reply in words comes to: the answer that it begins with, if it is one."""
        found = re.match(r"[\W_]*([A-Za-z0-9]+)", reply)
        known = {answer.casefold(): value for answer, value in self.answers.items()}
        return Opinion(known.get(found[1].casefold()) if found else None, reply)


def read_rubric(name: str, *, grades: bool) -> Rubric:
    """Read a built-in rubric, or a file.

    Args:
        name: one of `data/rubrics`, or the path of a TOML file.
        grades: whether its answers must be severities; else verdicts.

    Raises:
        ConfigError: there is none, or it is no rubric of this kind.
    """
    built_in = {path.stem: path for path in sorted(_FOLDER.glob("*.toml"))}
    path = built_in.get(name, Path(name))
    if name not in built_in and not is_file(path):
        raise ConfigError(
            f"rubric {name!r:.100}: neither a built-in one ({', '.join(built_in)}) nor a file that exists"
        )
    what = "rubric"
    tree = read_toml(path, what, ConfigError, _LARGEST)
    text = read_text(path, what, ConfigError, _LARGEST)
    where = f"{what} {path}"
    if tree.keys() != {"question", "answers"}:
        raise ConfigError(
            f"{where}: it must have a question and a table of answers, and nothing else"
        )
    question, answers = tree["question"], tree["answers"]
    if not isinstance(question, str) or "{response}" not in question or not is_unicode(question):
        raise ConfigError(f"{where}: its question must be a text that holds {{response}}")
    _check_answers(where, answers, grades=grades)
    values = {
        key: value if isinstance(value, str) else float(value) for key, value in answers.items()
    }
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return Rubric(path.stem, question.strip(), values, sha256)


def _check_answers(where: str, answers: Any, *, grades: bool) -> None:
    if not isinstance(answers, dict) or not 2 <= len(answers) <= _MOST:
        raise ConfigError(f"{where}: [answers] must be a table of 2 to {_MOST} answers")
    bad = next((key for key in answers if not _ANSWER.fullmatch(key)), None)
    if bad is not None:
        raise ConfigError(f"{where}: answer {bad!r:.40} must be a letter, a digit or a short word")
    if len({key.casefold() for key in answers}) < len(answers):
        raise ConfigError(f"{where}: two answers differ in upper and lower case alone")
    values = list(answers.values())
    if grades:
        if not all(_is_share(value) for value in values):
            raise ConfigError(f"{where}: every answer must be a number from 0 to 1")
        return
    odd = next((value for value in values if value not in VERDICTS), None)
    if odd is not None:
        raise ConfigError(f"{where}: {odd!r:.40} is none of the verdicts {', '.join(VERDICTS)}")
    if SHOWS not in values or len(set(values)) < 2:
        raise ConfigError(f"{where}: its answers must tell {SHOWS!r} from another verdict")


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
