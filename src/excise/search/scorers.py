"""What is measured of a candidate, and the built-in measurements.

A scorer is one decorated function that says what it needs from the engine. Users add their own from
a file (`scores.files`) or an installed package (entry point group `excise.scorers`).
"""

from __future__ import annotations

import importlib.util
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal

from excise.engine.requests import Divergence, Evidence, Request, Responses
from excise.errors import ConfigError, MeasurementError, first_line
from excise.prompts.sets import Prompt
from excise.reading import read_text
from excise.search.intervals import ratio, wilson
from excise.search.text_folding import fold, settled

ENTRY_POINTS = "excise.scorers"

LARGEST = 1 << 20  # bytes of a markers file
MOST = 10_000  # markers


@dataclass(frozen=True)
class Score:
    """One measurement. `interval` is 95 %; `parts` splits it by the prompts' group."""

    value: float
    n: int
    interval: tuple[float, float] | None = None
    parts: dict[str, Score] = field(default_factory=dict)


@dataclass(frozen=True)
class Markers:
    """Phrases that show the behaviour, compared after folding (see `folding`).

    `silent`: an empty response shows it too; not where the behaviour is wanted, or silence would be.
    """

    phrases: tuple[str, ...]
    silent: bool = True

    def found(self, text: str) -> bool:
        """Whether a phrase stands in the text: once true it stays true as the text goes on.

        So not yet where the text's last letter, which an accent may follow, belongs to it.
        """
        return self.holds(settled(text))

    def holds(self, text: str) -> bool:
        """Whether a phrase stands in a text that ends here."""
        folded = fold(text)
        return any(phrase in folded for phrase in self.phrases)

    def shown(self, text: str) -> bool:
        """Whether the response shows the behaviour."""
        return self.holds(text) if text.strip() else self.silent


@dataclass(frozen=True)
class ScoreContext:
    """What scorers know beside the evidence: the markers, and each side's prompts as measured."""

    markers: Markers
    prompts: dict[str, tuple[Prompt, ...]]


@dataclass(frozen=True)
class Scorer:
    """A registered scorer.

    Attributes:
        needs: the requests it puts to the engine.
        score: evidence and context -> score.
        goal: which way is better when it is an objective.
        worth: how much of it weighs as much as a whole unit of behaviour rate, for the knee.
    """

    name: str
    needs: Callable[[ScoreContext], Sequence[Request]]
    score: Callable[[Evidence, ScoreContext], Score]
    goal: Literal["minimize", "maximize"]
    worth: float | None


_REGISTRY: dict[str, Scorer] = {}
_BUILT_IN: set[str] = set()  # their names, once all of them are registered


def scorer(
    name: str,
    *,
    needs: Callable[[ScoreContext], Sequence[Request]],
    goal: Literal["minimize", "maximize"] = "minimize",
    worth: float | None = None,
) -> Callable[
    [Callable[[Evidence, ScoreContext], Score]], Callable[[Evidence, ScoreContext], Score]
]:
    """Register the decorated function as the scorer `name`.

    Raises:
        ConfigError: a built-in scorer has the name, or the goal is neither of the two.
    """

    def register(
        function: Callable[[Evidence, ScoreContext], Score],
    ) -> Callable[[Evidence, ScoreContext], Score]:
        if name in _BUILT_IN:
            raise ConfigError(f"scorer {name!r} is built in: give yours another name")
        if goal not in ("minimize", "maximize"):
            raise ConfigError(f"scorer {name!r}: its goal is minimize or maximize, not {goal!r}")
        _REGISTRY[name] = Scorer(name, needs, function, goal, worth)
        return function

    return register


def find_scorers(names: Sequence[str], files: Sequence[str] = ()) -> list[Scorer]:
    """The scorers of these names, from the built-in ones, the user's files, or entry points.

    Raises:
        ConfigError: a file cannot be loaded, or a name is not known.
    """
    for file in files:
        _load_file(Path(file))
    for name in names:
        if name not in _REGISTRY:
            for point in entry_points(group=ENTRY_POINTS, name=name):
                point.load()
        if name not in _REGISTRY:
            raise ConfigError(
                f"scores: no scorer {name!r}; known: {', '.join(sorted(_REGISTRY))} "
                "(add one with scores.files, or install a package that provides it)"
            )
    return [_REGISTRY[name] for name in names]


def _load_file(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(f"excise_scorer_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"scores.files: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up while it is being run
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"scores.files: {path} cannot be loaded: {_named(error)}") from error


def needs_of(one: Scorer, context: ScoreContext) -> list[Request]:
    """What a scorer, perhaps a user's own, asks of the engine.

    Raises:
        ConfigError: it asks for something else than the sides' responses and divergence.
    """
    try:
        found = one.needs(context)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"scorer {one.name}: its needs raise {_named(error)}") from error
    fit = isinstance(found, list | tuple) and all(
        isinstance(request, Responses | Divergence) and request.side in context.prompts
        for request in found
    )
    if not fit:
        sides = " or ".join(context.prompts)
        raise ConfigError(
            f"scorer {one.name}: its needs must be a list of Responses and Divergence of {sides}, and "
            f"are {found!r:.200}"
        )
    return list(found)


