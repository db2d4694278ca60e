"""Exports of a chosen edit: written, loaded again, measured again, and put on the record."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from excise.checkpoints.discovery import anatomy_of
from excise.checkpoints.gguf_header import GgufFile, read_gguf
from excise.checkpoints.loading import Loaded, load
from excise.checkpoints.model_folder import library_errors, read_generation
from excise.config import Config
from excise.engine.engine import Engine, Reference
from excise.errors import ExportError, ModelError, first_line, is_out_of_memory
from excise.events import Notice, OnEvent, phase
from excise.export.formats import (
    Exported,
    check_formats,
    export_adapter,
    export_safetensors,
    rank_for,
    writes_checkpoint,
)
from excise.export.matching import check_stored
from excise.files import CARD, add_files, check_destination, claimed, publish, writing
from excise.gguf.export import (
    MODELFILE,
    GgufPlan,
    architecture_of,
    export_gguf,
    export_gguf_adapter,
    export_patched,
    file_stem,
    plan_gguf,
)
from excise.gguf.measure import GgufJob, measure_gguf
from excise.gguf.ollama import Template, modelfile
from excise.gguf.patching import patched_name
from excise.methods.registry import Method
from excise.model.anatomy import Writer, spans
from excise.model.edits import Edit
from excise.model.parameters import any_offloaded
from excise.prompts.chat_template import special_tokens
from excise.prompts.template_sources import own_template
from excise.prompts.tokens import end_tokens
from excise.reading import is_file
from excise.record import ArtifactRecord, CoverageRecord, Record, Scores, TrialRecord
from excise.report.card import finished_card, interim_card
from excise.report.formatting import public_source
from excise.runs import setup
from excise.search.evaluation import Panel
from excise.search.scorers import ScoreContext

FOLDERS = {
    "safetensors": "model",
    "adapter": "adapter",
    "gguf": "gguf",
    "gguf-adapter": "gguf-adapter",
}

# An artifact further from the measurement than this is worth a word, whatever rounding explains.
_RATE_APART = 0.05
_DRIFT_APART = 0.2
_LICENCE = 1 << 20  # characters of a licence's text that go into a Modelfile


@dataclass(frozen=True)
class Checker:
    """Measures a loaded artifact on the search prompts, against the original that was searched."""

    engine: Engine
    scoring: setup.Scoring
    context: ScoreContext
    config: Config
    tokens: setup.Tokens

    def measure(self, loaded: Loaded, reference: Reference) -> Scores:
        """Scores of a model as it is loaded, with no edit on top."""
        engine = Engine(
            loaded,
            (),
            self.engine.prompts,
            max_new_tokens=self.config.scores.max_new_tokens,
            plan=self.engine.plan,
            reference=reference,
            spoken=self.engine.spoken,
        )
        panel = Panel(engine, self.scoring.every_trial, self.context)
        return panel.measure([[]])[0].scores


def check_exports(formats: Sequence[str], loaded: Loaded, config: Config) -> None:
    """Whether edits of this model can be written in these formats: all that is known before the work.

    Raises:
        ConfigError: a format cannot carry them. ModelError: the checkpoint stores what cannot be edited.
    """
    writers = loaded.anatomy.select(config.edit.components)
    rank, offloaded = config.export.adapter_rank, any_offloaded(loaded.model)
    check_formats(formats, writers, offloaded=offloaded, rank=rank)
    if writes_checkpoint(config.export, formats):
        check_stored(loaded.folder, writers)
    if "gguf-adapter" in formats and config.export.from_gguf is None:
        architecture_of(loaded.anatomy.model_type, None)


def export_chosen(
    record: Record,
    trial: TrialRecord,
    loaded: Loaded,
    method: Method,
    checker: Checker,
    out: Path,
    on_event: OnEvent,
) -> Record:
    """Write the formats that the configuration names into the run folder; see `export`.

    Those of an earlier choice of this very run stay until these are there.
    """
    places = [(name, out / FOLDERS[name]) for name in checker.config.export.formats]
    return export(record, trial, loaded, method, checker, places, out, on_event, replace=True)


def export(
    record: Record,
    trial: TrialRecord,
    loaded: Loaded,
    method: Method,
    checker: Checker,
    places: Sequence[tuple[str, Path]],
    out: Path,
    on_event: OnEvent,
    *,
    replace: bool = False,
) -> Record:
    """Write the trial in each (format, path), load each again and measure it beside the search's figures.

    None of them takes its name before all are written, proven and have their card: a failure leaves
    nothing. The searched model's layers are let go of on the way: `loaded` cannot be run afterwards.

    Returns:
        The record with one `ArtifactRecord` more per place; paths inside `out` are relative to it.

    Raises:
        OutputError: a path exists, and is not to be replaced.
        StorageError, ExportError: it could not be written, or proven.
    """
    if not places:
        return record
    plan = plan_gguf(checker.config.export, [name for name, _ in places])
    if not replace:
        for _, path in places:
            check_destination(path, loaded.folder)
    config, tokens = checker.config, checker.tokens
    source, writers, edits = setup.own_edits(
        loaded, method, trial.params, tokens, config, out, on_event
    )
    with ExitStack() as rooms:
        made = []
        for name, path in places:
            place = rooms.enter_context(claimed(path)) / path.name
            parts = (record, source, writers, edits, checker, plan, on_event)
            made.append(_write(name, place, *parts))
        touched = touched_by(writers, edits, record.coverage)
        del source, writers, edits, parts
        artifacts = {a.path: a for a in record.artifacts}
        measured = _measure(made, places, loaded, checker, plan, on_event)
        for (one, scores), (_, path) in zip(measured, places, strict=True):
            for line in apart(trial.scores, scores):
                on_event(Notice(f"{one.format}: {line}"))
            artifact = _artifact(one, _relative(path, out), trial, scores, touched)
            artifacts.pop(artifact.path, None)  # the newest is the last
            artifacts[artifact.path] = artifact
            card = finished_card(record, artifact, on_event)
            with writing(path):
                add_files(one.path, {CARD: card})
        for one, (_, path) in zip(made, places, strict=True):
            publish(one.path, path, replace=replace)
    return record.model_copy(update={"artifacts": list(artifacts.values())})


def _measure(
    made: Sequence[Exported],
    places: Sequence[tuple[str, Path]],
    loaded: Loaded,
    checker: Checker,
    plan: GgufPlan,
    on_event: OnEvent,
) -> list[tuple[Exported, Scores]]:
    """Every export as its users load it, and its scores; `places` are where they will stand."""
    engine, config = checker.engine, checker.config
    scorers, limit = checker.scoring.every_trial, config.scores.max_new_tokens
    job = GgufJob(loaded, engine.prompts, scorers, checker.context, limit, engine.spoken)
    dtype, device = loaded.dtype, loaded.device
    out = []
    reference: Reference | None = None
    for one, (_, path) in zip(made, places, strict=True):
        if one.format.startswith("gguf"):
            with _loadable(one, path):
                out.append(measure_gguf(one, plan, job, on_event))
            continue
        reference = reference or engine.as_reference()
        with phase(f"measure {one.format}", on_event):
            with _loadable(one, path), library_errors(f"the {one.format} export"):
                again = _load_again(one, loaded, config, dtype)
            out.append((one, checker.measure(again, reference)))
            del again
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return out


@contextmanager
def _loadable(one: Exported, path: Path) -> Iterator[None]:
    """Within this context an export is loaded as its users will; one that cannot be is not kept.

    Raises:
        ExportError: it cannot be loaded; `path` is where it would have stood.
    """
    try:
        yield
    except (ModelError, ExportError) as error:
        if is_out_of_memory(error):
            raise
        reason = first_line(error).replace(str(one.path), one.format)
        raise ExportError(
            f"the {one.format} export to {path} cannot be loaded again, so it was not kept: {reason}"
        ) from error


def _write(
    name: str,
    path: Path,
    record: Record,
    loaded: Loaded,
    writers: Sequence[Writer],
    edits: Sequence[Edit | None],
    checker: Checker,
    plan: GgufPlan,
    on_event: OnEvent,
) -> Exported:
    named = {w.name: e for w, e in zip(writers, edits, strict=True) if e is not None}
    # The source's own card must not pass for the edited model's, not even for a moment.
    files = {CARD: interim_card(record)}
    section = checker.config.export
    stem = f"{file_stem(public_source(record.model.source).rpartition('/')[2])}-edited"
    if name == "safetensors":
        return export_safetensors(loaded.folder, path, named, writers, on_event, files)
    if name == "gguf":
        describe = partial(_modelfile, loaded, record)
        if plan.base is not None:
            target = patched_name(plan.base)
            files[MODELFILE] = describe(read_gguf(plan.base), target, None)
            return export_patched(path, named, writers, loaded.model, plan.base, on_event, files)
        return export_gguf(
            loaded.folder, path, named, writers, plan, stem, on_event, files, describe
        )
    if name == "gguf-adapter":
        return export_gguf_adapter(
            path,
            named,
            writers,
            architecture=architecture_of(loaded.anatomy.model_type, plan.base),
            layers=len(loaded.anatomy.layers),
            rank=section.adapter_rank or rank_for(named, writers, section.adapter_error),
            name=stem,
            on_event=on_event,
            extra_files=files,
        )
    return export_adapter(
        loaded.published,
        path,
        named,
        writers,
        rank=section.adapter_rank or rank_for(named, writers, section.adapter_error),
        revision=loaded.revision,
        on_event=on_event,
        extra_files=files,
    )


def _modelfile(
    loaded: Loaded, record: Record, head: GgufFile, model: str, projector: str | None
) -> str:
    """Ollama's Modelfile for the GGUF called `model`, whose header is `head`."""
    tokenizer = loaded.tokenizer
    found = own_template(tokenizer, loaded.folder)
    template = None if found is None else Template(found[0], special_tokens(tokenizer))
    ends = sorted(end_tokens(loaded.model, tokenizer))
    licence, file = record.model.license, _licence_file(loaded.folder)
    if file is not None:
        with file.open(encoding="utf-8", errors="replace") as opened:
            licence = opened.read(_LICENCE)
    return modelfile(
        model,
        head,
        template,
        [str(tokenizer.decode([number])) for number in ends],
        read_generation(loaded.folder),
        projector=projector,
        licence=licence,
    )


