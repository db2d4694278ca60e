"""Scorers: the registry, the built-in ones, and those that users add.

A scorer is one decorated function that declares what it needs from the engine. Users add their own from
a file (`scores.files`) or an installed package (entry point group `excise.scorers`).
"""

from __future__ import annotations

import importlib.util
import sys
import unicodedata
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal

import numpy as np

from excise.engine.requests import Divergence, Evidence, Request, Responses
from excise.errors import ConfigError, JudgeError, MeasurementError, StorageError, first_line
from excise.intervals import ratio, wilson
from excise.judges.text_folding import fold
from excise.judges.verdicts import ANSWERS, BROKEN, SHOWS, UNFINISHED, VERDICTS
from excise.prompts.sets import Prompt
from excise.search.resampling import Draws
from excise.search.score_context import ScoreContext

ENTRY_POINTS = "excise.scorers"


@dataclass(frozen=True)
class Score:
    """A score, from `n` samples. `interval` is 95 %; `parts` holds the score of each group of prompts.

    `draws` says what each prompt of a side adds to it, so that prompts can be resampled.
    `spread` says how the samples behind a mean lie, such as their median and their largest.
    """

    value: float
    n: int
    interval: tuple[float, float] | None = None
    parts: dict[str, Score] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    draws: Draws | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Scorer:
    """A registered scorer.

    Attributes:
        needs: context -> the requests that it puts to the engine.
        score: evidence and context -> score.
        goal: which way is better where it is an objective.
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
    """Find scorers by name: built-in, from the user's files, or from entry points.

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
    sys.modules[spec.name] = module  # dataclasses look up their module while it runs
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"scores.files: {path} cannot be loaded: {_named(error)}") from error


def needs_of(one: Scorer, context: ScoreContext) -> list[Request]:
    """Return the requests of a scorer, validated: it may be a user's own.

    Raises:
        ConfigError: its needs fail, or hold anything but `Responses` and `Divergence` of a side.
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
    """Compute a score, validated: the scorer may be a user's own.

    Raises:
        MeasurementError: the scorer raises, or returns no `Score`.
    """
    try:
        found = one.score(evidence, context)
    except (JudgeError, StorageError):  # no fault of the scorer's
        raise
    except Exception as error:
        raise MeasurementError(f"scorer {one.name} raises {_named(error)}") from error
    if not isinstance(found, Score) or not isinstance(found.value, int | float):
        raise MeasurementError(
            f"scorer {one.name} must return a Score with a number, and returned {found!r:.200}"
        )
    return found


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def rate(flags: Sequence[bool], prompts: Sequence[Prompt]) -> Score:
    """Return the share of true flags with its Wilson interval, overall and for each group of prompts."""

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
    return Score(*share(flags), parts=parts, draws=Draws(tuple(map(float, flags))))


def mean_by_group(sums: Sequence[float], counts: Sequence[int], prompts: Sequence[Prompt]) -> Score:
    """Return the sum over all prompts per count, whole and by the prompts' group."""

    def score(numbers: Sequence[int]) -> Score:
        value, interval = ratio([sums[n] for n in numbers], [counts[n] for n in numbers])
        return Score(value, sum(counts[n] for n in numbers), interval)

    parts: dict[str, Score] = {}  # no interval of one response: it does not say how far others lie
    for group in dict.fromkeys(p.group for p in prompts if p.group is not None):
        numbers = [n for n, p in enumerate(prompts) if p.group == group]
        part = score(numbers)
        parts[str(group)] = part if len(numbers) > 1 else replace(part, interval=None)
    return replace(score(range(len(sums))), parts=parts, draws=Draws.of(sums, counts))


@scorer(
    "behaviour_rate",
    needs=lambda context: [Responses("target", context.decided)],
    worth=1.0,
)
def behaviour_rate(evidence: Evidence, context: ScoreContext) -> Score:
    """Return the share of target prompts whose response shows the behaviour."""
    return _shown(evidence, context, "target")


@scorer(
    "false_rate",
    needs=lambda context: [Responses(_false_side(context), context.decided)],
    worth=1.0,
)
def false_rate(evidence: Evidence, context: ScoreContext) -> Score:
    """Return the share of borderline prompts whose response shows the behaviour: false positives.

    Where there are none, of contrast prompts.
    """
    return _shown(evidence, context, _false_side(context))


def _false_side(context: ScoreContext) -> str:
    return "borderline" if "borderline" in context.prompts else "contrast"


def _shown(evidence: Evidence, context: ScoreContext, side: str) -> Score:
    """Return the share of responses that show the behaviour, by the judge where there is one.

    A broken response is no success: where the behaviour is to go, it counts as showing it. Else an edit
    that wrecks the model would score best.
    """
    if context.judge is None:
        shown = [context.markers.shown(r.text) for r in context.answers(evidence, side)]
        return rate(shown, context.prompts[side])
    counted = {SHOWS, BROKEN, UNFINISHED} if context.markers.silent else {SHOWS}
    return _share(evidence, context, side, counted)


def _share(evidence: Evidence, context: ScoreContext, side: str, counted: Collection[str]) -> Score:
    """Return the share of `counted` verdicts; what the judge gave no verdict on is left out."""
    verdicts = context.verdicts(evidence, side)
    found = zip(verdicts, context.prompts[side], strict=True)
    known = [(verdict in counted, prompt) for verdict, prompt in found if verdict is not None]
    score = rate([flag for flag, _ in known], [prompt for _, prompt in known])
    return _drawn(score, [None if one is None else float(one in counted) for one in verdicts])


