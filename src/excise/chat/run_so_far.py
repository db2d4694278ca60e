"""What a run folder says so far: the record of a finished run, else what its journal holds.

Reads only, without the run's lock: another process may be searching. Loads no model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import pydantic
from safetensors import SafetensorError, safe_open

from excise.config import validate
from excise.errors import ConfigError, RunStateError
from excise.record import Record, TrialRecord
from excise.report.stored_record import FILE as RECORD
from excise.report.stored_record import read_record
from excise.runs.run_folder import DIRECTIONS
from excise.runs.study_identity import digests
from excise.search import journal
from excise.search.loop import points, record_of
from excise.search.pareto import Objective, choose, pareto
from excise.search.scorers import find_scorers


def run_so_far(folder: Path) -> Record:
    """Read the record of a run; of one that has none yet, make what it would say from the journal.

    Raises:
        RunStateError: no run, or one that cannot be read, or that has no trials yet.
    """
    record = read_record(folder) if os.path.lexists(folder / RECORD) else None
    if record is not None and not _goes_on(folder):
        return record
    study = journal.open_study(folder)
    if study is not None:
        return with_study(folder, study, record)
    return record or read_record(folder)  # which says what is missing


def _goes_on(folder: Path) -> bool:
    """Return whether a run's journal was written to after its record."""
    try:
        record, study = ((folder / name).stat().st_mtime for name in (RECORD, journal.FILE))
    except OSError:
        return False
    return study > record


def with_study(folder: Path, study: optuna.Study, record: Record | None) -> Record:
    """Return a run's record with the trials that its study holds.

    Args:
        folder: the run's.
        study: its study, as far as it is.
        record: the one of its last end, if it had one.

    Raises:
        RunStateError: the study says something that no search writes.
    """
    try:
        trials = [record_of(trial) for trial in study.get_trials(deepcopy=False)]
        if record is not None and len(record.trials) >= len(trials):
            return record
        facts = _facts(folder, study) if record is None else dict(record)
        goals = _goals(facts["objectives"], facts["goals"])
        front = pareto(points(trials, goals), goals)
        chosen = None if record is None else record.selected
        if chosen is None and front:
            best = choose("knee", front, goals)
            chosen = None if best is None else best.number
        found = {"trials": trials, "front": [p.number for p in front], "selected": chosen}
        return Record.model_validate({**facts, **found})
    except (pydantic.ValidationError, ConfigError, LookupError, TypeError, AttributeError) as error:
        raise RunStateError(
            f"{folder / journal.FILE} says what no search writes ({type(error).__name__}): put it back "
            "as it was"
        ) from None


def _goals(names: Sequence[str], goals: Sequence[str]) -> list[Objective]:
    """Return objectives with the worths of the scorers that Excise has."""
    try:
        worths = {one.name: one.worth for one in find_scorers(names)}
    except ConfigError:  # one of the user's own; its code does not run to be looked at
        worths = {}
    signs = {"minimize": 1, "maximize": -1}
    return [Objective(n, signs[goal], worths.get(n)) for n, goal in zip(names, goals, strict=True)]


def _facts(folder: Path, study: optuna.Study) -> dict[str, Any]:
    """Return what a record would say beside its trials, as far as it is known before the run's end."""
    known: Mapping[str, Any] = study.user_attrs
    config = validate(dict(known["config"]))
    identity = known["identity"]
    layers, width = _shape(folder)
    names = list(config.scores.objectives)
    return {
        "schema": 1,
        "behaviour": config.behaviour,
        "description": config.description,
        "method": config.method or "",
        "model": {
            "source": config.model.source,
            "model_type": "",
            "dtype": str(identity.get("dtype", "")).removeprefix("torch."),
            "device": "",
            "layers": layers,
            "width": width,
            "parameters": 0,
            "config_sha256": "",
        },
        "versions": {},
        "seed": config.seed,
        "config": config.model_dump(mode="json", exclude_none=True),
        "prompts": {},
        "objectives": names,
        "goals": [direction.name.lower() for direction in study.directions],
        "baseline": {},
        "selection": config.search.select,
        "coverage": {"edited": [], "not_edited": []},
        "engine": known["sizing"],
        "timing": {},
        "files": known.get("files", {}),
        "identity": digests(identity),
    }


def _shape(folder: Path) -> tuple[int, int]:
    """Return layers and width of the model, from the header of the run's directions."""
    path = folder / DIRECTIONS
    try:
        with safe_open(path, framework="np") as file:
            layers, width = file.get_slice("unit").get_shape()
    except (OSError, SafetensorError, ValueError):
        raise RunStateError(f"{path} cannot be read: put it back as it was") from None
    return layers, width


def trial_of(record: Record, number: int) -> TrialRecord:
    """Return a trial that has parameters.

    Raises:
        RunStateError: there is none of this number, or it was asked and has none.
    """
    trial = record.trial(number)
    if not trial.params:
        raise RunStateError(f"trial {number} has no parameters: it was never asked in full")
    return trial
