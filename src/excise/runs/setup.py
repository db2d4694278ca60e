"""A run's parts, set up: prompts and model in, a session with its method out. Nothing is searched here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from excise.capture.directions import Directions, auc, boundary_of, from_means
from excise.capture.keep_set import BEGINNING, NOTHING_KEPT, Kept, known_texts
from excise.capture.residuals import Pass, geometric_median, mean, projections
from excise.capture.sweep import SIDES, ResidualsAlone, Seen, Text, streamed
from excise.checkpoints.loading import Loaded, load
from excise.config import Config
from excise.errors import MeasurementError, RunStateError
from excise.events import Notice, OnEvent
from excise.methods.registry import kind_of, settle
from excise.model.edits import Edit
from excise.prompts.measured_sets import Opening, learned_positions, tokenise
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
from excise.runs.study_identity import check_judge
from excise.search.scoring import Scoring


def open_session(
    config: Config, loaded: Loaded, sets: PromptSets, scoring: Scoring, on_event: OnEvent
) -> Session:
    """Settle the configuration and tokenise the prompts, before anything is written.

    Raises:
        ConfigError: the model has not the components that are to be edited, or is its own judge.
        ModelError, PromptError: as `tokenise`.
    """
    check_judge(scoring, loaded)
    settled = settle(config, loaded)
    if not kind_of(settled).keeps:
        sets = sets.without_keep()
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


def observe(session: Session) -> Seen:
    """Run the direction prompts through the model once, for directions and the method.

    Raises:
        MemoryExhausted: one prompt does not fit.
    """
    return session.observe(kind_of(session.config).capture(session))


def find_directions(session: Session, seen: Seen | None = None) -> tuple[Directions, Separation]:
    """Find directions in the direction prompts' residuals, and how well each separates the two sets.

    `seen` is what `observe` left; without it, residuals alone are captured.

    Raises:
        MeasurementError: residuals are not finite or do not differ.
    """
    section = session.config.directions
    passes = (seen or session.observe(ResidualsAlone())).residuals
    centre = geometric_median if section.center == "geometric_median" else mean
    means = {side: centre(run)[1:] for side, run in passes.items()}
    directions = from_means(means["target"], means["contrast"], projected=section.projected)
    along = {side: projections(run, directions.unit) for side, run in passes.items()}
    directions = replace(directions, boundary=boundary_of(along["target"], along["contrast"]))
    layers = directions.unit.shape[0]
    values = [auc(along["target"][:, i], along["contrast"][:, i]) for i in range(layers)]
    return directions, Separation(auc=values)


def choose_keep(session: Session, directions: Directions) -> Kept:
    """Choose the prompts of the keep set that edits leave alone, and decode the responses to them.

    One is left out, by its number in `Kept.left_out`, where the tokenizer does not know its text, it is
    too long for the model, or the original comes near the behaviour on it.
    """
    keep = session.sets.get("keep")
    if keep is None:
        return NOTHING_KEPT
    rows, left_out = list(range(len(keep))), dict[str, int]()

    def leave(why: str, good: Sequence[bool]) -> None:
        left_out[why] = list(good).count(False)
        rows[:] = [number for number, fine in zip(rows, good, strict=True) if fine]

    loaded, new = session.loaded, session.config.scores.max_new_tokens
    texts, contrast = ([p.text for p in s.prompts] for s in (keep, session.sets["contrast"]))
    leave("unknown", known_texts(loaded.tokenizer, texts, contrast, vocabulary(loaded.model)))
    most = learned_positions(loaded.model) or math.inf
    leave("too_long", [len(keep.ids[number]) + new <= most for number in rows])
    leave("near_target", _on_contrast_side(session, directions, [keep.ids[n] for n in rows]))
    responses = session.respond("keep", [keep.ids[n] for n in rows]) if rows else []
    begun = [loaded.tokenizer.decode(r.tokens[:BEGINNING]) for r in responses]
    good = [not session.scoring.markers.holds(text) for text in begun]
    leave("shows_behaviour", good)
    answers = [r.tokens for r, fine in zip(responses, good, strict=True) if fine]
    kept = Kept([keep.ids[number] for number in rows], answers, left_out)
    if kept.note:
        session.on_event(Notice(kept.note))
    return kept


def _on_contrast_side(
    session: Session, directions: Directions, prompts: Sequence[Sequence[int]]
) -> list[bool]:
    """Return which prompts lie on the contrast side of the boundary."""
    boundary, found = directions.boundary, dict[int, bool]()
    if not prompts:
        return []
    assert boundary is not None
    unit, winsor = directions.unit[boundary.layer], session.config.directions.winsor
    for batch, x in streamed(session.loaded, prompts, winsor, "keep", session.on_event)():
        along = x[:, boundary.layer + 1].float().cpu() @ unit
        found |= zip(batch.rows.tolist(), (along < boundary.at).tolist(), strict=True)
    return [found[place] for place in range(len(prompts))]


def with_keep(seen: Seen, kept: Kept) -> Seen:
    """Add what edits are to keep to the texts that a method's capture reads."""
    if not kept.ids:
        return seen
    answers = kept.responses if seen.capture.responses else [()] * len(kept.ids)
    return replace(seen, texts={**seen.texts, "keep": list(map(Text.of, kept.ids, answers))})


