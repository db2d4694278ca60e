"""Validation of a stored study before its trials are used.

`journal` shows whether a line was changed. Here the contents are validated: the totals that were asked
for, and that every trial lies in the search space and was told the scores that were measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeGuard

import optuna
import pydantic
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from excise.errors import RunStateError
from excise.record import TrialRecord
from excise.search.loop import record_of, region_of_study
from excise.search.pareto import Objective

_MOST = 10**7  # trials of any plausible search
Space = Mapping[str, BaseDistribution]


class _Damaged(Exception):
    """The fault of a stored study."""


def check_study(
    study: optuna.Study, space: Space, objectives: Sequence[Objective], where: str
) -> None:
    """Refuse a study whose trials cannot come from this search.

    Args:
        study: the opened study.
        space: the search space of the method.
        objectives: those of the run, in the study's order.
        where: its file, for the message.

    Raises:
        RunStateError: the search cannot have written these totals or trials.
    """
    try:
        trials = study.get_trials(deepcopy=False)
        _check_totals(study.user_attrs.get("stops", []), len(trials))
        _check_told(study, len(objectives))
        for number, trial in enumerate(trials):
            _check_trial(trial, number, space, objectives)
    except _Damaged as damage:
        raise RunStateError(
            f"{where} cannot be resumed: {damage}; put it back as it was, or choose a new --out"
        ) from None


def _check_totals(stops: Any, there: int) -> None:
    if not (isinstance(stops, list) and all(_is_count(stop) for stop in stops)):
        raise _Damaged("the totals that were asked for are not a list of counts")
    if any(b <= a for a, b in pairwise(stops)):
        raise _Damaged("the totals that were asked for do not increase")
    if there > (stops[-1] if stops else 0):
        raise _Damaged(f"it has {there} trials, more than were asked for")


def _check_told(study: optuna.Study, objectives: int) -> None:
    """Check what a study holds of its region, its time and its random trials."""
    facts = study.user_attrs
    try:
        region = region_of_study(study)
    except pydantic.ValidationError:
        raise _Damaged("its region of interest cannot be read") from None
    if region is not None and not (
        len(region.edges) == objectives and all(edge.sound for edge in region.edges)
    ):
        raise _Damaged("its region of interest is not one of its objectives")
    spent = facts.get("spent", 0.0)
    if not isinstance(spent, int | float) or not 0 <= spent < math.inf:
        raise _Damaged("the seconds that it took are not a time")
    if not _is_count(facts.get("startup", 1)):
        raise _Damaged("the number of its random trials is not a count")


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST


def _check_trial(
    trial: FrozenTrial, number: int, space: Space, objectives: Sequence[Objective]
) -> None:
    if trial.number != number:
        raise _Damaged(f"trial {trial.number} stands where trial {number} belongs")
    wanted = set(space)
    for name, value in trial.params.items():
        known = space.get(name)
        if known is None:
            raise _Damaged(
                f"trial {number} has a parameter {name!r}, which this search does not have"
            )
        if trial.distributions.get(name) != known or not _within(known, value):
            raise _Damaged(f"trial {number}: its {name} is not in the range of this search")
    if trial.state.is_finished():
        if not wanted <= trial.params.keys():
            missing = min(wanted - trial.params.keys())
            raise _Damaged(f"trial {number} has no parameter {missing!r}")
        _check_scores(trial, objectives)


def _within(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return isinstance(value, int | float) and distribution.low <= value <= distribution.high


def _check_scores(trial: FrozenTrial, objectives: Sequence[Objective]) -> None:
    try:
        found: TrialRecord = record_of(trial)
    except (pydantic.ValidationError, AttributeError):
        raise _Damaged(f"trial {trial.number} has no readable scores") from None
    if trial.state == TrialState.FAIL and found.reason:
        return
    scores = [found.scores.get(objective.name) for objective in objectives]
    told = trial.values or []
    same = len(told) == len(scores) and all(
        score is not None and score.value == value and math.isfinite(value)
        for score, value in zip(scores, told, strict=True)
    )
    if trial.state != TrialState.COMPLETE or not same:
        raise _Damaged(f"trial {trial.number}: its scores are not what was measured")
