"""The model card of an export: a README.md for the Hugging Face Hub, written from a record alone.

It says what was edited, what the figures hold of it, what that cost, and what was not measured. It holds
no prompt text, no response and no local path, whatever the record holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from huggingface_hub import ModelCardData

from excise.errors import InputError, first_line
from excise.events import Notice, OnEvent
from excise.record import ArtifactRecord, Record, ScoreRecord, TrialRecord
from excise.report import formatting
from excise.report.card_limits import limitations, responsible_use
from excise.report.card_loading import (
    FORMATS,
    credits_section,
    files_section,
    loading,
    sampling_section,
)
from excise.report.markdown import bullets, code, fence, plain, table
from excise.report.rerun_command import command, withheld
from excise.report.views import (
    PromptSet,
    Row,
    artifact_of,
    behaviour,
    evidence,
    formatting_notes,
    front_points,
    is_safeguard,
    prompt_sets,
    score_names,
    side_by_side,
    strengthened,
    trial_counts,
)

_ROLES = {
    "target": "evoke the behaviour; give the directions",
    "contrast": "do not evoke it; give the directions",
    "target_eval": "evoke the behaviour; score candidates",
    "contrast_eval": "do not evoke it; score candidates",
    "target_holdout": "evoke the behaviour; final measurement",
    "contrast_holdout": "do not evoke it; final measurement",
}

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_DETAILS = {
    "rank": "Rank of the adapter",
    "error": "Relative error of the adapter's weights (Frobenius norm, all modules)",
}


def model_card(
    record: Record,
    *,
    artifact_format: str = "safetensors",
    trial: int | None = None,
    artifact: ArtifactRecord | None = None,
    repo: str | None = None,
) -> str:
    """The README.md of an exported trial, the selected one unless `trial` names another.

    Args:
        record: of the run.
        artifact_format: one of `usage.FORMATS`.
        trial: its number.
        artifact: which export; by default the trial's last one in that format.
        repo: the Hub id that it is published under, where that is known.

    Raises:
        RunStateError: the trial does not exist, or none is selected.
        InputError: no such artifact format.
    """
    if artifact_format not in FORMATS:
        raise InputError(f"no model card for format {artifact_format!r}: {', '.join(FORMATS)}")
    shown = record.chosen() if trial is None else record.trial(trial)
    if artifact is not None:
        record = record.model_copy(update={"artifacts": [artifact]})
    artifact = artifact_of(record, artifact_format, shown.number)
    sections = [
        _introduction(record, shown),
        _details(record, shown, artifact_format, artifact),
        _edit(record, shown, artifact_format, artifact),
        _figures(record, shown),
        _formatting(record),
        _front(record, shown),
        _export_check(artifact),
        files_section(artifact),
        loading(record, artifact_format, artifact, repo),
        sampling_section(record),
        _list_section("Limitations", limitations(record, shown, artifact_format)),
        _responsible_use(record, shown),
        _reproduction(record),
        credits_section(record, artifact_format),
    ]
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{_metadata(record, artifact_format)}\n---\n\n{body}\n"


def interim_card(record: Record) -> str:
    """What stands in an export until it has been loaded again and measured; then its card does."""
    return (
        f"# {plain(_short_name(record))}, edited\n\n"
        "An edited model, written with Excise and not measured yet: this is not its model card.\n"
    )


def card_of(record: Record, artifact: ArtifactRecord) -> str:
    """The card of an export on the record."""
    return model_card(
        record, artifact_format=artifact.format, trial=artifact.trial, artifact=artifact
    )


def finished_card(record: Record, artifact: ArtifactRecord, on_event: OnEvent) -> str:
    """The card of an export that was measured; what is wrong with it takes no model with it."""
    try:
        return card_of(record, artifact)
    except Exception as error:  # noqa: BLE001 (said here, and as an error once all is written)
        on_event(
            Notice(f"the card of {artifact.format} could not be made: {first_line(error):.200}")
        )
        return interim_card(record)


def _metadata(record: Record, artifact_format: str) -> str:
    shape = FORMATS[artifact_format]
    base = formatting.hub_id(record.model.source)
    tags = ["excise", "model-editing"]
    if is_safeguard(record) and not strengthened(record):
        tags.append("abliteration")
    if artifact_format.startswith("gguf"):
        tags.append("gguf")
    licences: Any = _licences(record.model.license)
    data = ModelCardData(
        base_model=base,
        base_model_relation=shape.relation if base else None,
        license=licences,
        library_name=shape.library,
        pipeline_tag="image-text-to-text" if record.model.multimodal else "text-generation",
        tags=tags,
    )
    return str(data.to_yaml())


def _licences(stated: str | None) -> str | list[str] | None:
    """A licence, or the list of several, as metadata name them."""
    several = (stated or "").split(", ")
    plain_ids = len(several) > 1 and all(_LICENCE.fullmatch(one) for one in several)
    return several if plain_ids else stated


def _introduction(record: Record, trial: TrialRecord) -> str:
    name = plain(formatting.public_source(record.model.source))
    prompts = evidence(record, trial)
    unseen = "that the search never saw" if prompts.name == "holdout" else "used by the search"
    effect = formatting.assess(prompts.after, prompts.before)
    aim = "more" if strengthened(record) else "less"
    return (
        f"# {plain(_short_name(record))}, edited: {plain(behaviour(record))}\n\n"
        f"This model is {name}, edited to show {aim} of one behaviour, "
        f"**{plain(behaviour(record))}**: its weights were changed on purpose, directly and without "
        f"further training. On prompts {unseen}, the edit {effect}{_headline(prompts)}. It was "
        f"found and measured with Excise{_version(record)}."
    )


def _headline(prompts: PromptSet) -> str:
    """The two figures that matter most, as the end of a sentence."""
    parts = []
    before, after = prompts.before.get("behaviour_rate"), prompts.after.get("behaviour_rate")
    if before is not None and after is not None:
        parts.append(
            f"the behaviour rate went from {formatting.measured('behaviour_rate', before)} to "
            f"{formatting.measured('behaviour_rate', after)}"
        )
    if "drift" in prompts.after:
        parts.append(f"drift is {formatting.with_unit('drift', prompts.after['drift'])}")
    return f": {', and '.join(parts)}" if parts else ""


def _short_name(record: Record) -> str:
    return formatting.public_source(record.model.source).rpartition("/")[2]


def _version(record: Record) -> str:
    return f" {plain(record.versions['excise'])}" if "excise" in record.versions else ""


def _details(
    record: Record, trial: TrialRecord, artifact_format: str, artifact: ArtifactRecord | None
) -> str:
    model = record.model
    rows = [
        ("Base model", code(formatting.public_source(model.source)) + _whereabouts(model.source)),
        ("Base revision", code(model.revision or "")),
        ("Licence of the base", plain(model.license or "not stated in the base model's files")),
        ("Architecture", f"{code(model.model_type)}, {model.layers} layers of width {model.width}"),
        ("Parameters", formatting.large(model.parameters)),
        ("Weights of the base", plain(" ".join(model.notes))),
        ("Measured in", f"{code(model.dtype)} on {plain(model.device)}"),
        ("Edited behaviour", plain(behaviour(record))),
        ("Method", plain(record.method)),
        ("Trial", f"{trial.number} of {len(record.trials)} ({_counts(record)})"),
        ("Chosen by", plain(record.selection) if trial.number == record.selected else "hand"),
        ("Format", FORMATS[artifact_format].words),
    ]
    if artifact is not None:
        rows.append(("Size of the weights", formatting.size(artifact.bytes)))
        rows.append(("SHA-256 of the weights", code(artifact.sha256)))
    return "## Model details\n\n" + table(("", ""), [row for row in rows if row[1]])


def _whereabouts(source: str) -> str:
    return "" if formatting.hub_id(source) else " (a local folder)"


def _counts(record: Record) -> str:
    return ", ".join(f"{count} {word}" for word, count in trial_counts(record).items())


def _edit(
    record: Record, trial: TrialRecord, artifact_format: str, artifact: ArtifactRecord | None
) -> str:
    parts = ["## What was edited"]
    coverage = (artifact and artifact.coverage) or record.coverage
    if coverage.edited:
        parts.append("Edited:\n\n" + bullets(map(plain, coverage.edited)))
    if coverage.not_edited:
        parts.append("Not edited:\n\n" + bullets(map(plain, coverage.not_edited)))
    parts.append(FORMATS[artifact_format].rest)
    if trial.params:
        rows = [(code(key), code(_parameter(value))) for key, value in trial.params.items()]
        parts.append("### Parameters\n\n" + table(("Parameter", "Value"), rows))
    return "\n\n".join(parts)


def _parameter(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _figures(record: Record, trial: TrialRecord) -> str:
    """Before and after, the holdout beside the search prompts where there is one."""
    sets = prompt_sets(record, trial)
    rows = side_by_side(record, sets)
    head = ["Score", *(f"{s.name}: {c}" for s in sets for c in ("original", "edited", "n"))]
    cells = [[_row_label(row), *_row_cells(row)] for row in rows]
    return "\n\n".join(
        [
            "## Figures",
            "In brackets: 95 % intervals. *Search* prompts chose the edit; *holdout* prompts were "
            "measured once, after it was chosen."
            if len(sets) > 1
            else "In brackets: 95 % intervals. These prompts also chose the edit.",
            table(head, cells, "l" + "rrr" * len(sets)),
            _legend(row.name for row in rows if row.group is None),
        ]
    )


def _formatting(record: Record) -> str:
    notes = formatting_notes(record)
    return _list_section("How prompts were put to the model", notes) if notes else ""


def _row_label(row: Row) -> str:
    label = plain(formatting.heading(row.name))
    return label if row.group is None else f"{label}, group {code(row.group)}"


def _row_cells(row: Row) -> list[str]:
    return [
        cell
        for pair in row.cells.values()
        for cell in (
            formatting.measured(row.name, pair.before),
            formatting.measured(row.name, pair.after),
            formatting.sample(row.name, pair.after or pair.before),
        )
    ]


def _legend(names: Iterable[str]) -> str:
    return bullets(
        f"**{plain(formatting.title(name))}**: {plain(formatting.meaning(name))}."
        for name in names
        if formatting.meaning(name)
    )


def _front(record: Record, trial: TrialRecord) -> str:
    points = front_points(record, trial.number)
    if not points:
        return ""
    names = score_names(record.objectives, *(point.trial.scores for point in points))
    rows = [
        [
            f"**{point.trial.number}** (this model)" if point.chosen else str(point.trial.number),
            *(formatting.measured(name, point.trial.scores.get(name)) for name in names),
            plain(point.words),
        ]
        for point in points
    ]
    head = ["Trial", *(plain(formatting.heading(name)) for name in names), "In words"]
    return "\n\n".join(
        [
            "## Other trade-offs that the search found",
            "Trials that no other trial beats on every objective, measured on the search prompts, "
            "from the gentlest to the strongest.",
            table(head, rows, "l" + "r" * len(names) + "l"),
            plain(formatting.thresholds()),
        ]
    )


def _export_check(artifact: ArtifactRecord | None) -> str:
    if artifact is None or not artifact.measured:
        return ""
    names = score_names((), artifact.expected, artifact.measured)
    rows = [_export_row(n, artifact.expected.get(n), artifact.measured.get(n)) for n in names]
    parts = [
        "## Export check",
        "The exported files were loaded again and measured on the search prompts, beside what the "
        "search measured before the export.",
        table(("Score", "Expected", "Measured on these files", "Difference"), rows, "lrrr"),
    ]
    details = [
        f"{plain(_DETAILS.get(key, key))}: {code(_parameter(value))}"
        for key, value in artifact.details.items()
        if isinstance(value, str | int | float)
    ]
    return "\n\n".join([*parts, bullets(details)] if details else parts)


def _export_row(
    name: str, expected: ScoreRecord | None, measured: ScoreRecord | None
) -> tuple[str, ...]:
    difference = formatting.MISSING
    if expected is not None and measured is not None:
        difference = formatting.number(name, measured.value - expected.value).replace(
            " %", " points"
        )
    return (
        plain(formatting.heading(name)),
        formatting.measured(name, expected),
        formatting.measured(name, measured),
        difference,
    )


def _list_section(heading: str, lines: list[str]) -> str:
    return f"## {heading}\n\n" + bullets(map(plain, lines))


def _responsible_use(record: Record, trial: TrialRecord) -> str:
    return "\n\n".join(["## Responsible use", *map(plain, responsible_use(record, trial))])


def _reproduction(record: Record) -> str:
    parts = ["## How to reproduce", fence(command(record), "sh")]
    hidden = withheld(record)
    if hidden:
        keys = ", ".join(map(code, hidden))
        parts.append(f"The run also set {keys}, whose text this card does not show.")
    if record.prompts:
        rows = [
            (role, _ROLES.get(role, ""), code(formatting.public_source(p.source)), f"{p.n:,}",
             code(p.sha256))
            for role, p in record.prompts.items()
        ]  # fmt: skip
        head = ("Prompt set", "Its prompts", "Source", "n", "SHA-256")
        parts.append(table(head, [(code(r), *rest) for r, *rest in rows]))
    if record.versions:
        versions = [(plain(name), code(value)) for name, value in record.versions.items()]
        parts.append(table(("Software", "Version"), versions))
    parts.append(f"Seed {record.seed}. SHA-256 of the base model's configuration: "
                 f"{code(record.model.config_sha256)}.")  # fmt: skip
    return "\n\n".join(parts)
