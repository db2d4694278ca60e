"""A run's parts, set up: prompts and model in, method and scorers out. Nothing is searched here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from excise.capture.directions import Directions, auc, from_means
from excise.capture.residuals import Pass, geometric_median, mean, projections, residual_pass
from excise.checkpoints.loading import Loaded, load
from excise.config import Config, DirectionSection
from excise.engine.engine import Engine, Plan, Reference
from excise.errors import ConfigError, MeasurementError, PromptError, RunStateError
from excise.events import OnEvent, track
from excise.methods.registry import Bench, Method, kind_of
from excise.model.anatomy import Writer
from excise.model.edits import Edit
from excise.prompts.chat_template import Dressing, after_answer, dress
from excise.prompts.sets import PromptSet, PromptSets
from excise.prompts.template_rendering import Renderer
from excise.prompts.tokens import batches, check_known, encode, end_tokens, pad_token, unnamed_end
from excise.record import Separation
from excise.runs.response_prefix import LONGEST, Opening, find_opening, given_opening
from excise.runs.run_folder import (
    CAPTURED,
    DIRECTIONS,
    LAYOUT,
    read_directions,
    read_opening,
    read_tensors,
    save_tensors,
)
from excise.search.pareto import Objective
from excise.search.refinement import direction_engine
from excise.search.scorers import (
    Markers,
    ScoreContext,
    Scorer,
    find_scorers,
    needs_of,
    read_markers,
)

_CAPTURE_ROWS = 64


@dataclass(frozen=True)
class Tokens(Mapping[str, list[list[int]]]):
    """Token ids of the prompts, by role, and how they came to be."""

    rows: dict[str, list[list[int]]]
    dressing: Dressing
    opening: Opening = field(default_factory=Opening)

    def __getitem__(self, role: str) -> list[list[int]]:
        return self.rows[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def opened(self, opening: Opening) -> Tokens:
        """The same with `opening` at the end of every prompt."""
        rows = {role: [[*row, *opening.ids] for row in rows] for role, rows in self.rows.items()}
        return replace(self, rows=rows, opening=opening)

    def as_dict(self) -> dict[str, Any]:
        """How prompts are put to the model, for the study and the record."""
        return {**self.dressing.as_dict(), "opening": self.opening.as_dict()}

    @property
    def notes(self) -> list[str]:
        """The same in sentences."""
        return [note for note in (*self.dressing.notes, self.opening.note) if note]


@dataclass(frozen=True)
class Scoring:
    """The scorers of a run, by when they are asked."""

    objectives: tuple[Scorer, ...]
    report: tuple[Scorer, ...]
    final: tuple[Scorer, ...]
    markers: Markers

    @property
    def every_trial(self) -> tuple[Scorer, ...]:
        """What each trial is measured by."""
        return self.objectives + self.report

    def goals(self) -> list[Objective]:
        """The objectives as the front sees them."""
        return [
            Objective(s.name, 1 if s.goal == "minimize" else -1, s.worth) for s in self.objectives
        ]

    def check(self, sets: PromptSets) -> None:
        """Ask every scorer for its needs, so that a missing answer column is said before the work.

        Raises:
            ConfigError: a scorer needs what the prompts do not have.
        """
        for scorer in (*self.objectives, *self.report, *self.final):
            needs_of(scorer, self.context(sets.target_eval, sets.contrast_eval))
        for scorer in self.final:
            needs_of(scorer, self.context(sets.target_holdout, sets.contrast_holdout))

    def context(self, target: PromptSet, contrast: PromptSet) -> ScoreContext:
        """What scorers know when these two sets are measured."""
        prompts = {"target": target.prompts, "contrast": contrast.prompts}
        return ScoreContext(self.markers, prompts)


def scoring(config: Config) -> Scoring:
    """The scorers that a configuration names.

    Every trial has `behaviour_rate`, `drift` and `drift_first` (contract), asked for or not.

    Raises:
        ConfigError: an unknown scorer, no objective, or no markers.
    """
    section = config.scores
    if not section.objectives:
        raise ConfigError("scores.objectives is empty: name at least one scorer")
    always = ("behaviour_rate", "drift", "drift_first")
    report = dict.fromkeys((*always, *section.report))
    names = [name for name in report if name not in section.objectives]
    files = section.files
    objectives = find_scorers(section.objectives, files)
    markers = read_markers(section.markers, section.markers_file)
    if config.goal == "strengthen":
        objectives = [_wanted(scorer) for scorer in objectives]
        markers = replace(markers, silent=False)
    return Scoring(
        tuple(objectives),
        tuple(find_scorers(names)),
        tuple(find_scorers(section.final)),
        markers,
    )


def _wanted(scorer: Scorer) -> Scorer:
    """The behaviour rate as an objective of a run that edits the behaviour in."""
    if scorer.name != "behaviour_rate":
        return scorer
    return replace(scorer, goal="maximize")


def tokenise(loaded: Loaded, sets: PromptSets, config: Config) -> Tokens:
    """Token ids of every prompt, by role: once, and before anything is written.

    Raises:
        ModelError: the chat template cannot render a prompt, or no token ends a response.
        PromptError: prompts and responses are longer than the model has positions.
    """
    section = config.prompts
    ends, tokenizer = end_tokens(loaded.model, loaded.tokenizer), loaded.tokenizer
    with Renderer() as renderer:
        dressing = dress(tokenizer, section, renderer, loaded.folder)
        note = unnamed_end(tokenizer, after_answer(dressing, renderer), ends)
        rows = {
            s.role: encode(tokenizer, s, section, dressing, renderer) for s in sets.all() if len(s)
        }
    for ids in rows.values():
        check_known(tokenizer, ids, _token_ids(loaded))
    _check_positions(loaded, rows, config)
    notes = (*dressing.notes, *filter(None, (note,)))
    return Tokens(rows, replace(dressing, notes=notes))


def _token_ids(loaded: Loaded) -> int:
    return int(loaded.model.config.get_text_config().vocab_size)


def _check_positions(loaded: Loaded, rows: dict[str, list[list[int]]], config: Config) -> None:
    """Refuse what has no position, in models that learn a vector for each; others go on without end."""
    text = loaded.model.config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    if most is None or getattr(text, "rope_parameters", None):
        return
    prompt, new = max(map(len, chain(*rows.values()))), max(config.scores.max_new_tokens, LONGEST)
    if prompt + new > most:
        raise PromptError(
            f"the longest prompt has {prompt} tokens, and {new} more do not fit the {most} positions "
            "that this model has: give shorter prompts, or lower --max-new-tokens"
        )


def open_responses(
    loaded: Loaded, tokens: Tokens, config: Config, markers: Markers, known: Opening | None = None
) -> Tokens:
    """`tokens` with what every response begins with: `known`, the configuration's, or found now."""
    given, opening = config.prompts.response_prefix, known
    if opening is None and given is not None:
        opening = given_opening(loaded.tokenizer, given)
        check_known(loaded.tokenizer, [opening.ids], _token_ids(loaded))
    if opening is None:
        prompts = {side: tokens[side] for side in ("target", "contrast")}
        thinking = config.prompts.thinking
        opening = find_opening(loaded, prompts, thinking=thinking, shows=markers.holds)
    return tokens.opened(opening)


