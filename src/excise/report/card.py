"""The model card of an export: a README.md for the Hugging Face Hub, written from a record alone.

The text is `data/card.md.j2`; here is what it shows. It holds no prompt text, no response and no local
path, whatever the record holds.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Template

from excise.errors import InputError, first_line
from excise.events import Notice, OnEvent
from excise.formats import DEFAULT, FORMATS
from excise.record import ArtifactRecord, Record, TrialRecord
from excise.report import formatting, views
from excise.report.card_loading import files_of, usages
from excise.report.markdown import Markdown, environment, plain
from excise.report.rerun_command import command, withheld

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_FUNCTIONS = (
    *(formatting.chance, formatting.count, formatting.difference, formatting.heading),
    *(formatting.inline, formatting.points),
    *(formatting.large, formatting.measured, formatting.parameter, formatting.public_source),
    *(
        formatting.judge_words,
        formatting.judged_by,
        formatting.role_words,
        formatting.sample,
        formatting.size,
        formatting.spread,
        formatting.title,
    ),
    formatting.with_unit,
)


def model_card(
    record: Record,
    *,
    artifact_format: str = DEFAULT,
    trial: int | None = None,
    artifact: ArtifactRecord | None = None,
    repo: str | None = None,
) -> str:
    """Return the README.md of an exported trial, the selected one unless `trial` names another.

    Args:
        record: of the run.
        artifact_format: one of `formats.FORMATS`.
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
    artifact = artifact or views.artifact_of(record, artifact_format, shown.number)
    return _template().render(
        _of_the_run(record)
        | _of_the_trial(record, shown)
        | _of_the_export(record, artifact_format, artifact, repo)
    )


def interim_card(record: Record) -> str:
    """Return what stands in an export until it has been loaded again and measured."""
    return (
        f"# {plain(_short_name(record))}, edited\n\n"
        "An edited model, written with Excise and not measured yet: this is not its model card.\n"
    )


def card_of(record: Record, artifact: ArtifactRecord) -> str:
    """Return the card of an export on the record."""
    return model_card(
        record, artifact_format=artifact.format, trial=artifact.trial, artifact=artifact
    )


def finished_card(record: Record, artifact: ArtifactRecord, on_event: OnEvent) -> str:
    """Return the card of an export that was measured; what is wrong with it takes no model with it."""
    try:
        return card_of(record, artifact)
    except Exception as error:  # noqa: BLE001 (said here, and as an error once all is written)
        on_event(
            Notice(f"the card of {artifact.format} could not be made: {first_line(error):.200}")
        )
        return interim_card(record)


@cache
def _template() -> Template:
    functions = {function.__name__: function for function in _FUNCTIONS}
    return environment(**functions).get_template("card.md.j2")


def _of_the_run(record: Record) -> dict[str, Any]:
    return {
        "record": record,
        "model": record.model,
        "name": formatting.model_name(record.model.source),
        "short_name": _short_name(record),
        "origin": formatting.origin(record.model.source),
        "behaviour": views.behaviour(record),
        "strengthened": views.strengthened(record),
        "safeguard": views.is_safeguard(record) and not views.strengthened(record),
        "trial_counts": views.trial_counts(record),
        "confirmed": views.confirmed(record),
        "formatting_notes": views.formatting_notes(record),
        "max_new_tokens": views.setting(record, "scores", "max_new_tokens"),
        "thresholds": formatting.thresholds(),
        "sampling": {k: v for k, v in record.model.sampling.items() if k != "do_sample"},
        "command": command(record),
        "withheld": withheld(record),
    }


def _of_the_trial(record: Record, trial: TrialRecord) -> dict[str, Any]:
    sets, front = views.prompt_sets(record, trial), views.front_points(record, trial.number)
    prompts = sets[-1]  # those whose figures to quote
    before, after = prompts.before, prompts.after
    return {
        "trial": trial,
        "prompt_sets": sets,
        "prompts": prompts,
        "before": before,
        "after": after,
        "effect": formatting.assess(after, before),
        "change": formatting.change(after.get("behaviour_rate"), before.get("behaviour_rate")),
        "scores": views.score_names((), before, after),
        "benchmarks": [one for one in record.benchmarks if one.trial == trial.number],
        "objectives": [name for name in record.objectives if name in after],
        "figures": views.side_by_side(record, sets),
        "few": views.FEW if views.leaves_out_groups(sets) else None,
        "front": front,
        "front_scores": views.score_names(record.objectives, *(p.trial.scores for p in front)),
    }


def _of_the_export(
    record: Record, artifact_format: str, artifact: ArtifactRecord | None, repo: str | None
) -> dict[str, Any]:
    found = artifact.details if artifact is not None else {}
    files = files_of(artifact)
    return {
        "artifact": artifact,
        "format": FORMATS[artifact_format],
        "metadata": Markdown(_metadata(record, artifact_format)),
        "coverage": (artifact and artifact.coverage) or record.coverage,
        "export_scores": views.score_names((), artifact.expected, artifact.measured)
        if artifact is not None
        else [],
        "export_details": {k: v for k, v in found.items() if isinstance(v, str | int | float)},
        "files": files,
        "files_measured": any(one.edited is not None for one in files),
        "projector": bool(found.get("joined")) or any(o.part == "projector" for o in files),
        "usages": usages(record, artifact_format, artifact, repo),
    }


def _metadata(record: Record, artifact_format: str) -> str:
    shape = FORMATS[artifact_format]
    base = formatting.hub_id(record.model.source)
    tags = ["excise", "model-editing"]
    if views.is_safeguard(record) and not views.strengthened(record):
        tags.append("abliteration")
    tags += shape.tags
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
    """Return a licence, or the list of several, as metadata name them."""
    several = (stated or "").split(", ")
    plain_ids = len(several) > 1 and all(_LICENCE.fullmatch(one) for one in several)
    return several if plain_ids else stated


def _short_name(record: Record) -> str:
    return formatting.model_name(record.model.source).rpartition("/")[2]
