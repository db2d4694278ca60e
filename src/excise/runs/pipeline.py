"""Run the whole job: `run(config, out, on_event)`. Read it as the table of contents of the package."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from excise import events
from excise.checkpoints.loading import load
from excise.config import Config, to_toml
from excise.engine.batch_sizing import Sizing, from_dict, size, usual_length
from excise.engine.engine import Engine
from excise.engine.stacking import ORIGINAL
from excise.errors import MeasurementError, RunStateError
from excise.events import OnEvent
from excise.export.exporter import exporters
from excise.files import write_text
from excise.formats import FORMATS
from excise.methods.registry import check_method
from excise.prompts.sets import load_prompt_sets
from excise.record import Record, Separation, TrialRecord
from excise.report.pages import write_pages
from excise.report.stored_record import FILE as RECORD
from excise.report.stored_record import read_record, write_record
from excise.run_lock import hold
from excise.runs import setup
from excise.runs.artifacts import check_exports, export_chosen
from excise.runs.baseline import SHOWN, check_baseline
from excise.runs.changed_settings import CONFIG, check_settings
from excise.runs.results import (
    build_record,
    final_figures,
    judge_record,
    keep_verdicts,
    model_record,
)
from excise.runs.run_folder import (
    DIRECTIONS,
    check_apart,
    check_files,
    check_output,
    hash_files,
    held_anew,
    read_directions,
    read_opening,
    save_directions,
)
from excise.runs.session import EditingSession, Session
from excise.runs.study_identity import identity
from excise.search import journal
from excise.search.choosing import BUDGET, Chooser
from excise.search.evaluation import Panel, edits_or_reason, measurer
from excise.search.loop import Measure, Measured, Search
from excise.search.pareto import parse_rule
from excise.search.region import region_of
from excise.search.scoring import Scoring, scoring_by_judge
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
class Shared:
    """What workers are told of a search, to measure the same.

    Attributes:
        session: of this process.
        panel: its scorers on its engine.
        sizing: the sizes that the study was started with.
        folder: the run, with directions and what the method captured.
        first: parameters of trials that any worker can be compared by.
    """

    session: EditingSession
    panel: Panel
    sizing: Sizing
    folder: Path
    first: list[dict[str, Any]]

    @cached_property
    def probe(self) -> tuple[dict[str, Any], Measured] | None:
        """The first of them that has an edit, with what this process measures of it."""
        edits = ((params, edits_or_reason(self.session.edits, params)) for params in self.first)
        good = ((params, one) for params, one in edits if not isinstance(one, str))
        found = next(good, None)
        return None if found is None else (found[0], self.panel.measure([found[1]])[0])


class Sharing(Protocol):
    """What measures batches on several workers, this process among them."""

    count: int

    def measuring(self, shared: Shared, mine: Measure) -> AbstractContextManager[Measure]:
        """Have the workers; `mine` measures on this process alone."""
        ...


def run(
    config: Config,
    out: Path,
    on_event: OnEvent = events.ignore,
    *,
    resume: bool = False,
    anyway: bool = False,
    judge_token: str | None = None,
    workers: Sharing | None = None,
) -> Record:
    """Find directions, search edits, choose one, measure and export it; write everything into `out`.

    Args:
        config: what to do.
        out: a new or empty folder; with `resume`, the folder of an interrupted or finished run.
        on_event: told of progress.
        resume: go on with the study in `out`, up to `config.search.trials` or `config.search.time` in all.
        anyway: search also where the original leaves nothing to find.
        judge_token: what a server that judges is shown; it is kept nowhere.
        workers: what measures batches beside this process.

    Raises:
        InputError: something the user gave cannot be used; nothing was written.
        ExciseError: it failed while running; the study in `out` can be resumed.
        PageError: record and exports are there, and a page is not.
    """
    clock = Clock(on_event)
    scoring = scoring_by_judge(config, on_event, judge_token)
    parse_rule(config.search.select, scoring.goals())
    exporters(config.export, config.export.formats)  # what they ask for is there
    check_output(out, resume)
    with ExitStack() as held:
        known = None
        if resume:
            held.enter_context(hold(out))
            known, config = _reopen(out, config)
        bare = _load(config, scoring, clock)
        source = model_record(bare.loaded)
        check_apart(out, bare.loaded)
        if not resume:
            held.enter_context(held_anew(out))  # others may have begun while the model was loaded
            write_text(out / CONFIG, to_toml(bare.config))
        keep_verdicts(scoring, out)
        with clock.phase("capture"):
            session, separation = _capture(bare, out, resumed=known is not None)
        with clock.phase("plan"):
            sizing, search = _open_search(
                session, out, known, 1 if workers is None else workers.count
            )
        engine = {**sizing.as_dict(), **_keep_facts(search.study)}
        facts = {"model": source, "separation": separation, "engine": engine}
        record = _measure(session, search, sizing, facts, out, clock, workers, anyway=anyway)
    on_event(events.Finished(str(out)))
    return record


def _measure(
    session: EditingSession,
    search: Search,
    sizing: Sizing,
    facts: dict[str, Any],
    out: Path,
    clock: Clock,
    workers: Sharing | None,
    *,
    anyway: bool,
) -> Record:
    """Measure, search, choose, record and export; `facts` are the record's so far."""
    engine = session.engine("search", sizing.plan)
    panel = session.panel(engine, "search", session.scoring.every_trial)
    with clock.phase("baseline"):
        facts["judge"] = judge_record(session)
        baseline = panel.measure([ORIGINAL])[0].scores
        if not anyway and not search.records():  # with trials, that was decided before
            check_baseline(baseline, _said(session, engine), session.config, out)
    section, measure = session.config.search, measurer(session.edits, panel, engine.keeping_drafts)
    search.aim(region_of(search.objectives, {k: score.value for k, score in baseline.items()}))
    shared = Shared(session, panel, sizing, out, search.first())
    with (
        clock.phase("search", None if section.time else section.trials),
        nullcontext(measure) if workers is None else workers.measuring(shared, measure) as measured,
    ):
        if section.time is None:
            search.run(section.trials, measured, clock.on_event)
        else:
            search.run_for(section.time, measured, clock.on_event)
    trials, front, chosen = _choose(session, search, engine, out, clock)
    facts |= {"baseline": baseline, "trials": trials, "front": front, "selected": chosen.number}
    facts |= _kept(out)
    with clock.phase("holdout"):
        facts |= final_figures(session, engine, session.edits(chosen.params))
    record = build_record(session, search, timing=dict(clock.seconds), **facts)
    write_record(out, record)  # before the export: what was measured is never lost
    with clock.phase("export"):
        record = export_chosen(record, chosen, session, engine, out)
    record = record.with_timing(clock.seconds)
    write_record(out, record)
    write_pages(out, record)
    return record


