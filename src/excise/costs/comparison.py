"""Runs and edited models at matched behaviour rates, from their records: no model is loaded for a run.

Figures of unlike prompts, models or markers are never put beside each other silently: what differs is
named, and with it the figures that may not be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from excise.costs.likeness import MEASURED_HERE, Facts, Unlike, facts_of, unlike
from excise.errors import ConfigError, RunStateError
from excise.events import Notice, OnEvent, ignore
from excise.reading import full_path, is_file, is_folder
from excise.record import ArtifactRecord, BenchmarkRecord, Record, Scores, TrialRecord
from excise.report import formatting
from excise.report.stored_record import FILE, read_record
from excise.report.views import PromptSet, evidence, score_names, strengthened

LIMITS = (0.02, 0.05, 0.10, 0.20)
MOST = 12  # runs and models in one comparison
_OTHER = -2  # stands for the number of a model's only candidate


@dataclass(frozen=True)
class Side:
    """A run or a model.

    Attributes:
        name: as it was given.
        label: a shorter name, its own in the comparison.
        what: what it is, in words.
        facts: what its figures depend on.
        trials: what may be matched, with scores on the search prompts; of a model itself alone.
        front: those of them that are drawn.
        chosen: the trial that it selected; None where it has selected none.
        quoted: its figures on the prompts to quote, beside its original's.
        benchmarks: of the chosen trial.
        seeks: whether the behaviour was to be strengthened.
    """

    name: str
    label: str
    what: str
    facts: Facts
    trials: list[TrialRecord]
    front: list[TrialRecord]
    chosen: TrialRecord | None
    quoted: PromptSet
    benchmarks: list[BenchmarkRecord]
    seeks: bool


@dataclass(frozen=True)
class Match:
    """What each side has at one limit of the behaviour rate, in their order; None: no trial keeps it."""

    limit: float
    trials: list[TrialRecord | None]


@dataclass(frozen=True)
class Comparison:
    """Several sides, what differs between what their figures depend on, and their matched trials."""

    sides: list[Side]
    differences: list[Unlike]
    matches: list[Match]

    @property
    def seeks(self) -> bool:
        """Return whether the sides strengthen a behaviour: a limit is then of what is missing to 1."""
        return self.sides[0].seeks

    def matched_scores(self) -> list[str]:
        """Return the scores of matched trials, the usual ones first."""
        return score_names((), *(t.scores for m in self.matches for t in m.trials if t is not None))

    def quoted_scores(self) -> list[str]:
        """Return the scores of chosen trials, the usual ones first."""
        return score_names((), *(side.quoted.after for side in self.sides))

    def may_compare(self, name: str) -> bool:
        """Return whether a score was measured alike on all sides, on the search prompts."""
        return not any(one.touches(name) for one in self.differences if not one.holdout)

    @property
    def one_set(self) -> bool:
        """Return whether the figures of chosen trials are all of the holdout, or all of search prompts."""
        return len({side.quoted.name for side in self.sides}) == 1

    def may_quote(self, name: str) -> bool:
        """Return whether a score of chosen trials was measured alike."""
        # Those of search prompts are not of the holdout's.
        holdout = self.sides[0].quoted.name == "holdout"
        found = [one for one in self.differences if holdout or not one.holdout]
        return self.one_set and not any(one.touches(name) for one in found)


def number_of(trial: TrialRecord) -> str:
    """Return a trial's number; a dash for a model that is no trial."""
    return formatting.MISSING if trial.number == _OTHER else str(trial.number)


def compare(
    names: Sequence[str],
    *,
    trust_run: bool = False,
    judge_token: str | None = None,
    on_event: OnEvent = ignore,
) -> Comparison:
    """Compare runs, their exports, and models of any tool.

    A model that no record tells of is measured as the first run among them was, against its original.

    Args:
        names: run folders, record files, and models: folders, GGUF files or Hub ids.
        trust_run: let code run that the first run's settings name, where a model is measured.
        judge_token: what a server that judges is shown.
        on_event: told of progress.

    Raises:
        ConfigError: fewer than two, one twice, no run first, or goals that cannot be matched.
        RunStateError: a record cannot be read, or the first run's prompts or original have changed.
        ModelError: a model cannot be loaded.
    """
    if not 2 <= len(names) <= MOST:
        raise ConfigError(f"name 2 to {MOST} runs or models to compare, not {len(names)}")
    places = [_place(name) for name in names]
    again = [name for name, place in zip(names, places, strict=True) if places.count(place) > 1]
    if again:
        raise ConfigError(f"{again[-1]} is named twice")
    lasts = [place.name for place in places]
    labels = [n if lasts.count(last) > 1 else last for n, last in zip(names, lasts, strict=True)]
    found = [_recorded(name, label) for name, label in zip(names, labels, strict=True)]
    run = first_run(names)
    if run is None and None in found:
        raise ConfigError(
            f"{names[found.index(None)]} has no record, and no finished run is among these, with whose "
            "prompts it could be measured: name one (`excise evaluate` compares a model with its original)"
        )
    sides = []
    for name, label, known in zip(names, labels, found, strict=True):
        if known is None and run is not None:
            on_event(Notice(f"{name}: no record tells of it; it is measured as {run} was"))
            known = _measured(name, label, run, trust_run, judge_token, on_event)
        if known is not None:
            sides.append(known)
    if len({side.seeks for side in sides}) > 1:
        raise ConfigError(
            "some of these remove the behaviour and some strengthen it: no rates match, compare them apart"
        )
    matches = [Match(limit, [_at(side, limit) for side in sides]) for limit in LIMITS]
    differences = unlike([side.label for side in sides], [side.facts for side in sides])
    return Comparison(sides, differences, matches)


