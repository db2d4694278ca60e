"""The scorers of a run, by when they are used, and the markers that they search for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from excise.config import Config
from excise.errors import ConfigError
from excise.prompts.measured_sets import MeasuredSets
from excise.prompts.sets import PromptSet
from excise.search.pareto import Objective
from excise.search.scorers import (
    Markers,
    ScoreContext,
    Scorer,
    find_scorers,
    needs_of,
    read_markers,
)


@dataclass(frozen=True)
class Scoring:
    """The markers of a run, and its scorers: objectives, further figures of every trial, and final ones."""

    markers: Markers
    objectives: tuple[Scorer, ...] = ()
    report: tuple[Scorer, ...] = ()
    final: tuple[Scorer, ...] = ()

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
        for scorer in self.final:
            needs_of(scorer, self.context(sets.part("holdout")))

    def context(self, part: Mapping[str, PromptSet]) -> ScoreContext:
        """Return the context of scorers that measure the sets of `part`, by side."""
        return ScoreContext(self.markers, {side: one.prompts for side, one in part.items()})


def scoring_of(config: Config) -> Scoring:
    """Find the scorers that a configuration names.

    Every trial has `behaviour_rate`, `drift` and `drift_first` (contract), asked for or not.

    Raises:
        ConfigError: a scorer is unknown, or there is no objective, or no markers.
    """
    section = config.scores
    if not section.objectives:
        raise ConfigError("scores.objectives is empty: name at least one scorer")
    always = ("behaviour_rate", "drift", "drift_first")
    report = dict.fromkeys((*always, *section.report))
    names = [name for name in report if name not in section.objectives]
    files = section.files
    objectives = find_scorers(section.objectives, files)
    markers = read_markers(section.markers, section.markers_file)
    if config.goal == "strengthen":
        objectives = [_maximised(scorer) for scorer in objectives]
        markers = replace(markers, silent=False)
    return Scoring(
        markers,
        tuple(objectives),
        tuple(find_scorers(names)),
        tuple(find_scorers(section.final)),
    )


def _maximised(scorer: Scorer) -> Scorer:
    """Turn the behaviour rate into an objective to maximise; return other scorers as they are."""
    if scorer.name != "behaviour_rate":
        return scorer
    return replace(scorer, goal="maximize")
