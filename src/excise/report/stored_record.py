"""`record.json` on disk: written in one step, and read as a whole, typed and consistent record."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic

from excise.config import misfit
from excise.errors import RunStateError
from excise.files import write_text
from excise.methods.profiles import from_params, hill_of, shares_of
from excise.reading import is_file, is_folder, read_json
from excise.record import SCHEMA, Record

FILE = "record.json"
# What was measured and chosen, of which the record holds a hash.
_FIGURES = (
    *("method", "objectives", "goals", "baseline", "trials", "front", "selected"),
    *("holdout", "holdout_baseline", "final", "final_baseline"),
)


def read_record(folder: Path) -> Record:
    """Read the record of a run folder, or of a record's own path.

    Raises:
        RunStateError: there is none, or it is not a whole and consistent record of this schema.
    """
    path = folder / FILE if is_folder(folder) else folder
    if not is_file(path) and not path.is_symlink():
        raise RunStateError(
            f"{folder} holds no {FILE}: the run has not finished (`excise resume {folder}`), "
            "or this is not a run folder"
        )
    data = read_json(path, "record", RunStateError)
    if data.get("schema") != SCHEMA:
        raise RunStateError(
            f"{path} has schema {data.get('schema')!r:.60}; this version reads {SCHEMA}"
        )
    try:
        record = Record.model_validate(data)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        words = f"{key!r:.80}: {first['msg'].removeprefix('Value error, '):.160}"
        raise RunStateError(f"{path} is not a readable record: {words}") from None
    wrong = _contradiction(record)
    if wrong is None and record.figures_sha256 not in (None, _figures_sha256(data)):
        wrong = "its trials or figures are not those that were written"
    if wrong is not None:
        raise RunStateError(f"{path} is not a record that a run wrote: {wrong}")
    return record


def _figures_sha256(data: Mapping[str, Any]) -> str:
    parts = {name: data.get(name) for name in _FIGURES}
    # How long each took is no figure of it.
    parts["trials"] = [{**trial, "seconds": None} for trial in data["trials"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _contradiction(record: Record) -> str | None:
    """Say what contradicts itself in a record; None in one that a run wrote."""
    names = record.objectives
    if not names or len(set(names)) < len(names) or len(record.goals) != len(names):
        return "its objectives and their goals do not fit"
    for number, trial in enumerate(record.trials):
        if trial.number != number:
            return f"trial {trial.number} stands where trial {number} belongs"
        if not all(math.isfinite(score.value) for score in trial.scores.values()):
            return f"trial {number} has a score that is not a number"
        if trial.params and not _fits(record.method, trial.params):
            return f"trial {number} has not the parameters of method {record.method!r:.60}"
    full = {
        t.number for t in record.trials if t.state == "complete" and set(names) <= t.scores.keys()
    }
    if len(set(record.front)) < len(record.front) or not set(record.front) <= full:
        return "its front names trials that are not there, or were not measured in full"
    if record.selected is not None and record.selected not in full:
        return f"the selected trial {record.selected} is not there, or was not measured in full"
    if any(artifact.trial >= len(record.trials) for artifact in record.artifacts):
        return "an export is of a trial that is not there"
    if not all(row.keys() >= _GEOMETRY for row in record.geometry):
        return "its geometry lacks columns"
    unfit = misfit(record.config)
    return None if unfit is None else f"of what it was told, {unfit}"


_GEOMETRY = set(
    "layer target_norm contrast_norm difference_norm cosine silhouette auc effective_rank".split()
)


def _fits(method: str, params: Mapping[str, Any]) -> bool:
    """Check that parameters can be those of a method, as far as pages read them."""
    try:
        if method == "directional":
            from_params(params)
        elif method == "ridge":
            hill_of(params)
            shares_of(params)
            float(params["overshoot"])
    except (KeyError, ValueError, TypeError, OverflowError):
        return False
    return True


def write_record(folder: Path, record: Record) -> Path:
    """Write the record in one step: readers see the old file or the new one, never half of one."""
    data = json.loads(record.model_dump_json(by_alias=True))
    data["figures_sha256"] = _figures_sha256(data)
    return write_text(folder / FILE, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
