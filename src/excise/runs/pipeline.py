"""The whole job: `run(config, out, on_event)`. Read it as the table of contents of the package."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna

from excise import events
from excise.checkpoints.loading import Loaded, load
from excise.config import Config, to_toml
from excise.engine.batch_sizing import Sizing, from_dict, size, usual_length
from excise.engine.engine import Engine
from excise.errors import MeasurementError, RunStateError
from excise.events import OnEvent
from excise.export.exporter import exporters
from excise.files import write_text
from excise.formats import FORMATS
from excise.methods.registry import Method, check_method, named
from excise.model.edits import Edit
from excise.prompts.sets import PromptSets, load_prompt_sets
from excise.record import ModelRecord, Record, Separation, TrialRecord
from excise.report.pages import write_pages
from excise.report.stored_record import FILE as RECORD
from excise.report.stored_record import read_record, write_record
from excise.runs import setup
from excise.runs.artifacts import Checker, check_exports, export_chosen
from excise.runs.baseline import SHOWN, check_baseline
from excise.runs.output_folder import check_apart, check_output, held_anew
from excise.runs.results import final_figures, model_record, summary
from excise.runs.resume_terms import CONFIG, check_terms
from excise.runs.run_folder import (
    CAPTURED,
    DIRECTIONS,
    check_files,
    hash_files,
    read_directions,
    read_opening,
    save_directions,
)
from excise.runs.study_identity import identity
from excise.search import journal
from excise.search.evaluation import Panel
from excise.search.loop import Measure, Measured, Search
from excise.search.pareto import Point, choose, pareto, parse_rule
from excise.search.refinement import NothingToRefine, refined, refiner_for
from excise.search.stored_study import check_study


@dataclass
class Clock:
    """Seconds by phase, reported as they pass."""

    on_event: OnEvent
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        """Time one phase."""
        begun = time.perf_counter()
        with events.phase(name, self.on_event, total):
            yield
        spent = time.perf_counter() - begun
        self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 3)


@dataclass(frozen=True)
class _Job:
    """What a run works with, from the end of its capture on."""

    config: Config
    scoring: setup.Scoring
    sets: PromptSets
    loaded: Loaded
    tokens: setup.Tokens
    method: Method
    source: ModelRecord


def run(
    config: Config,
    out: Path,
    on_event: OnEvent = events.ignore,
    *,
    resume: bool = False,
    anyway: bool = False,
) -> Record:
    """Find, edit, measure, choose, export; everything lands in the folder `out`.

    Args:
        config: what to do.
        out: a new or empty folder; with `resume`, the folder of an interrupted or finished run.
        on_event: told of progress.
        resume: go on with the study in `out`, up to `config.search.trials` in all.
        anyway: search also where the original leaves nothing to find.

    Raises:
        InputError: something the user gave cannot be used; nothing was written.
        ExciseError: it failed while running; the study in `out` can be resumed.
        PageError: record and exports are there, and a page is not.
    """
    clock = Clock(on_event)
    scoring = setup.scoring(config)
    parse_rule(config.search.select, scoring.goals())
    exporters(config.export, config.export.formats)  # what they ask for is there
    check_output(out, resume)
    with ExitStack() as held:
        known = None
        if resume:
            held.enter_context(journal.hold(out))
            known, config = _reopen(out, config)
        sets, loaded, tokens, config = _load(config, scoring, clock)
        source = model_record(loaded)
        check_apart(out, loaded)
        if not resume:
            held.enter_context(held_anew(out))  # others may have begun while the model was loaded
            write_text(out / CONFIG, to_toml(config))
        with clock.phase("capture"):
            opening = None if known is None else read_opening(out / DIRECTIONS)
            tokens = setup.open_responses(loaded, tokens, config, scoring.markers, opening)
            method, separation = _prepare(loaded, tokens, config, out, known is not None, on_event)
        job = _Job(config, scoring, sets, loaded, tokens, method, source)
        with clock.phase("plan"):
            sizing, search = _open_search(job, out, known, on_event)
        record = _measure(job, search, sizing, separation, out, clock, anyway=anyway)
    on_event(events.Finished(str(out)))
    return record


def _measure(
    job: _Job,
    search: Search,
    sizing: Sizing,
    separation: Separation,
    out: Path,
    clock: Clock,
    *,
    anyway: bool,
) -> Record:
    """Baseline, search, choice, holdout, record, export, pages."""
    config, scoring, sets, loaded = job.config, job.scoring, job.sets, job.loaded
    tokens, method = job.tokens, job.method
    engine = setup.engine_for(loaded, method.writers, tokens, "eval", config, sizing.plan)
    context = scoring.context(sets.target_eval, sets.contrast_eval)
    panel = Panel(engine, scoring.every_trial, context)
    with clock.phase("baseline"):
        baseline = panel.measure([[None] * len(method.writers)])[0].scores
        if not anyway and not search.records():  # with trials, that was decided before
            check_baseline(baseline, _said(engine, config), config, out)
    _search(job, search, measurer(method, panel, engine.learning), clock)
    front, chosen = _choose(job, search, out)
    with clock.phase("holdout"):
        edits = method.edits(method.candidate(chosen.params))
        figures = final_figures(engine, loaded, edits, sets, tokens, config, scoring)
    record = summary(config, job.source, loaded, sets, sizing, search, clock.seconds, method.notes)
    found = {"baseline": baseline, "front": front, "selected": chosen.number, **figures}
    found |= {"separation": separation, "formatting": tokens.as_dict(), **_kept(out)}
    record = record.model_copy(update=found)
    write_record(out, record)  # before the export: what was measured is never lost
    with clock.phase("export"):
        checker = Checker(loaded, engine, scoring, context, config, tokens)
        record = export_chosen(record, chosen, loaded, method, checker, out, clock.on_event)
    record = record.model_copy(update={"timing": dict(clock.seconds)})
    write_record(out, record)
    write_pages(out, record)
    return record


def _said(engine: Engine, config: Config) -> list[str]:
    """Some of the original's responses to target prompts, where these may be shown."""
    if "target" not in config.scores.show:
        return []
    return [response.text for response in engine.original("target").responses[:SHOWN]]


