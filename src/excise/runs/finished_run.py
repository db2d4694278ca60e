"""Export, survey and reopen finished runs, and evaluate models that others edited."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from excise.capture.geometry import describe_layers
from excise.checkpoints.loading import Loaded, load, resolve
from excise.checkpoints.model_folder import read_config, weight_files
from excise.config import Config, ExportSection, ModelSection, validate
from excise.engine.batch_sizing import from_dict, size, usual_length
from excise.engine.stacking import ORIGINAL
from excise.errors import ConfigError, OutputError, RunStateError
from excise.events import Notice, OnEvent, ignore, phase
from excise.export.exporter import exporters
from excise.files import check_destination
from excise.formats import DEFAULT, FORMATS, OPTIONS
from excise.prompts.measured_sets import Part, tokenise
from excise.prompts.sets import PromptSet, load_prompt_sets
from excise.reading import is_file, is_unicode
from excise.record import ArtifactRecord, Record, Scores
from excise.report.formatting import judge_words
from excise.report.pages import write_pages
from excise.report.stored_record import FILE as RECORD
from excise.report.stored_record import read_record, write_record
from excise.run_lock import hold
from excise.runs import setup
from excise.runs.artifacts import check_exports, export
from excise.runs.changed_settings import check_settings, read_settings
from excise.runs.results import judge_record, keep_verdicts
from excise.runs.run_folder import DIRECTIONS, check_files, read_opening
from excise.runs.session import Session
from excise.runs.study_identity import check_judge, digests, fingerprint, identity
from excise.search import journal
from excise.search.choosing import choose_among
from excise.search.pareto import Objective
from excise.search.scoring import Scoring, markers_of, scoring_by_judge


def export_run(
    folder: Path,
    to: Path,
    *,
    format_name: str = DEFAULT,
    trial: int | None = None,
    select: str | None = None,
    options: Mapping[str, Any] | None = None,
    trust_run: bool = False,
    on_event: OnEvent = ignore,
    judge_token: str | None = None,
) -> ArtifactRecord:
    """Write one trial of a finished run in `to`, measured again; the run's record is added to.

    Args:
        folder: the run.
        to: a folder that does not exist yet.
        format_name: one of `formats.FORMATS`.
        trial: which trial; by default the selected one.
        select: a rule instead of a number: knee, drift<=X, rate<=X, rate<=X@95%.
        options: settings of `config.ExportSection` that are not the run's own.
        trust_run: let code run that the run folder names: scorers, a model's own, llama.cpp's.
        on_event: told of progress.
        judge_token: what a server that judges is shown.

    Raises:
        ConfigError: an option is out of its range.
        RunStateError: no such run or trial, its settings, files, model or prompts have changed, or it
            names code and is not trusted.
        OutputError: `to` exists.
    """
    read_record(folder)  # where there is none, this is no run: not even a lock is left there
    check_destination(to)
    if not is_unicode(str(to)):
        raise OutputError(f"{str(to)!r} is not UTF-8 text: give --to another name")
    if to.exists():
        raise OutputError(f"{to} exists: give --to a new folder")
    given = {k: v for k, v in (options or {}).items() if v is not None}
    # What this format does not take is of a run that also wrote others.
    dropped = {option: _default(option) for option in OPTIONS.keys() - FORMATS[format_name].options}
    unused = [f"export.{option}" for option in (*dropped, *given)]
    config = read_settings(folder, trust=trust_run, unused=unused)
    config = _with_options(config, {**dropped, **given})
    exporters(config.export, [format_name])
    scoring = scoring_by_judge(config, on_event, judge_token)
    with hold(folder):
        keep_verdicts(scoring, folder)
        record, config = _reopen(folder, config)  # as others left it, who held it until now
        number = trial if trial is not None else _selected(record, select, scoring.goals())
        chosen = record.trial(number)
        found = same_session(record, config, scoring, folder, on_event)
        check_exports([format_name], found)
        session = setup.restore(found, folder)
        engine = session.engine("search", from_dict(record.engine).plan)
        with phase("export", on_event):
            record = export(record, chosen, session, engine, [(format_name, to)], folder)
        write_record(folder, record)
        write_pages(folder, record, [record.artifacts[-1].path])
    return record.artifacts[-1]


def _reopen(folder: Path, config: Config) -> tuple[Record, Config]:
    """Read the record of a held run folder, and the configuration that it was measured with.

    Raises:
        RunStateError: settings or files are not those of the record.
    """
    record = read_record(folder)
    config = check_settings(folder, config, record.config)
    check_files(folder, record.files)
    return record, config


def same_session(
    record: Record, config: Config, scoring: Scoring, folder: Path, on_event: OnEvent
) -> Session:
    """Load the model and prompts of a run, and prove that they are those that were measured.

    Raises:
        RunStateError: model, prompts, markers, template or scorers are others.
    """
    with phase("load", on_event):
        sets, loaded = load_prompt_sets(config.prompts), load(config.model)
    _check_unchanged(record, loaded, sets.all())
    session = setup.open_session(config, loaded, sets, scoring, on_event)
    session = setup.open_responses(session, read_opening(folder / DIRECTIONS))
    if record.identity:  # earlier versions did not record it
        now = digests(identity(session, from_dict(record.engine).batch))
        then = dict(record.identity)
        if scoring.judge is None and config.scores.judge.source:  # nothing is judged here
            then.pop("judge", None)
        journal.check_same(folder / RECORD, then, now)
    return session


def _default(option: str) -> Any:
    return ExportSection.model_fields[option].default


def _with_options(config: Config, options: Mapping[str, Any]) -> Config:
    """Replace settings of the configuration's export section."""
    fields = dict(options)
    if "adapter_error" in fields:  # asked for here, it wins over a rank that the run was given
        fields = {"adapter_rank": None, **fields}
    tree = config.model_dump()
    return validate({**tree, "export": {**tree["export"], **fields}})


