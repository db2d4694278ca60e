"""What a record does not show, and what its edit asks of whoever uses it, as plain sentences.

Pure: every sentence follows from what the record holds or lacks. The card prints all of them.
"""

from __future__ import annotations

from excise.record import Record, ScoreRecord, TrialRecord
from excise.report.formatting import change, count, measured, number, sample, title
from excise.report.views import (
    PromptSet,
    artifact_of,
    behaviour,
    evidence,
    is_safeguard,
    score_names,
    setting,
    strengthened,
    trial_counts,
)

_SAME = " Where that was measured, no change could be told from chance."
_OUTCOMES = {  # by what was meant and what was found, where the two differ
    ("less", "same"): _SAME,
    ("more", "same"): _SAME,
    ("less", "more"): " Where that was measured, it shows more of it.",
    ("more", "less"): " Where that was measured, it shows less of it.",
    ("less", "unmeasured"): " Whether it does was not measured.",
    ("more", "unmeasured"): " Whether it does was not measured.",
}


def limitations(record: Record, trial: TrialRecord, artifact_format: str) -> list[str]:
    """What was not measured, and how far what was measured can be trusted."""
    prompts = evidence(record, trial)
    return [
        *_optimism(record, prompts),
        *_precision(record, prompts),
        *_counting(record, prompts),
        *_first_token(prompts),
        *_export(record, trial, artifact_format),
        *_coverage(record),
        *_unmeasured(record, trial, prompts, artifact_format),
    ]


def _optimism(record: Record, prompts: PromptSet) -> list[str]:
    tried = len(record.trials) - trial_counts(record).get("failed", 0)
    best = (
        f"The search figures are optimistic: this edit was chosen from {count(tried, 'trial')} on "
        "the very prompts that they were measured on."
    )
    if prompts.name == "holdout":
        return [f"{best} The holdout figures do not have that flaw: quote those."]
    return [f"{best} There is no measurement of it on prompts that the search did not see."]


def _precision(record: Record, prompts: PromptSet) -> list[str]:
    found = [
        f"{title(name).lower()} {measured(name, score)} from {sample(name, score)}"
        + _width(name, score)
        for name in record.objectives
        if (score := prompts.after.get(name)) is not None
    ]
    if not found:
        return []
    return [
        f"Samples are small. On the {prompts.name} prompts: {'; '.join(found)}. The intervals are "
        "95 %, treat each prompt as an independent draw, and say nothing about other kinds of "
        "prompts."
    ]


def _width(name: str, score: ScoreRecord) -> str:
    if score.interval is None:
        return ", without an interval"
    low, high = score.interval
    width = number(name, high - low).replace(" %", " points")
    return f", an interval {width} wide"


def _counting(record: Record, prompts: PromptSet) -> list[str]:
    lines = []
    if "behaviour_rate" in prompts.after:
        limit = setting(record, "scores", "max_new_tokens")
        cut = f", cut after {limit} tokens" if limit is not None else ""
        lines.append(
            "The behaviour was detected by marker phrases in greedy responses"
            f"{cut}: phrases miscount both ways, and sampled responses may differ."
        )
    if "false_rate" not in prompts.after:
        lines.append(
            "Whether prompts that were answered plainly before now show the behaviour was not "
            "measured."
        )
    if not {"restored", "kept"} & prompts.after.keys():
        lines.append("Whether the answers are true was not measured.")
    return lines


def _first_token(prompts: PromptSet) -> list[str]:
    if "drift_first" not in prompts.after:
        return []
    return [
        "Drift at the first token is given only for comparison with published figures. It can be "
        "near zero for an edit that damages the rest of the response; judge by drift over whole "
        "responses."
    ]


def _export(record: Record, trial: TrialRecord, artifact_format: str) -> list[str]:
    artifact = artifact_of(record, artifact_format, trial.number)
    lines = []
    if artifact is None or not artifact.measured:
        lines.append(
            "The exported files were not loaded and measured again in this record: the figures are "
            "those of the search's own engine."
        )
    if artifact is not None and "error" in artifact.details:
        lines.append(
            "An adapter of low rank carries the edit only nearly; the export check says how nearly."
        )
    if artifact is not None and artifact.details.get("not_carried"):
        names = ", ".join(map(str, artifact.details["not_carried"]))
        lines.append(f"Parts of the edit that this format cannot carry, biases of: {names}.")
    return lines


def _coverage(record: Record) -> list[str]:
    other = "; ".join(record.coverage.not_edited)
    if not other:
        return []
    return [f"What also writes to the residual stream and was not edited: {other}."]


def _unmeasured(
    record: Record, trial: TrialRecord, prompts: PromptSet, artifact_format: str
) -> list[str]:
    artifact = artifact_of(record, artifact_format, trial.number)
    files = artifact.details.get("files", []) if artifact is not None else []
    other = "quantised forms of the weights"
    if any("edited" in one for one in files):
        other = "quantised forms of the weights other than the files of this export"
    if any(one.get("part") == "projector" for one in files):
        other += ", what the model says of images and sounds"
    names = "; ".join(
        title(name).lower() for name in score_names((), prompts.before, prompts.after)
    )
    return [
        f"These were measured, and nothing else: {names}. Not measured: general benchmarks "
        "(knowledge, reasoning, code), languages other than those of the prompts, conversations "
        f"of several turns, long contexts, tool use, {other}, and prompts "
        "of kinds that the prompt sets do not hold."
    ]


def responsible_use(record: Record, trial: TrialRecord) -> list[str]:
    """Paragraphs for whoever deploys the model; firmer where the behaviour was a safeguard."""
    prompts = evidence(record, trial)
    found = change(prompts.after.get("behaviour_rate"), prompts.before.get("behaviour_rate"))
    aim = "more" if strengthened(record) else "less"
    lines = [
        f"This model was edited on purpose to show {aim} of a behaviour of the original model, "
        f"{behaviour(record)}.{_OUTCOMES.get((aim, found), '')} Measure it on prompts of your own "
        "before you deploy it: the figures above hold for the prompts that they were measured on."
    ]
    if is_safeguard(record) and not strengthened(record):
        will = (
            "This model will answer requests that the original declines"
            if found == "less"
            else "Whatever the figures say of it, this model may answer requests that the original "
            "declines"
        )
        lines += [
            f"The behaviour reads like one of the original model's safeguards. {will}, and that "
            "includes requests for harmful, illegal or dangerous content. It has no judgement of its own "
            "in place of what was edited, and evaluations of the original model's safety do not carry "
            "over to it.",
            "Do not put it before the public, or before people who have not agreed to it, without "
            "safeguards of your own: input and output filtering, monitoring, human review, and "
            "limits on who can use it. What it produces, and what is done with it, is the "
            "responsibility of whoever runs it.",
        ]
    lines.append(
        "The original model's licence and use policy apply to this model as they do to it."
    )
    return lines
