"""What the card, the report and the console show of a record, as plain data: pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from excise.methods.profiles import Candidate, from_params, hill_of, shares_of
from excise.record import ArtifactRecord, Record, ScoreRecord, Scores, TrialRecord
from excise.report.formatting import assess

FEW = 5  # a group of fewer prompts says too little for a row of its own
_FIRST = (
    *("behaviour_rate", "drift", "drift_first", "false_rate", "restored", "kept"),
    *("verdict_shows", "verdict_answers", "verdict_other", "verdict_broken", "severity"),
)
# Behaviours that stand between a model and misuse: the card speaks of safeguards then.
_SAFEGUARD = re.compile(
    r"refus|declin|safety|safeguard|guardrail|alignment|censor|moderation|harmful|complian",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class FrontPoint:
    """One point of the front, with its assessment in words."""

    trial: TrialRecord
    chosen: bool
    words: str


@dataclass(frozen=True)
class PromptSet:
    """The measurements of the original and of the edited model on one set of prompts."""

    name: str
    before: Scores
    after: Scores


@dataclass(frozen=True)
class Comparison:
    """One score before and after."""

    before: ScoreRecord | None
    after: ScoreRecord | None


@dataclass(frozen=True)
class Row:
    """One score, or one group of its prompts, on every prompt set it was measured on, by name."""

    name: str
    group: str | None
    cells: dict[str, Comparison]


@dataclass(frozen=True)
class Shape:
    """The strengths of an edit: component -> strength per layer (L), and what they say."""

    index: float | None
    strengths: dict[str, list[float]]
    note: str


def front_points(record: Record, chosen: int | None = None) -> list[FrontPoint]:
    """Return the front from the gentlest to the strongest edit; `chosen` defaults to the selected."""
    chosen = record.selected if chosen is None else chosen
    points = [
        FrontPoint(trial, number == chosen, assess(trial.scores, record.baseline))
        for number in record.front
        for trial in [record.trial(number)]
    ]
    return sorted(points, key=lambda point: _gentleness(record, point.trial.scores))


def _gentleness(record: Record, scores: Scores) -> float:
    name = drift_axis(record)
    return scores[name].value if name in scores else 0.0


def drift_axis(record: Record) -> str:
    """Return the objective that is an edit's cost: drift, else the last one."""
    return "drift" if "drift" in record.objectives else record.objectives[-1]


def score_names(objectives: Iterable[str], *tables: Scores) -> list[str]:
    """Return every score's name: objectives, built-in ones in their usual order, then the others."""
    present = dict.fromkeys(name for table in tables for name in table)
    return [name for name in dict.fromkeys([*objectives, *_FIRST, *present]) if name in present]


def prompt_sets(record: Record, trial: TrialRecord) -> list[PromptSet]:
    """Return search prompts, and the others where `trial` is the one that was measured on the holdout."""
    selected = trial.number == record.selected
    before = record.baseline | (record.final_baseline if selected else {})
    after = trial.scores | (record.final if selected else {})
    sets = [PromptSet("search", before, after)]
    if selected and record.holdout:
        if trial.confirm:
            sets.append(PromptSet("confirm", {}, trial.confirm))
        sets.append(PromptSet("holdout", record.holdout_baseline, record.holdout))
    return sets


def evidence(record: Record, trial: TrialRecord) -> PromptSet:
    """Return the prompts whose figures to quote: the holdout where there is one."""
    return prompt_sets(record, trial)[-1]


def side_by_side(record: Record, sets: list[PromptSet]) -> list[Row]:
    """Return every score before and after, sets beside each other; a score's large groups follow it."""
    rows = []
    for name in score_names(record.objectives, *(t for s in sets for t in (s.before, s.after))):
        whole = {s.name: Comparison(s.before.get(name), s.after.get(name)) for s in sets}
        both = [score for c in whole.values() for score in (c.before, c.after)]
        groups = dict.fromkeys(group for score in both for group in large_groups(score))
        rows.append(Row(name, None, whole))
        rows += [Row(name, group, _of_group(whole, group)) for group in groups]
    return rows


def large_groups(score: ScoreRecord | None) -> Scores:
    """Return a score of each group that is large enough to say something.

    Tokens are counted where a score is of tokens: of one response they are many, and have no interval.
    """
    whole = score is not None and score.interval is not None
    return {
        group: part
        for group, part in _parts(score).items()
        if part.n >= FEW and not (whole and part.interval is None)
    }