def _licence_file(folder: Path) -> Path | None:
    return next((path for path in sorted(folder.glob("LICENSE*")) if is_file(path)), None)


def _load_again(one: Exported, source: Loaded, config: Config, dtype: torch.dtype) -> Loaded:
    """The artifact as its users load it, in the dtype that the search measured in."""
    name = str(dtype).removeprefix("torch.")
    if one.format == "safetensors":
        section = config.model.model_copy(
            update={"source": str(one.path), "revision": None, "gguf_file": None, "dtype": name}
        )
        return load(section)
    from peft import PeftModel

    fields = {"source": str(source.folder), "gguf_file": None, "dtype": name}
    base = load(config.model.model_copy(update=fields))
    merged: Any = PeftModel.from_pretrained(base.model, one.path).merge_and_unload()
    merged.eval().requires_grad_(False)
    return Loaded(
        model=merged,
        tokenizer=base.tokenizer,
        anatomy=anatomy_of(merged),
        source=str(one.path),
        revision=None,
        folder=base.folder,
        dtype=base.dtype,
    )


def touched_by(
    writers: Sequence[Writer], edits: Sequence[Edit | None], searched: CoverageRecord
) -> CoverageRecord:
    """What one trial's edits touch, of what the search could have edited."""
    edited, left = [], []
    for name in dict.fromkeys(writer.component for writer in writers):
        mine = [n for n, writer in enumerate(writers) if writer.component == name]
        layers = [writers[n].layer for n in mine if edits[n] is not None]
        if layers:
            edited.append(f"{name}: {len(layers)} of {len(mine)} matrices, layers {spans(layers)}")
        else:
            left.append(f"{name}: {len(mine)} matrices, left alone by this edit")
    return CoverageRecord(edited=edited, not_edited=[*left, *searched.not_edited])


def _artifact(
    one: Exported, path: str, trial: TrialRecord, measured: Scores, touched: CoverageRecord
) -> ArtifactRecord:
    return ArtifactRecord(
        path=path,
        format=one.format,
        sha256=one.sha256,
        files=one.files,
        trial=trial.number,
        bytes=one.bytes,
        expected=trial.scores,
        measured=measured,
        coverage=touched,
        details=one.details,
    )


def _relative(path: Path, out: Path) -> str:
    inside, root = path.resolve(), out.resolve()
    return str(inside.relative_to(root)) if inside.is_relative_to(root) else str(inside)


def apart(expected: Scores, measured: Scores) -> list[str]:
    """Where an artifact's figures stand further from the measured ones than rounding explains."""
    lines = []
    for name, score in expected.items():
        other = measured.get(name)
        if other is None:
            continue
        limit = _RATE_APART
        if name.startswith("drift"):
            limit = _DRIFT_APART * score.value + 1e-4
        if abs(score.value - other.value) > limit:
            lines.append(f"{name} was {score.value:.4g} in the search, is {other.value:.4g} now")
    return lines
