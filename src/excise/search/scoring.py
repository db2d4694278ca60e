"""The scorers of a run, by when they are used, and the markers that they search for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from excise.config import Config
from excise.errors import ConfigError
from excise.events import OnEvent
from excise.judges.markers import Markers, read_markers
from excise.judges.opening import verdicts_of
from excise.judges.verdicts import VERDICTS, Verdicts
from excise.prompts.measured_sets import MeasuredSets
from excise.prompts.sets import PromptSet
from excise.search.pareto import Objective
from excise.search.score_context import Answer, ScoreContext
from excise.search.scorers import (
    Scorer,
    find_scorers,
    needs_of,
)

VERDICT_SCORES = tuple(f"verdict_{verdict}" for verdict in VERDICTS)
JUDGED = frozenset({"behaviour_rate", "false_rate", *VERDICT_SCORES, "severity"})


@dataclass(frozen=True)
class Scoring:
    """The markers of a run, and its scorers: objectives, further figures of every trial, and final ones.

    With a `judge`, its verdicts stand in place of the markers'.
    """

    markers: Markers
    objectives: tuple[Scorer, ...] = ()
    report: tuple[Scorer, ...] = ()
    final: tuple[Scorer, ...] = ()
    judge: Verdicts | None = None

    @property
    def every_trial(self) -> tuple[Scorer, ...]:
        """The scorers that measure every trial."""
        return self.objectives + self.report

    def goals(self) -> list[Objective]:
        """Return the objectives of the front, with their directions and worths."""
        return [
            Objective(s.name, 1 if s.goal == "minimize" else -1, s.worth) for s in self.objectives
        ]

    def check(self, sets: MeasuredSets) -> None:
        """Ask every scorer for its needs, so that a missing answer column is reported before any work.

        Raises:
            ConfigError: a scorer needs what the prompts do not have.
        """
        for scorer in (*self.objectives, *self.report, *self.final):
            needs_of(scorer, self.context(sets.part("search")))
        for scorer in self.objectives if sets.part("confirm") else ():
            needs_of(scorer, self.context(sets.part("confirm")))
        for scorer in self.final:
            needs_of(scorer, self.context(sets.part("holdout")))

    def context(self, part: Mapping[str, PromptSet], answer: Answer | None = None) -> ScoreContext:
        """Return the context of scorers that measure the sets of `part`, by side."""
        prompts = {side: one.prompts for side, one in part.items()}
        return ScoreContext(self.markers, prompts, self.judge, answer)

    @property
    def judged(self) -> list[str]:
        """The names of the scores that come of the judge's verdicts."""
        if self.judge is None:
            return []
        names = [one.name for one in (*self.every_trial, *self.final)]
        return [name for name in dict.fromkeys(names) if name in JUDGED]


def scoring_by_judge(config: Config, on_event: OnEvent, judge_token: str | None = None) -> Scoring:
    """Find the scorers that a configuration names, and open the judge if it names one.

    Raises:
        ConfigError: as `scoring_of` and `verdicts_of`.
        ModelError: the judge cannot be loaded.
        PromptError: what it is to be certified on cannot be read.
    """
    return replace(scoring_of(config), judge=verdicts_of(config, on_event, judge_token))


def scoring_of(config: Config) -> Scoring:
    """Find the scorers that a configuration names.

    Every trial has `behaviour_rate`, `drift` and `drift_first` (contract), asked for or not.

    Raises:
        ConfigError: a scorer is unknown, or there is no objective, or no markers.
    """
    section = config.scores
    if not section.objectives:
        raise ConfigError("scores.objectives is empty: name at least one scorer")
    always: tuple[str, ...] = ("behaviour_rate", "drift", "drift_first")
    if section.judge.source:
        always += (
            VERDICT_SCORES if section.judge.severity is None else (*VERDICT_SCORES, "severity")
        )
    if config.prompts.borderline:
        always += ("false_rate",)
    if config.prompts.thinking:
        always += ("no_answer",)
    report = dict.fromkeys((*always, *section.report))
    names = [name for name in report if name not in section.objectives]
    files = section.files
    objectives = find_scorers(section.objectives, files)
    markers = markers_of(config)
    if config.goal == "strengthen":
        objectives = [_maximised(scorer) for scorer in objectives]
    return Scoring(
        markers,
        tuple(objectives),
        tuple(find_scorers(names)),
        tuple(find_scorers(section.final)),
    )


def markers_of(config: Config) -> Markers:
    """Return the markers of a configuration: none where a judge stands in their place and none are named.

    Raises:
        ConfigError: they cannot be read, or there are none and no judge.
    """
    section = config.scores
    silent = config.goal != "strengthen"
    if section.judge.source and not section.markers and section.markers_file is None:
        return Markers((), silent)
    return replace(read_markers(section.markers, section.markers_file), silent=silent)


def _maximised(scorer: Scorer) -> Scorer:
    """Turn the behaviour rate into an objective to maximise; return other scorers as they are."""
    if scorer.name != "behaviour_rate":
        return scorer
    return replace(scorer, goal="maximize")