def residuals(session: Session) -> list[Tensor]:
    """Return residuals (P, L, D) of target and contrast prompts after each layer, on the CPU.

    Raises:
        MeasurementError: they are not finite.
    """
    seen = session.observe(ResidualsAlone())
    found = [_in_order(seen.residuals[side]) for side in SIDES]
    if not all(bool(torch.isfinite(x).all()) for x in found):
        raise MeasurementError("residuals are not finite: try --set model.dtype=float32")
    return found


def _in_order(run: Pass) -> Tensor:
    parts = [(batch.rows, x[:, 1:].float().cpu()) for batch, x in run()]
    order = torch.cat([rows for rows, _ in parts]).argsort()
    return torch.cat([x for _, x in parts])[order]


def prepare(
    session: Session, directions: Directions, folder: Path, seen: Seen | None = None
) -> EditingSession:
    """Prepare the method for the writers that the configuration edits.

    What it captured of the model when it was `seen` is stored in `folder`; without that, what stands there
    is read back.

    Raises:
        MeasurementError: what was captured cannot be used.
        StorageError: it cannot be written.
        RunStateError: it was written by a version that captured other things.
    """
    kind, stored = kind_of(session.config), folder / CAPTURED
    captured = read_tensors(stored, kind.layout) if seen is None else None
    if seen is not None and kind.keeps:
        session = replace(session, kept=choose_keep(session, directions))
        seen = with_keep(seen, session.kept)
    if captured is None:
        captured = captured_of(session, directions, seen)
        if captured:
            save_tensors(stored, captured, {"format": "pt", LAYOUT: kind.layout})
    return EditingSession(**vars(session), method=kind.bind(session, directions, captured))


def captured_of(
    session: Session, directions: Directions, seen: Seen | None = None
) -> dict[str, Tensor]:
    """Return what the method captures of the model: none where directions are all that it needs."""
    if seen is None:
        capture = kind_of(session.config).capture(session)
        if capture == ResidualsAlone():
            return {}
        seen = session.observe(capture)
    return seen.capture.tensors(seen, directions)


def restore(session: Session, folder: Path) -> EditingSession:
    """Prepare the method of the run in `folder` from what that found.

    Raises:
        RunStateError: the folder has no directions that can be read.
    """
    known = read_directions(folder / DIRECTIONS)
    if known is None:
        raise RunStateError(f"{folder} has no readable {DIRECTIONS}")
    return prepare(session, known[0], folder)


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