def stored_tokens(
    loaded: Loaded, sets: PromptSets, config: Config, markers: Markers, folder: Path
) -> Tokens:
    """The prompts' tokens as the run in `folder` put them to the model."""
    bare = tokenise(loaded, sets, config)
    return open_responses(loaded, bare, config, markers, read_opening(folder / DIRECTIONS))


def engine_for(
    loaded: Loaded,
    writers: Sequence[Writer],
    tokens: Tokens,
    part: Literal["eval", "holdout"],
    config: Config,
    plan: Plan,
    reference: Reference | None = None,
) -> Engine:
    """An engine that measures on the search prompts (`eval`) or on the holdout's."""
    prompts = {side: tokens[f"{side}_{part}"] for side in ("target", "contrast")}
    return Engine(
        loaded,
        writers,
        prompts,
        max_new_tokens=config.scores.max_new_tokens,
        plan=plan,
        reference=reference,
        spoken=tokens.opening.spoken,
    )


def find_directions(
    loaded: Loaded, tokens: Tokens, section: DirectionSection, on_event: OnEvent
) -> tuple[Directions, Separation]:
    """Directions from the direction prompts' residuals, and how well each separates the two sets.

    Raises:
        MeasurementError: residuals are not finite or do not differ.
    """
    passes = {
        side: _pass(loaded, side, tokens[side], section.winsor, on_event)
        for side in ("target", "contrast")
    }
    centre = geometric_median if section.center == "geometric_median" else mean
    means = {side: centre(run)[1:] for side, run in passes.items()}
    directions = from_means(means["target"], means["contrast"], projected=section.projected)
    along = {side: projections(run, directions.unit) for side, run in passes.items()}
    layers = directions.unit.shape[0]
    values = [auc(along["target"][:, i], along["contrast"][:, i]) for i in range(layers)]
    return directions, Separation(auc=values)