def first_run(names: Sequence[str]) -> Path | None:
    """Return the folder of the first run among these; None where there is none."""
    return next((_place(name) for name in names if _is_run(_place(name))), None)


def _place(name: str) -> Path:
    """Return the absolute path of a run, or of a model that may also be a Hub id."""
    place = full_path(Path(name))
    return place.parent if place.name == FILE else place


def _is_run(place: Path) -> bool:
    return is_file(place / FILE)


def _recorded(name: str, label: str) -> Side | None:
    """Return a run, or an export that the record of its run tells of; None for other models.

    Raises:
        RunStateError: a folder holds neither a record nor a model.
    """
    place = _place(name)
    if _is_run(place):
        return _of_run(name, label, read_record(place))
    if not is_folder(place):
        return None
    for folder in place.parents[:2]:
        if is_file(folder / FILE):
            record = read_record(folder)
            for artifact in reversed(record.artifacts):
                if full_path(folder / artifact.path) == place and artifact.measured:
                    return _of_export(name, label, folder, record, artifact)
    if not is_file(place / "config.json"):
        raise RunStateError(
            f"{name} holds neither {FILE} nor a model: the run has not finished (`excise resume {name}`), "
            "or this is no run folder"
        )
    return None


def _of_run(name: str, label: str, record: Record) -> Side:
    trials = [t for t in record.trials if t.state == "complete" and not t.screened]
    chosen = None if record.selected is None else record.chosen()
    by = formatting.judged_by("behaviour_rate", record)
    what = f"{record.method}, {formatting.count(len(record.trials), 'trial')}, seed {record.seed}"
    return Side(
        name=name,
        label=label,
        what=f"{what}; judged {by}" if by else what,
        facts=facts_of(record),
        trials=trials,
        front=[record.trial(number) for number in record.front],
        chosen=chosen,
        quoted=PromptSet("search", record.baseline, {})
        if chosen is None
        else evidence(record, chosen),
        benchmarks=[one for one in record.benchmarks if one.trial == record.selected],
        seeks=strengthened(record),
    )


def _of_export(
    name: str, label: str, folder: Path, record: Record, artifact: ArtifactRecord
) -> Side:
    """Return an export: what was measured on its files, and on the holdout where its trial was."""
    trial = record.trial(artifact.trial)
    here = trial.model_copy(update={"scores": artifact.measured})
    of_trial = evidence(record, trial)
    mine = PromptSet("search", record.baseline, artifact.measured)
    return Side(
        name=name,
        label=label,
        what=f"{artifact.format} export of trial {trial.number} of {folder.name} ({record.method})",
        facts=facts_of(record),
        trials=[here],
        front=[here],
        chosen=here,
        quoted=of_trial if of_trial.name == "holdout" else mine,
        benchmarks=[one for one in record.benchmarks if one.trial == trial.number],
        seeks=strengthened(record),
    )


def _measured(
    name: str,
    label: str,
    folder: Path,
    trust_run: bool,
    judge_token: str | None,
    on_event: OnEvent,
) -> Side:
    """Measure a model as a run was measured, against the run's original.

    Raises:
        RunStateError: the run's prompts are others now, or its original measures otherwise.
    """
    # What reads records alone loads no torch.
    from excise.prompts.sets import load_prompt_sets
    from excise.runs.changed_settings import check_settings, read_settings
    from excise.runs.finished_run import check_prompts, evaluate
    from excise.trees import absolute

    record = read_record(folder)
    config = read_settings(folder, trust=trust_run, unused=("export.llama_cpp",))
    config = check_settings(folder, config, record.config)
    sets = load_prompt_sets(config.prompts).all()
    check_prompts(
        record, tuple(one for one in sets if one.role != "keep")
    )  # nothing is edited here
    rows = evaluate(config, absolute(name), on_event, judge_token=judge_token)
    measured = {part: PromptSet(part, before, after) for part, before, after in rows}
    search = measured["search"]
    _check_original(folder, record, search.before)
    alone = TrialRecord(number=_OTHER, state="complete", params={}, scores=search.after, seconds={})
    return Side(
        name=name,
        label=label,
        what=MEASURED_HERE,
        facts=facts_of(record),
        trials=[alone],
        front=[alone],
        chosen=alone,
        quoted=measured.get("holdout", search),
        benchmarks=[],
        seeks=strengthened(record),
    )


def _check_original(folder: Path, record: Record, now: Scores) -> None:
    """Refuse an original whose behaviour rate is measurably not the recorded one."""
    rates = now.get("behaviour_rate"), record.baseline.get("behaviour_rate")
    if formatting.change(*rates) in ("less", "more"):
        new, old = (formatting.measured("behaviour_rate", rate) for rate in rates)
        raise RunStateError(
            f"the original of {folder} shows the behaviour at {new}, and at {old} in its record: it is "
            "another model now, and nothing can be measured against it"
        )


def _at(side: Side, limit: float) -> TrialRecord | None:
    """Return the trial with the least KL divergence among those that keep a limit of the behaviour rate."""

    def missing(trial: TrialRecord) -> float:
        rate = trial.scores["behaviour_rate"].value
        return 1 - rate if side.seeks else rate

    found = [
        trial
        for trial in side.trials
        if trial.scores.keys() >= {"behaviour_rate", "drift"} and missing(trial) <= limit + 1e-12
    ]
    return min(found, key=lambda t: (t.scores["drift"].value, missing(t)), default=None)