def survey(
    folder: Path, on_event: OnEvent = ignore, *, trust_run: bool = False
) -> list[dict[str, float]]:
    """Measure the geometry of a run's residuals by layer; add it to the record and the report.

    Raises:
        RunStateError: no such run, or it has changed, or names code and is not trusted.
        MeasurementError: residuals are not finite.
    """
    read_record(folder)
    unused = ("export.llama_cpp", "scores.files")  # nothing is exported or scored here
    config = read_settings(folder, trust=trust_run, unused=unused)
    scoring = Scoring(markers_of(config))  # no judge: nothing is judged here
    with hold(folder):
        record, config = _reopen(folder, config)
        session = same_session(record, config, scoring, folder, on_event)
        target, contrast = setup.residuals(session)
        layers = [layer.as_dict() for layer in describe_layers(target, contrast)]
        record = record.with_geometry(layers)
        write_record(folder, record)
        write_pages(folder, record)
    return layers


def evaluate(
    config: Config, edited: str, on_event: OnEvent = ignore, *, judge_token: str | None = None
) -> list[tuple[str, Scores, Scores]]:
    """Measure an edited model against its base: (part of the prompts, base's scores, edited's scores).

    The KL divergence is over the base's own responses. The two models are never in memory at once.

    Raises:
        ModelError: one of them cannot be loaded.
        ConfigError: their tokens are not the same.
    """
    scoring = scoring_by_judge(config, on_event, judge_token)
    sets = load_prompt_sets(config.prompts).without_keep()
    scorers = scoring.every_trial + scoring.final
    section = config.model.model_copy(update={"source": edited, "revision": None})
    shapes = _stored_shapes(section)  # before the base is measured, which takes its time
    with phase("load", on_event):
        base = load(config.model)
    other_shapes = ConfigError(f"{edited} is not an edit of {config.model.source}: other shapes")
    mine = _shapes(base.model.config.get_text_config().to_dict())
    if any(shapes[key] not in (None, mine[key]) for key in shapes):
        raise other_shapes
    bare = setup.open_session(config, base, sets, scoring, on_event)
    session = setup.open_responses(bare)
    for note in session.sets.notes:
        on_event(Notice(note))
    holdout = all(map(len, session.sets.part("holdout").values()))
    parts: tuple[Part, ...] = ("search", "holdout") if holdout else ("search",)
    lengths = [len(ids) for one in session.sets.values() for ids in one.ids]
    most, usual = max(map(len, session.sets.values())), usual_length(lengths)
    plan = size(base, config, usual, most, on_event).plan
    references, before = {}, {}
    with phase("baseline", on_event):
        if (judge := judge_record(session)) is not None:
            on_event(Notice(judge_words(judge)))
        for part in parts:
            engine = session.engine(part, plan)
            before[part] = session.panel(engine, part, scorers).measure([ORIGINAL])[0].scores
            references[part] = engine.reference()
    base.free_layers()
    with phase("load edited", on_event):
        other = load(section)
    check_judge(scoring, other)
    if _shapes(other.model.config.get_text_config().to_dict()) != mine:
        raise other_shapes
    if tokenise(other, sets, config).sets != bare.sets.sets:
        raise ConfigError(f"{edited} turns the prompts into other tokens than its base")
    rows: list[tuple[str, Scores, Scores]] = []
    with phase("measure safetensors", on_event):
        for part in parts:
            engine = session.of(other).engine(part, plan, references[part])
            after = session.panel(engine, part, scorers).measure([ORIGINAL])[0].scores
            rows.append((part, before[part], after))
    return rows


def _stored_shapes(section: ModelSection) -> dict[str, Any]:
    """Read what a checkpoint's configuration says of its shapes.

    Raises:
        ModelError: its files cannot be read.
    """
    folder = resolve(section)
    if is_file(folder):  # a GGUF, which is unpacked when it is loaded
        return {}
    weight_files(folder)
    config = read_config(folder)
    return _shapes(config.get("text_config") or config)


def _shapes(config: Mapping[str, Any]) -> dict[str, Any]:
    names = ("hidden_size", "vocab_size", "num_hidden_layers")
    return {name: config.get(name) for name in names}


def _selected(record: Record, rule: str | None, goals: list[Objective]) -> int:
    if rule is None:
        return record.chosen().number
    if rule == record.selection and record.selected is not None:
        return record.selected
    chosen = choose_among(rule, [record.trial(number) for number in record.front], goals)
    if chosen is None:
        raise RunStateError(f"no trial on the front keeps {rule!r}: see `excise front`")
    return chosen.number


def _check_unchanged(record: Record, loaded: Loaded, sets: tuple[PromptSet, ...]) -> None:
    if record.model.fingerprint not in (None, fingerprint(loaded.folder)):
        raise RunStateError(
            f"the model in {loaded.folder} has changed since the run: its edits are of other weights"
        )
    check_prompts(record, sets)


def check_prompts(record: Record, sets: tuple[PromptSet, ...]) -> None:
    """Prove that prompts are those that a run was measured on.

    Raises:
        RunStateError: some have changed.
    """
    for prompts in sets:
        known = record.prompts.get(prompts.role)
        labels = None if known is None else known.labels_sha256
        if known is not None and (
            known.sha256 != prompts.sha256 or labels not in (None, prompts.labels_sha256)
        ):
            raise RunStateError(
                f"the {prompts.role} prompts ({prompts.source}) have changed since the run: "
                "its figures would not be comparable"
            )