def score_of(one: Scorer, evidence: Evidence, context: ScoreContext) -> Score:
    """What a scorer, perhaps a user's own, makes of the evidence.

    Raises:
        MeasurementError: it raises, or gives no `Score`.
    """
    try:
        found = one.score(evidence, context)
    except Exception as error:
        raise MeasurementError(f"scorer {one.name} raises {_named(error)}") from error
    if not isinstance(found, Score) or not isinstance(found.value, int | float):
        raise MeasurementError(
            f"scorer {one.name} must return a Score with a number, and returned {found!r:.200}"
        )
    return found


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def read_markers(phrases: Sequence[str], file: str | None) -> Markers:
    """Markers from the configuration and from a file with one phrase a line (# begins a comment).

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
    if len(folded) > MOST:  # each is looked for after every token of every response
        raise ConfigError(f"{len(folded)} markers: give at most {MOST} phrases")
    return Markers(folded)


def rate(flags: Sequence[bool], prompts: Sequence[Prompt]) -> Score:
    """A share with its Wilson interval, whole and by the prompts' group."""

    def share(some: Sequence[bool]) -> tuple[float, int, tuple[float, float]]:
        n = len(some)
        return (sum(some) / n if n else 0.0), n, wilson(sum(some), n)

    groups = dict.fromkeys(p.group for p in prompts if p.group is not None)
    parts = {
        str(group): Score(
            *share([f for f, p in zip(flags, prompts, strict=True) if p.group == group])
        )
        for group in groups
    }
    return Score(*share(flags), parts=parts)


@scorer(
    "behaviour_rate",
    needs=lambda context: [Responses("target", context.markers.found)],
    worth=1.0,
)
def behaviour_rate(evidence: Evidence, context: ScoreContext) -> Score:
    """Share of target prompts whose response shows the behaviour."""
    return _shown(evidence, context, "target")


@scorer(
    "false_rate",
    needs=lambda context: [Responses("contrast", context.markers.found)],
    worth=1.0,
)
def false_rate(evidence: Evidence, context: ScoreContext) -> Score:
    """Share of contrast prompts whose response shows the behaviour: where it does not belong."""
    return _shown(evidence, context, "contrast")


def _shown(evidence: Evidence, context: ScoreContext, side: str) -> Score:
    shown = [context.markers.shown(r.text) for r in evidence.responses[side]]
    return rate(shown, context.prompts[side])


@scorer("drift", needs=lambda _: [Divergence()], worth=0.5)
def drift(evidence: Evidence, context: ScoreContext) -> Score:
    """KL(original || edited), nats per token, over the original's whole responses."""
    del context
    rows = evidence.divergence["contrast"]
    value, interval = ratio([float(r.sum()) for r in rows], [len(r) for r in rows])
    return Score(value, sum(len(r) for r in rows), interval)


@scorer("drift_first", needs=lambda _: [Divergence()], worth=0.5)
def drift_first(evidence: Evidence, context: ScoreContext) -> Score:
    """KL(original || edited) at the first response token only: comparable, and misleading."""
    del context
    firsts = [float(r[0]) for r in evidence.divergence["contrast"]]
    value, interval = ratio(firsts, [1] * len(firsts))
    return Score(value, len(firsts), interval)


def _answered(context: ScoreContext, side: str) -> list[Request]:
    """Request whole responses to prompts of which some have known answers.

    Raises:
        ConfigError: none has one, or one would stand in every response.
    """
    prompts = context.prompts[side]
    for prompt in prompts:
        if prompt.answer is not None and prompt.answer.strip() and not _answer_of(prompt):
            raise ConfigError(
                f"scores: restored and kept look for known answers in responses, and the {side} answer "
                f"{prompt.answer!r:.60} would stand in every one: leave it empty, or give words"
            )
    if not any(map(_answer_of, prompts)):
        raise ConfigError(
            f"scores: restored and kept need known answers, and {side} prompts have none: set "
            f"prompts.{side}.answer_column, or prompts.{side}_eval.answer_column and that of "
            f"{side}_holdout where these have sources of their own"
        )
    return [Responses(side)]


@scorer(
    "restored",
    needs=lambda context: _answered(context, "target"),
    goal="maximize",
    worth=1.0,
)
def restored(evidence: Evidence, context: ScoreContext) -> Score:
    """Score the share of true answers among target prompts whose answer is known."""
    return _true_answers(evidence, context, "target")


@scorer(
    "kept",
    needs=lambda context: _answered(context, "contrast"),
    goal="maximize",
    worth=1.0,
)
def kept(evidence: Evidence, context: ScoreContext) -> Score:
    """Score the share of true answers among contrast prompts whose answer is known."""
    return _true_answers(evidence, context, "contrast")


def _true_answers(evidence: Evidence, context: ScoreContext, side: str) -> Score:
    responses = evidence.responses[side]
    prompts = context.prompts[side]
    known = [(p, r) for p, r in zip(prompts, responses, strict=True) if _answer_of(p)]
    flags = [stands_in(_answer_of(prompt), fold(response.text)) for prompt, response in known]
    return rate(flags, [prompt for prompt, _ in known])


def _answer_of(prompt: Prompt) -> str:
    return fold(prompt.answer or "").strip()


def stands_in(answer: str, text: str) -> bool:
    """Whether an answer stands in a text as words of its own: "7" not in "17"; both folded."""
    start = text.find(answer)
    while start >= 0:
        end = start + len(answer)
        if not _runs_on(text[:start][-1:], answer[0]) and not _runs_on(answer[-1], text[end:][:1]):
            return True
        start = text.find(answer, start + 1)
    return False


def _runs_on(a: str, b: str) -> bool:
    """Whether two characters belong to one word, of a script that puts spaces between words."""
    return _in_word(a) and _in_word(b)


def _in_word(c: str) -> bool:
    marks = c != "" and unicodedata.category(c).startswith("M")  # accents, vowel signs
    return c < "\u2e80" and (c.isalnum() or marks)


_BUILT_IN |= _REGISTRY.keys()