def leaves_out_groups(sets: list[PromptSet]) -> bool:
    """Return whether some score has groups too small to be shown."""
    scores = [score for s in sets for t in (s.before, s.after) for score in t.values()]
    return any(len(large_groups(score)) < len(_parts(score)) for score in scores)


def _of_group(whole: dict[str, Comparison], group: str) -> dict[str, Comparison]:
    return {
        name: Comparison(_parts(c.before).get(group), _parts(c.after).get(group))
        for name, c in whole.items()
    }


def _parts(score: ScoreRecord | None) -> Scores:
    return (score.parts or {}) if score is not None else {}


def artifact_of(record: Record, file_format: str, number: int) -> ArtifactRecord | None:
    """Return the last export of this trial in this format."""
    found = [a for a in record.artifacts if a.format == file_format and a.trial == number]
    return found[-1] if found else None


def shape(record: Record, trial: TrialRecord) -> Shape | None:
    """Return the edit's strength over the layers; None for methods that have no profile."""
    layers = range(record.model.layers)
    if record.method == "ridge" and "overshoot" in trial.params:
        hill, peak = hill_of(trial.params), trial.params["overshoot"] + (not strengthened(record))
        whole = [peak * hill.strength(layer) for layer in layers]
        shares = shares_of(trial.params)
        lines = {name: [share * strength for strength in whole] for name, share in shares.items()}
        return Shape(
            None,
            {_leaders(record, shares): whole, **lines},
            "Strength per layer; 1 moves outputs on target prompts to their nearest contrast outputs.",
        )
    if record.method != "directional" or "direction_scope" not in trial.params:
        return None
    candidate: Candidate = from_params(trial.params)
    strengths = {n: [candidate.strength(n, layer) for layer in layers] for n in candidate.profiles}
    source = "One direction everywhere, taken from the marked layer."
    if candidate.index is None:
        source = "Each layer uses its own direction."
    return Shape(candidate.index, strengths, f"Strength per layer. {source}")


def _leaders(record: Record, shares: Mapping[str, float]) -> str:
    """Return the edited components that are edited at full strength, by name."""
    names = [line.partition(":")[0] for line in record.coverage.edited]
    return ", ".join(name for name in names if name not in shares) or "all components"


def behaviour(record: Record) -> str:
    """Return the edited behaviour in words: its description, else its name."""
    return record.description.strip() or record.behaviour


def strengthened(record: Record) -> bool:
    """Return whether the run strengthened the behaviour instead of removing it."""
    return bool(setting(record, "goal", default="remove") == "strengthen")


def is_safeguard(record: Record) -> bool:
    """Return whether the behaviour reads like a safeguard against misuse, such as refusal."""
    return _SAFEGUARD.search(f"{record.behaviour} {record.description}") is not None


def confirmed(record: Record) -> int:
    """Count the trials that were measured again, on prompts that the search had not used."""
    return sum(trial.confirm is not None for trial in record.trials)


def trial_counts(record: Record) -> dict[str, int]:
    """Count trials by state, in words; states that do not occur are left out."""
    words = {"complete": "complete", "screened": "screened", "failed": "failed"}
    counts = dict.fromkeys([*words.values(), "unfinished"], 0)
    for trial in record.trials:
        state = "screened" if trial.screened else trial.state
        counts[words.get(state, "unfinished")] += 1
    return {word: count for word, count in counts.items() if count}


def formatting_notes(record: Record) -> list[str]:
    """Return how prompts were put to the model, where that needs saying, a sentence each."""
    opening = record.formatting.get("opening") or {}
    notes = [*record.formatting.get("notes", []), opening.get("note", "")]
    return [str(note) for note in notes if note]


def total_seconds(record: Record) -> float:
    """Return the run's time: its `total` where the record has one, else the sum of its phases."""
    return record.timing.get("total", sum(record.timing.values()))


def setting(record: Record, *path: str, default: Any = None) -> Any:
    """Return a value of the recorded configuration, or `default` where the record has none."""
    value: Any = record.config
    for key in path:
        if not isinstance(value, dict) or value.get(key) is None:
            return default
        value = value[key]
    return value
