"""Registry of methods: what each captures of a model once, and how candidates become edits.

A method is a module of pure maths and a thin one that binds it to captured tensors and writers.
ARCHITECTURE.md says how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from optuna.distributions import BaseDistribution
from torch import Tensor

from excise.capture.directions import Directions
from excise.capture.sweep import Capture, ResidualsAlone
from excise.checkpoints.loading import Loaded
from excise.config import Config, SettledConfig
from excise.events import OnEvent
from excise.methods import ara, ridge, subspace
from excise.methods.directional import DirectionalMethod
from excise.model.anatomy import Anatomy, Writer
from excise.model.edits import Edit


class Method(Protocol):
    """Interface of a method, prepared once per run. An edit depends on its candidate alone."""

    name: str
    writers: Sequence[Writer]
    notes: tuple[str, ...]  # writers that it leaves alone, and why

    def space(self) -> dict[str, BaseDistribution]:
        """Return the search space."""

    def candidate(self, params: Mapping[str, Any]) -> Any:
        """Make the candidate that these parameters name."""

    def edits(self, candidate: Any) -> list[Edit | None]:
        """Compute one edit per writer; None where the candidate leaves it alone.

        Raises:
            MeasurementError: this candidate has no edit, and why; its trial fails with that reason.
        """


class Bench(Protocol):
    """What a method is made from: a model and its direction prompts."""

    @property
    def config(self) -> SettledConfig:
        """The settings of a run."""

    @property
    def loaded(self) -> Loaded:
        """The original model."""

    @property
    def tokens(self) -> Mapping[str, list[list[int]]]:
        """Token ids of the prompts, by role."""

    @property
    def on_event(self) -> OnEvent:
        """Told of progress."""


def edited_writers(bench: Bench) -> Sequence[Writer]:
    """Return the writers that the configuration edits."""
    return bench.loaded.anatomy.select(bench.config.edit.components)


Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """One method of the registry.

    Attributes:
        capture: says what the method needs of the direction prompts, captured once and stored with the run.
        bind: makes the method from what was captured.
        check: raises `ConfigError` where settings, the number of prompts and the model do not fit.
        layout: version of what is captured; a run of another one is refused.
        keeps: it makes use of the keep set.
    """

    capture: Callable[[Bench], Capture]
    bind: Callable[[Bench, Directions, Tensors], Method]
    check: Callable[[Config, int, Anatomy], None]
    layout: str = "1"
    keeps: bool = False


def _ridge(bench: Bench, _directions: Directions, captured: Tensors) -> Method:
    layers = len(bench.loaded.anatomy.layers)
    return ridge.RidgeMethod(edited_writers(bench), layers, captured, bench.config)


def _ara(bench: Bench, _directions: Directions, captured: Tensors) -> Method:
    layers = len(bench.loaded.anatomy.layers)
    return ara.AraMethod(edited_writers(bench), layers, captured, bench.config)


def _subspace(bench: Bench, directions: Directions, captured: Tensors) -> Method:
    section, strengthen = bench.config.edit, bench.config.goal == "strengthen"
    return subspace.SubspaceMethod(
        edited_writers(bench), directions, captured, section, strengthen=strengthen
    )


def _directional(bench: Bench, directions: Directions, _captured: Tensors) -> Method:
    section, strengthen = bench.config.edit, bench.config.goal == "strengthen"
    return DirectionalMethod(edited_writers(bench), directions, section, strengthen=strengthen)


KINDS: dict[str, Kind] = {
    "directional": Kind(lambda _: ResidualsAlone(), _directional, lambda *_: None),
    "subspace": Kind(
        lambda b: subspace.SubspaceCapture(config=b.config), _subspace, subspace.check
    ),
    "ara": Kind(lambda b: ara.AraCapture(edited_writers(b)), _ara, ara.check, keeps=True),
    "ridge": Kind(
        lambda b: ridge.RidgeCapture(edited_writers(b), b.config.ridge.basis),
        _ridge,
        ridge.check,
        layout="2",
        keeps=True,
    ),
}


def settle(config: Config, loaded: Loaded) -> SettledConfig:
    """Return the configuration with the method and the dtype decided that it may leave open.

    The dtype is the one that the model was loaded in. The default method is `ridge`, which removes a
    behaviour at the least drift for its time (docs/methods.md). It is `directional` where only directions
    will do or ridge was not tried: for row norms "pre", for strengthening, and where experts are edited,
    whose moments would take more memory than the model.
    """
    method = config.method
    if method is None:
        writers = loaded.anatomy.select(config.edit.components)
        only = config.edit.row_norms == "pre" or config.goal == "strengthen"
        plain = only or any(w.expert is not None for w in writers)
        method = "directional" if plain else "ridge"
    tree = config.model_dump()
    model = {**tree["model"], "dtype": str(loaded.dtype).removeprefix("torch.")}
    return SettledConfig.model_validate({**tree, "method": method, "model": model})


def kind_of(config: SettledConfig) -> Kind:
    """Return the method that a configuration names."""
    return KINDS[config.method]


def check_method(bench: Bench) -> None:
    """Refuse settings that the method cannot work with, as far as that is known before the capture.

    Raises:
        ConfigError: settings, prompts and model do not fit.
    """
    config, anatomy = bench.config, bench.loaded.anatomy
    prompts = min(len(bench.tokens[side]) for side in ("target", "contrast"))
    kind_of(config).check(config, prompts, anatomy)
