"""A finished run, opened again to measure edits of its method on the holdout prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from excise import events
from excise.checkpoints.loading import Loaded, load
from excise.config import Config
from excise.engine.batch_sizing import from_dict
from excise.engine.engine import Plan
from excise.methods.registry import Bench, Method
from excise.prompts.sets import PromptSets, load_prompt_sets
from excise.record import Record
from excise.report.stored_record import read_record
from excise.runs import setup
from excise.runs.run_folder import DIRECTIONS, read_directions
from excise.search.evaluation import Panel


@dataclass(frozen=True)
class Reopened:
    """What a finished run was made with, and a panel over the holdout, ground truth included."""

    record: Record
    bench: Bench
    method: Method
    holdout: Panel


def holdout_panel(
    loaded: Loaded,
    sets: PromptSets,
    method: Method,
    tokens: setup.Tokens,
    config: Config,
    plan: Plan,
) -> Panel:
    """A panel over the holdout prompts, ground truth included."""
    scoring = setup.scoring(config)
    engine = setup.engine_for(loaded, method.writers, tokens, "holdout", config, plan)
    context = scoring.context(sets.target_holdout, sets.contrast_holdout)
    return Panel(engine, scoring.every_trial + scoring.final, context)


def reopen(folder: Path, config: Config) -> Reopened:
    """The run in `folder`, made with `config`."""
    record = read_record(folder)
    known = read_directions(folder / DIRECTIONS)
    assert known is not None
    loaded, sets = load(config.model), load_prompt_sets(config.prompts)
    tokens = setup.stored_tokens(loaded, sets, config, setup.scoring(config).markers, folder)
    method = setup.stored_method(loaded, tokens, config, folder, events.ignore)
    plan = from_dict(record.engine).plan
    panel = holdout_panel(loaded, sets, method, tokens, config, plan)
    bench = setup.bench_for(loaded, known[0], tokens, config, events.ignore)
    return Reopened(record, bench, method, panel)
