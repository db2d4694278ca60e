"""A finished run, opened again to measure edits of its method on the holdout prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from excise import events
from excise.checkpoints.loading import load
from excise.config import Config
from excise.engine.batch_sizing import from_dict
from excise.engine.engine import Plan
from excise.prompts.sets import load_prompt_sets
from excise.record import Record
from excise.report.stored_record import read_record
from excise.runs import setup
from excise.runs.run_folder import DIRECTIONS, read_opening
from excise.runs.session import EditingSession
from excise.search.evaluation import Panel
from excise.search.scoring import scoring_of


@dataclass(frozen=True)
class Reopened:
    """What a finished run was made with, and a panel over the holdout, ground truth included."""

    record: Record
    session: EditingSession
    holdout: Panel


def holdout_panel(session: EditingSession, plan: Plan) -> Panel:
    """A panel over the holdout prompts, ground truth included."""
    scorers = session.scoring.every_trial + session.scoring.final
    return session.panel(session.engine("holdout", plan), "holdout", scorers)


def reopen(folder: Path, config: Config) -> Reopened:
    """The run in `folder`, made with `config`."""
    record = read_record(folder)
    loaded, sets = load(config.model), load_prompt_sets(config.prompts)
    bare = setup.open_session(config, loaded, sets, scoring_of(config), events.ignore)
    bare = setup.open_responses(bare, read_opening(folder / DIRECTIONS))
    session = setup.restore(bare, folder)
    return Reopened(record, session, holdout_panel(session, from_dict(record.engine).plan))