def _said(session: Session, engine: Engine) -> list[str]:
    """Return some of the original's responses to target prompts, where these may be shown."""
    if "target" not in session.config.scores.show:
        return []
    return [response.text for response in engine.original("target").responses[:SHOWN]]


def _reopen(out: Path, config: Config) -> tuple[journal.Study | None, Config]:
    """Open the study of a held run folder, and the configuration that it goes on with.

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
        config = check_settings(out, config, attributes["config"])
    check_files(out, attributes.get("files", {}))
    return known, config


def _kept(out: Path) -> dict[str, Any]:
    """Read what was added to the record after the run had ended: exports elsewhere, the geometry."""
    try:
        known = read_record(out)
    except RunStateError:  # it is new, or was interrupted before it had one
        return {}
    own = {form.folder for form in FORMATS.values()}
    elsewhere = [a for a in known.artifacts if a.path not in own]
    kept = {"geometry": known.geometry, "benchmarks": known.benchmarks}
    return {"artifacts": elsewhere, **kept}


def _load(config: Config, scoring: Scoring, clock: Clock) -> Session:
    """Load prompts and model, and find what cannot be used before anything is written."""
    with clock.phase("prompts"):
        sets = load_prompt_sets(config.prompts)
    with clock.phase("load"):
        loaded = load(config.model)
        session = setup.open_session(config, loaded, sets, scoring, clock.on_event)
        check_exports(config.export.formats, session)
        scoring.check(session.sets)
        check_method(session)
    return session


def _capture(session: Session, out: Path, *, resumed: bool) -> tuple[EditingSession, Separation]:
    """Find how responses begin, the directions, and what the method needs; or read them back."""
    path = out / DIRECTIONS
    session = setup.open_responses(session, read_opening(path) if resumed else None)
    for note in (*session.loaded.notes, *session.sets.notes):
        session.on_event(events.Notice(note))
    known = read_directions(path) if resumed else None
    if resumed and known is None:
        raise RunStateError(f"{path} cannot be read: put it back as it was, or choose a new --out")
    seen = None if known else setup.observe(session)
    directions, separation = known or setup.find_directions(session, seen)
    if known is None:
        save_directions(path, directions, separation, session.sets.opening)
    return setup.prepare(session, directions, out, seen), separation


def _open_search(
    session: EditingSession, out: Path, known: journal.Study | None, workers: int
) -> tuple[Sizing, Search]:
    """Create the study of this run, or go on with `known`, with the sizes that it was started with."""
    config, scoring, space = session.config, session.scoring, session.method.space()
    sizing = _sizing(session) if known is None else from_dict(known.user_attrs["sizing"])
    if known is None and not config.search.batch:
        sizing = replace(sizing, batch=workers * sizing.batch)  # as many for each as for one
    mine, goals = identity(session, sizing.batch), scoring.goals()
    if known is None:
        ways = [s.goal for s in scoring.objectives]
        facts = {
            "config": config.model_dump(mode="json", exclude_none=True),
            "files": hash_files(out),
        }
        if "keep" in session.sets:
            facts["keep"] = session.kept.as_dict()
        study = journal.create_study(out, ways, mine, sizing.as_dict(), **facts)
    else:
        study = known
        journal.check_identity(out, study, mine)
        check_study(study, space, goals, str(out / journal.FILE))
    return sizing, Search(study, space, goals, config.search, batch=sizing.batch, seed=config.seed)


def _keep_facts(study: journal.Study) -> dict[str, Any]:
    """Return how many prompts of the keep set a study's method was given, for the record."""
    return {"keep": study.user_attrs["keep"]} if "keep" in study.user_attrs else {}


