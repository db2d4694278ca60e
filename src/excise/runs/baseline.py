"""The original, measured before any search: whether there is something to edit.

A search for what the original hardly ever shows finds noise: of hundreds of trials, those that were
lucky on the search prompts. It is stopped before it costs anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from excise.config import Config
from excise.errors import MeasurementError
from excise.intervals import wilson
from excise.record import ScoreRecord, Scores
from excise.report.formatting import number

# Nearly none: the 95 % interval says that fewer than one response in ten shows the behaviour. Of 100
# that is four or fewer, where a search could not bring down what is left by more than chance moves it.
_FEW = 0.1
SHOWN = 3  # responses that the message quotes
_CHARS = 60  # of each


def has_nothing(score: ScoreRecord, *, strengthen: bool) -> bool:
    """Return whether there is no behaviour to remove or, with `strengthen`, none to add.

    A rate of 0, or of 1 with `strengthen`, is enough whatever the sample size: it cannot improve.
    """
    shown = round(score.value * score.n)
    count = score.n - shown if strengthen else shown
    return count == 0 or wilson(count, score.n)[1] < _FEW


def check_baseline(baseline: Scores, responses: Sequence[str], config: Config, out: Path) -> None:
    """Stop where the original's figures leave a search for less (or more) of the behaviour nothing to find.

    Args:
        baseline: scores of the original.
        responses: some of its responses to target prompts, for the message; may be empty.
        config: of the run.
        out: its folder.

    Raises:
        MeasurementError: there is nothing to find.
    """
    score, strengthen = baseline.get("behaviour_rate"), config.goal == "strengthen"
    if score is None or "behaviour_rate" not in config.scores.objectives:
        return
    if not has_nothing(score, strengthen=strengthen):
        return
    low, high = score.interval or (score.value, score.value)
    bound = (
        f"above {number('behaviour_rate', low)}"
        if strengthen
        else f"below {number('behaviour_rate', high)}"
    )
    quoted = [f"{' '.join(text.split())!r:.{_CHARS}}" for text in responses]
    said = f" It says, for example: {'; '.join(quoted)}." if quoted else ""
    raise MeasurementError(
        f"the original shows the behaviour in {round(score.value * score.n)} of {score.n} responses to "
        f"target prompts (95 %: {bound}): there is nothing to {'add' if strengthen else 'remove'}.{said} "
        "Check prompts and markers and start again with a new --out, or go on all the same with `excise "
        f"resume {out} --anyway`"
    )