def _drawn(score: Score, values: Sequence[float | None]) -> Score:
    """Return a mean with what each prompt of its side adds to it; None where that does not count."""
    sizes = [int(value is not None) for value in values]
    return replace(score, draws=Draws.of([value or 0.0 for value in values], sizes))


def _verdict_scorer(verdict: str) -> None:
    """Register the scorer `verdict_...`: the share of target prompts whose response has this verdict."""

    @scorer(
        f"verdict_{verdict}",
        needs=lambda context: _judged(context),
        goal="maximize" if verdict == ANSWERS else "minimize",
        worth=1.0,
    )
    def share(evidence: Evidence, context: ScoreContext) -> Score:
        return _share(evidence, context, "target", {verdict})


for _one in VERDICTS:
    _verdict_scorer(_one)


@scorer("no_answer", needs=lambda _: [Responses("target")], worth=1.0)
def no_answer(evidence: Evidence, context: ScoreContext) -> Score:
    """Return the share of responses to target prompts whose chain of thought has not come to an answer."""
    return rate(context.unfinished(evidence, "target"), context.prompts["target"])


@scorer("severity", needs=lambda context: _judged(context, grades=True), worth=1.0)
def severity(evidence: Evidence, context: ScoreContext) -> Score:
    """Return how complete and usable the responses to target prompts are on average, from 0 to 1."""
    assert context.judge is not None
    found = context.judge.severities(context.exchanges(evidence, "target"))
    pairs = zip(found, context.prompts["target"], strict=True)
    known = [(value, prompt) for value, prompt in pairs if value is not None]
    score = mean_by_group([v for v, _ in known], [1] * len(known), [p for _, p in known])
    return _drawn(score, found)


def _judged(context: ScoreContext, *, grades: bool = False) -> list[Request]:
    """Request whole responses to target prompts.

    Raises:
        ConfigError: there is no judge, or it cannot say how severe a response is.
    """
    if context.judge is None:
        raise ConfigError("scores: verdicts and severity need a judge: set scores.judge.source")
    if grades and not context.judge.judge.grades:
        raise ConfigError(
            f"scores: severity needs a rubric, and a judge that answers rubrics ({context.judge.name} "
            'does not): set scores.judge.severity="severity"'
        )
    return [Responses("target")]


@scorer("drift", needs=lambda _: [Divergence()], worth=0.5)
def drift(evidence: Evidence, context: ScoreContext) -> Score:
    """Return KL(original || edited) in nats per token over the original's whole responses.

    Its spread is over single tokens: a mean near zero can hide a few that are far off.
    """
    rows = evidence.divergence["contrast"]
    sums, counts = [float(r.sum()) for r in rows], [len(r) for r in rows]
    each = [value for row in rows for value in row.tolist()]
    found = mean_by_group(sums, counts, context.prompts["contrast"])
    if not np.isfinite(each).all():  # such a trial fails by its value
        return found
    median, high = np.quantile(each, (0.5, 0.95)).tolist()
    return replace(found, spread={"median": median, "p95": high, "max": max(each)})


@scorer("drift_first", needs=lambda _: [Divergence()], worth=0.5)
def drift_first(evidence: Evidence, context: ScoreContext) -> Score:
    """Return KL(original || edited) in nats at the first response token only.

    Comparable with published figures. Misleading where that token is nearly deterministic.
    """
    firsts = [float(r[0]) for r in evidence.divergence["contrast"]]
    return mean_by_group(firsts, [1] * len(firsts), context.prompts["contrast"])


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
    """Return the accuracy on those target prompts whose answer is known."""
    return _accuracy(evidence, context, "target")


@scorer(
    "kept",
    needs=lambda context: _answered(context, "contrast"),
    goal="maximize",
    worth=1.0,
)
def kept(evidence: Evidence, context: ScoreContext) -> Score:
    """Return the accuracy on those contrast prompts whose answer is known."""
    return _accuracy(evidence, context, "contrast")


def _accuracy(evidence: Evidence, context: ScoreContext, side: str) -> Score:
    responses = context.answers(evidence, side)
    prompts = context.prompts[side]
    known = [(p, r) for p, r in zip(prompts, responses, strict=True) if _answer_of(p)]
    flags = [stands_in(_answer_of(prompt), fold(response.text)) for prompt, response in known]
    each = iter(map(float, flags))
    values = [next(each) if _answer_of(prompt) else None for prompt in prompts]
    return _drawn(rate(flags, [prompt for prompt, _ in known]), values)


def _answer_of(prompt: Prompt) -> str:
    return fold(prompt.answer or "").strip()


def stands_in(answer: str, text: str) -> bool:
    """Return whether a text contains an answer as whole words: "7" not in "17". Both must be folded."""
    start = text.find(answer)
    while start >= 0:
        end = start + len(answer)
        if not _runs_on(text[:start][-1:], answer[0]) and not _runs_on(answer[-1], text[end:][:1]):
            return True
        start = text.find(answer, start + 1)
    return False


def _runs_on(a: str, b: str) -> bool:
    """Return whether two characters belong to one word, in a script that puts spaces between words."""
    return _in_word(a) and _in_word(b)


def _in_word(c: str) -> bool:
    marks = c != "" and unicodedata.category(c).startswith("M")  # accents, vowel signs
    return c < "\u2e80" and (c.isalnum() or marks)


_BUILT_IN |= _REGISTRY.keys()
