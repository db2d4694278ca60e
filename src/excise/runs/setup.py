"""A run's parts, set up: prompts and model in, a session with its method out. Nothing is searched here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from excise.capture.directions import Directions, auc, from_means
from excise.capture.residuals import geometric_median, mean, projections
from excise.checkpoints.loading import Loaded, load
from excise.config import Config
from excise.errors import MeasurementError, RunStateError
from excise.events import OnEvent
from excise.methods.registry import kind_of, settle
from excise.model.edits import Edit
from excise.prompts.measured_sets import Opening, tokenise
from excise.prompts.sets import PromptSets
from excise.prompts.tokens import check_known, vocabulary
from excise.record import Separation
from excise.runs.response_prefix import find_opening, given_opening
from excise.runs.run_folder import (
    CAPTURED,
    DIRECTIONS,
    LAYOUT,
    read_directions,
    read_tensors,
    save_tensors,
)
from excise.runs.session import EditingSession, Session
from excise.search.scoring import Scoring


def open_session(
    config: Config, loaded: Loaded, sets: PromptSets, scoring: Scoring, on_event: OnEvent
) -> Session:
    """Settle the configuration and tokenise the prompts, before anything is written.

    Raises:
        ConfigError: the model has not the components that are to be edited.
        ModelError, PromptError: as `tokenise`.
    """
    settled = settle(config, loaded)
    return Session(settled, loaded, tokenise(loaded, sets, settled), scoring, on_event)


def open_responses(session: Session, known: Opening | None = None) -> Session:
    """Put what every response begins with at the end of every prompt.

    That is `known`, or what the configuration names, or what is found now.
    """
    loaded, section, opening = session.loaded, session.config.prompts, known
    if opening is None and section.response_prefix is not None:
        opening = given_opening(loaded.tokenizer, section.response_prefix)
        check_known(loaded.tokenizer, [opening.ids], vocabulary(loaded.model))
    if opening is None:
        prompts = {side: session.sets[side].ids for side in ("target", "contrast")}
        shows = session.scoring.markers.holds
        opening = find_opening(loaded, prompts, thinking=section.thinking, shows=shows)
    return replace(session, sets=session.sets.opened(opening))


def find_directions(session: Session) -> tuple[Directions, Separation]:
    """Find directions in the direction prompts' residuals, and how well each separates the two sets.

    Raises:
        MeasurementError: residuals are not finite or do not differ.
    """
    section = session.config.directions
    passes = {side: session.residuals(side) for side in ("target", "contrast")}
    centre = geometric_median if section.center == "geometric_median" else mean
    means = {side: centre(run)[1:] for side, run in passes.items()}
    directions = from_means(means["target"], means["contrast"], projected=section.projected)
    along = {side: projections(run, directions.unit) for side, run in passes.items()}
    layers = directions.unit.shape[0]
    values = [auc(along["target"][:, i], along["contrast"][:, i]) for i in range(layers)]
    return directions, Separation(auc=values)


def residuals(session: Session, side: str) -> Tensor:
    """Return residuals (P, L, D) of a side's direction prompts after each layer, on the CPU.

    Raises:
        MeasurementError: they are not finite.
    """
    parts = [(batch.rows, x[:, 1:].float().cpu()) for batch, x in session.residuals(side)()]
    order = torch.cat([rows for rows, _ in parts]).argsort()
    found = torch.cat([x for _, x in parts])[order]
    if not bool(torch.isfinite(found).all()):
        raise MeasurementError("residuals are not finite: try --set model.dtype=float32")
    return found


def prepare(
    session: Session, directions: Directions, folder: Path, *, anew: bool
) -> EditingSession:
    """Prepare the method for the writers that the configuration edits.

    What it captures of the model is stored in `folder`, and read back from there unless `anew`.

    Raises:
        MeasurementError: what was captured cannot be used.
        StorageError: it cannot be written.
        RunStateError: it was written by a version that captured other things.
    """
    kind, stored = kind_of(session.config), folder / CAPTURED
    captured = None if anew else read_tensors(stored, kind.layout)
    if captured is None:
        captured = kind.capture(session, directions)
        if captured:
            save_tensors(stored, captured, {"format": "pt", LAYOUT: kind.layout})
    return EditingSession(**vars(session), method=kind.bind(session, directions, captured))


def restore(session: Session, folder: Path) -> EditingSession:
    """Prepare the method of the run in `folder` from what that found.

    Raises:
        RunStateError: the folder has no directions that can be read.
    """
    known = read_directions(folder / DIRECTIONS)
    if known is None:
        raise RunStateError(f"{folder} has no readable {DIRECTIONS}")
    return prepare(session, known[0], folder, anew=False)


def own_edits(
    session: EditingSession, params: Mapping[str, Any], folder: Path
) -> tuple[EditingSession, list[Edit | None]]:
    """Compute a trial's edits from the source's own weights.

    Returns:
        The edits, and the session of the model that holds those weights: the searched one, except where
        its matrices were packed as they were loaded.

    Raises:
        RunStateError: the run folder no longer has its directions.
    """
    if session.loaded.quantize is not None:
        fields = {"quantize": None, "device_map": "cpu"}
        loaded = load(session.config.model.model_copy(update=fields))
        session = restore(session.of(loaded), folder)
    return session, session.edits(params)