def _reopen(out: Path, config: Config) -> tuple[optuna.Study | None, Config]:
    """The study of a run folder, which is held, and the configuration that it goes on with.

    Raises:
        RunStateError: there is none where one must be, or settings or files are not those that its
            trials were measured with.
    """
    known = journal.open_study(out)
    if known is None:
        if (out / RECORD).exists():
            raise RunStateError(
                f"{out} has a record of finished trials and no {journal.FILE} that holds them: put the "
                "journal back, or choose a new --out"
            )
        return None, config
    attributes = known.user_attrs
    if "config" in attributes:  # earlier versions did not keep it
        config = check_terms(out, config, attributes["config"])
    check_files(out, attributes.get("files", {}))
    return known, config


def _kept(out: Path) -> dict[str, Any]:
    """What was put on the record of this run after it had ended: exports elsewhere, the geometry."""
    try:
        known = read_record(out)
    except RunStateError:  # it is new, or was interrupted before it had one
        return {}
    own = {form.folder for form in FORMATS.values()}
    elsewhere = [a for a in known.artifacts if a.path not in own]
    return {"artifacts": elsewhere, "geometry": known.geometry}


def _load(
    config: Config, scoring: setup.Scoring, clock: Clock
) -> tuple[PromptSets, Loaded, setup.Tokens, Config]:
    """Prompts and model, and the configuration with what the model decides about it."""
    with clock.phase("prompts"):
        sets = load_prompt_sets(config.prompts)
    with clock.phase("load"):
        loaded = load(config.model)
        config = setup.settled(named(config, loaded.anatomy), loaded)
        check_exports(config.export.formats, loaded, config)
        tokens = setup.tokenise(loaded, sets, config)
        scoring.check(sets)
        check_method(loaded.anatomy, sets, config)
    return sets, loaded, tokens, config


def _prepare(
    loaded: Loaded,
    tokens: setup.Tokens,
    config: Config,
    out: Path,
    resumed: bool,
    on_event: OnEvent,
) -> tuple[Method, Separation]:
    for note in (*loaded.notes, *tokens.notes):
        on_event(events.Notice(note))
    path = out / DIRECTIONS
    known = read_directions(path) if resumed else None
    if resumed and known is None:
        raise RunStateError(f"{path} cannot be read: put it back as it was, or choose a new --out")
    directions, separation = known or setup.find_directions(
        loaded, tokens, config.directions, on_event
    )
    if known is None:
        save_directions(path, directions, separation, tokens.opening)
    place, anew = out / CAPTURED, not resumed
    method = setup.method_for(loaded, directions, tokens, config, place, on_event, anew=anew)
    return method, separation