def residuals(
    loaded: Loaded, side: str, ids: list[list[int]], winsor: float | None, on_event: OnEvent
) -> Tensor:
    """Residuals (P, L, D) of one side's prompts after each layer, in prompt order, on the CPU.

    Raises:
        MeasurementError: they are not finite.
    """
    parts = [(batch.rows, x[:, 1:].float().cpu()) for batch, x in
             _pass(loaded, side, ids, winsor, on_event)()]  # fmt: skip
    order = torch.cat([rows for rows, _ in parts]).argsort()
    found = torch.cat([x for _, x in parts])[order]
    if not bool(torch.isfinite(found).all()):
        raise MeasurementError("residuals are not finite: try --set model.dtype=float32")
    return found


def _pass(
    loaded: Loaded, side: str, ids: list[list[int]], winsor: float | None, on_event: OnEvent
) -> Pass:
    pad = pad_token(loaded.model, loaded.tokenizer)
    padding = loaded.anatomy.padding
    chunks = batches(ids, _CAPTURE_ROWS, pad, loaded.device, padding=padding)
    run = residual_pass(loaded.anatomy, chunks, winsor)
    return lambda: track(run(), f"capture {side}", len(chunks), on_event)


def bench_for(
    loaded: Loaded, directions: Directions, tokens: Tokens, config: Config, on_event: OnEvent
) -> Bench:
    """What methods capture from and are bound to."""
    winsor = config.directions.winsor
    return Bench(
        loaded,
        tokens,
        directions,
        config,
        lambda: own_responses(loaded, tokens["contrast"], config),
        lambda side: _pass(loaded, side, tokens[side], winsor, on_event),
        on_event,
    )


def method_for(
    loaded: Loaded,
    directions: Directions,
    tokens: Tokens,
    config: Config,
    stored: Path,
    on_event: OnEvent,
    *,
    anew: bool,
) -> Method:
    """The method, prepared for the writers that the configuration edits.

    What it captures of the model is written to the file `stored`, and read back unless `anew`.

    Raises:
        MeasurementError: what was captured cannot be used.
        StorageError: it cannot be written.
        RunStateError: it was written by a version that captured other things.
    """
    kind = kind_of(config)
    bench = bench_for(loaded, directions, tokens, config, on_event)
    captured = None if anew else read_tensors(stored, kind.layout)
    if captured is None:
        captured = kind.capture(bench)
        if captured:
            save_tensors(stored, captured, {"format": "pt", LAYOUT: kind.layout})
    return kind.bind(bench, captured)


def stored_method(
    loaded: Loaded, tokens: Tokens, config: Config, folder: Path, on_event: OnEvent
) -> Method:
    """The method of the run in `folder`, from what it found.

    Raises:
        RunStateError: the folder has no directions that can be read.
    """
    known = read_directions(folder / DIRECTIONS)
    if known is None:
        raise RunStateError(f"{folder} has no readable {DIRECTIONS}")
    place = folder / CAPTURED
    return method_for(loaded, known[0], tokens, config, place, on_event, anew=False)


def own_edits(
    loaded: Loaded,
    method: Method,
    params: dict[str, Any],
    tokens: Tokens,
    config: Config,
    folder: Path,
    on_event: OnEvent,
) -> tuple[Loaded, Sequence[Writer], list[Edit | None]]:
    """A trial's edits, computed from the source's own weights, and the model that holds those.

    That is the searched model, except where its matrices were packed as they were loaded.

    Raises:
        RunStateError: the run folder no longer has its directions.
    """
    if loaded.quantize is not None:
        name = str(loaded.dtype).removeprefix("torch.")
        fields = {"quantize": None, "device_map": "cpu", "dtype": name}
        loaded = load(config.model.model_copy(update=fields))
        method = stored_method(loaded, tokens, config, folder, on_event)
    return loaded, method.writers, method.edits(method.candidate(params))


def own_responses(loaded: Loaded, contrast: list[list[int]], config: Config) -> list[Sequence[int]]:
    """The model's own responses to contrast prompts."""
    engine = direction_engine(loaded, {"contrast": contrast}, config)
    return [response.tokens for response in engine.original("contrast").responses]


def settled(config: Config, loaded: Loaded) -> Config:
    """The configuration with the dtype that "auto" came to, for what goes on with the run later.

    What it comes to depends on the memory that is free at the time.
    """
    name = str(loaded.dtype).removeprefix("torch.")
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": name})})
