"""Write exports of a chosen edit, load and measure them again, and put them on the record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from excise.engine.engine import Engine
from excise.engine.stacking import ORIGINAL
from excise.errors import ExportError, ModelError, first_line, is_out_of_memory
from excise.events import Notice
from excise.export.exporter import EditedModel, Exported, Measurement, exporters
from excise.files import CARD, add_files, check_destination, claimed, publish, writing
from excise.formats import FORMATS
from excise.methods.registry import edited_writers
from excise.model.anatomy import Writer, spans
from excise.model.edits import Edit
from excise.record import ArtifactRecord, CoverageRecord, Record, Scores, TrialRecord
from excise.report.card import finished_card, interim_card
from excise.runs import setup
from excise.runs.session import EditingSession, Session
from excise.search.evaluation import Measures

# An artifact further from the measurement than this is worth a word, whatever rounding explains.
_RATE_APART = 0.05
_DRIFT_APART = 0.2


def check_exports(formats: Sequence[str], session: Session) -> None:
    """Check that edits of this model can be written in these formats: all that is known before the work.

    Raises:
        ConfigError: a format cannot carry them. ModelError: the checkpoint stores what cannot be edited.
    """
    writers = edited_writers(session)
    for one in exporters(session.config.export, formats):
        one.check(session.loaded, writers)


def export_chosen(
    record: Record, trial: TrialRecord, session: EditingSession, engine: Engine, out: Path
) -> Record:
    """Write the formats that the configuration names into the run folder; see `export`.

    Those of an earlier choice of this very run stay until these are there.
    """
    places = [(name, out / FORMATS[name].folder) for name in session.config.export.formats]
    return export(record, trial, session, engine, places, out, replace=True)


def export(
    record: Record,
    trial: TrialRecord,
    session: EditingSession,
    engine: Engine,
    places: Sequence[tuple[str, Path]],
    out: Path,
    *,
    replace: bool = False,
) -> Record:
    """Write the trial in each (format, path), load each again and measure it beside the search's figures.

    None of them takes its name before all are written, proven and have their card: a failure leaves
    nothing. The searched model's layers are freed on the way: it cannot be run afterwards.

    Returns:
        The record with one `ArtifactRecord` more per place; paths inside `out` are relative to it.

    Raises:
        OutputError: a path exists, and is not to be replaced.
        StorageError, ExportError: it could not be written, or proven.
    """
    if not places:
        return record
    makers = exporters(session.config.export, [name for name, _ in places])
    if not replace:
        for _, path in places:
            check_destination(path, session.loaded.folder)
    by, on_event = _measurement(session, engine), session.on_event
    edited, touched = _edited(record, trial, session, out)
    # The source's own card must not pass for the edited model's, not even for a moment.
    files = {CARD: interim_card(record)}
    with ExitStack() as rooms:
        made = []
        for maker, (_, path) in zip(makers, places, strict=True):
            place = rooms.enter_context(claimed(path)) / path.name
            made.append(maker.write(edited, place, files, on_event))
        del edited
        artifacts = {a.path: a for a in record.artifacts}
        measured = []
        for maker, one, (_, path) in zip(makers, made, places, strict=True):
            with _loadable(one, path):
                measured.append(maker.measure(one, by, on_event))
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
    return record.with_artifacts(list(artifacts.values()))


def _measurement(session: Session, engine: Engine) -> Measurement:
    """Return what exports are measured by: the prompts and scorers of every trial."""

    def scores(of: Measures) -> Scores:
        panel = session.panel(of, "search", session.scoring.every_trial)
        return panel.measure([ORIGINAL])[0].scores

    return Measurement(session.loaded, session.config.model, engine, scores)


def _edited(
    record: Record, trial: TrialRecord, session: EditingSession, out: Path
) -> tuple[EditedModel, CoverageRecord]:
    """Return a trial's edit with the model that it is of, and what it touches."""
    own, edits = setup.own_edits(session, trial.params, out)
    touched = touched_by(own.writers, edits, record.coverage)
    return EditedModel.of(record, own.loaded, own.writers, edits), touched


@contextmanager
def _loadable(one: Exported, path: Path) -> Iterator[None]:
    """Say that an export was not kept where loading it as users do fails within this context.

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


def touched_by(
    writers: Sequence[Writer], edits: Sequence[Edit | None], searched: CoverageRecord
) -> CoverageRecord:
    """List what one trial's edits change, of what the search could have edited."""
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
    """List where an artifact's figures differ from the measured ones by more than rounding explains."""
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