def _open_search(
    job: _Job, out: Path, known: optuna.Study | None, on_event: OnEvent
) -> tuple[Sizing, Search]:
    """The study of this run, new or resumed, and the sizes that it was started with."""
    config, goals, space = job.config, job.scoring.goals(), job.method.space()
    sizing = _sizing(job, on_event) if known is None else from_dict(known.user_attrs["sizing"])
    batch = sizing.batch
    mine = identity(job.loaded, job.sets, job.tokens, config, job.scoring.markers, batch)
    if known is None:
        ways = [s.goal for s in job.scoring.objectives]
        facts = {
            "config": config.model_dump(mode="json", exclude_none=True),
            "files": hash_files(out),
        }
        study = journal.create_study(out, ways, mine, sizing.as_dict(), **facts)
    else:
        study = known
        journal.check_identity(out, study, mine)
        check_study(study, space, goals, str(out / journal.FILE))
    return sizing, Search(study, space, goals, config.search, batch=batch, seed=config.seed)


def _search(job: _Job, search: Search, measure: Measure, clock: Clock) -> None:
    """All trials, and those that refine the front of them."""
    section = job.config.search
    with clock.phase("search", section.trials):
        search.run(section.trials, measure, clock.on_event)
    if section.refine:
        with clock.phase("refine", section.refine):
            search.refine(_refinement(job, search, clock.on_event), measure, clock.on_event)


def _refinement(
    job: _Job, search: Search, on_event: OnEvent
) -> Callable[[list[Point]], list[dict[str, Any]]]:
    """Points so far -> parameters of new trials, refined from their front."""

    def propose(points: list[Point]) -> list[dict[str, Any]]:
        shown, spoken = job.scoring.markers.shown, job.tokens.opening.spoken
        try:
            refiner = refiner_for(job.loaded, job.method, job.tokens, job.config, shown, spoken)
        except NothingToRefine as error:  # what the search found is not lost for it
            on_event(events.Notice(str(error)))
            return []
        trials = search.records()
        starts = [trials[p.number].params for p in pareto(points, job.scoring.goals())]
        return refined(refiner, job.method, starts, job.config.search.refine)

    return propose


def _choose(job: _Job, search: Search, out: Path) -> tuple[list[int], TrialRecord]:
    """The numbers of the trials on the front, and the chosen one of them.

    Raises:
        MeasurementError: the rule fits none.
    """
    goals = job.scoring.goals()
    front = pareto(search.points(), goals)
    chosen = choose(job.config.search.select, front, goals)
    if chosen is None:
        raise MeasurementError(_nothing_chosen(job.config, len(front), out))
    return [p.number for p in front], search.records()[chosen.number]


def _sizing(job: _Job, on_event: OnEvent) -> Sizing:
    sides = [job.tokens["target_eval"], job.tokens["contrast_eval"]]
    lengths = [len(row) for rows in sides for row in rows]
    most = max(map(len, sides))
    return size(job.loaded, job.config, usual_length(lengths), most, on_event)


def measurer(
    method: Method,
    panel: Panel,
    learning: Callable[[], AbstractContextManager[None]],
) -> Measure:
    """Parameters of a batch -> its measurements, for the search.

    `learning` surrounds the first batch: later candidates are expected to answer as those do.
    """
    batches = itertools.count()

    def measure(params: list[dict[str, Any]]) -> list[Measured]:
        begun = time.perf_counter()
        edits = [_edits(method, one) for one in params]
        built = (time.perf_counter() - begun) / len(params)
        good = [one for one in edits if not isinstance(one, str)]
        with learning() if next(batches) == 0 else nullcontext():
            results = iter(panel.measure(good) if good else ())
        return [
            Measured(seconds={"edits": built}, reason=one)
            if isinstance(one, str)
            else _timed(next(results), built)
            for one in edits
        ]

    return measure


def _edits(method: Method, params: dict[str, Any]) -> list[Edit | None] | str:
    """A candidate's edits, or why it has none."""
    try:
        return method.edits(method.candidate(params))
    except MeasurementError as error:
        return str(error)


def _timed(measured: Measured, built: float) -> Measured:
    return replace(measured, seconds={"edits": built, **measured.seconds})


def _nothing_chosen(config: Config, size_of_front: int, out: Path) -> str:
    if not size_of_front:
        return "no trial could be measured: the study's trials all failed; see their reasons"
    return (
        f"no trial on the front keeps {config.search.select!r}: loosen search.select in "
        f"{out / CONFIG} and go on with `excise resume {out}`"
    )