def _choose(
    session: EditingSession, search: Search, engine: Engine, out: Path, clock: Clock
) -> tuple[list[TrialRecord], list[int], TrialRecord]:
    """Measure those again that could be chosen; return all trials, the front's numbers, the chosen one.

    Raises:
        MeasurementError: the rule fits none.
    """
    section, sides = session.config.search, session.sets.part("confirm").values()
    chooser = Chooser(search, section.select, session.config.seed)
    if sides:
        used = sum(map(len, session.sets.part("search").values()))
        most = int(BUDGET * len(search.records()) * used / sum(map(len, sides)))
        contenders = chooser.contenders(most)
        if contenders:
            with clock.phase("confirm", len(contenders)):
                held = session.engine("confirm", engine.fitted_plan)
                panel = session.panel(held, "confirm", session.scoring.objectives)
                measure = measurer(session.edits, panel, nullcontext)
                chooser.confirm(contenders, measure, clock.on_event)
    trials = chooser.annotated()
    front, chosen = chooser.choose(trials)
    if chosen is None:
        raise MeasurementError(_nothing_chosen(session.config, len(front), out))
    return trials, front, chosen


def _sizing(session: Session) -> Sizing:
    """Choose the sizes of the search's passes."""
    sides = [one.ids for one in session.sets.part("search").values()]
    usual, most = usual_length([len(ids) for side in sides for ids in side]), max(map(len, sides))
    return size(session.loaded, session.config, usual, most, session.on_event)


def _nothing_chosen(config: Config, size_of_front: int, out: Path) -> str:
    if not size_of_front:
        return "no trial could be measured: the study's trials all failed; see their reasons"
    return (
        f"no trial on the front keeps {config.search.select!r}: loosen search.select in "
        f"{out / CONFIG} and go on with `excise resume {out}`"
    )
