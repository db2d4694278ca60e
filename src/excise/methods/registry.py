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
from excise.capture.residuals import Pass
from excise.checkpoints.loading import Loaded
from excise.config import Config
from excise.errors import ConfigError
from excise.events import OnEvent
from excise.methods import ara, ridge, subspace
from excise.methods.directional import DirectionalMethod
from excise.model.anatomy import Anatomy, Writer
from excise.model.edits import Edit
from excise.prompts.sets import PromptSets


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


@dataclass(frozen=True)
class Bench:
    """What a method is made from.

    Attributes:
        tokens: token ids of the prompts, by role.
        responses: makes the model's own greedy responses to the contrast prompts of the directions.
        residuals: returns a side's pass over residuals at the last prompt token.
    """

    loaded: Loaded
    tokens: Mapping[str, list[list[int]]]
    directions: Directions
    config: Config
    responses: Callable[[], Sequence[Sequence[int]]]
    residuals: Callable[[str], Pass]
    on_event: OnEvent

    @property
    def writers(self) -> Sequence[Writer]:
        """The writers that are edited."""
        return self.loaded.anatomy.select(self.config.edit.components)

    @property
    def strengthen(self) -> bool:
        """Whether the behaviour is edited in rather than out."""
        return self.config.goal == "strengthen"


Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """One method of the registry.

    Attributes:
        capture: measures what the method needs of the model, once per run; stored with the run.
        bind: makes the method from what was captured.
        check: raises `ConfigError` where settings, the number of prompts and the model do not fit.
        layout: version of what is captured; a run of another one is refused.
    """

    capture: Callable[[Bench], dict[str, Tensor]]
    bind: Callable[[Bench, Tensors], Method]
    check: Callable[[Config, int, Anatomy], None]
    layout: str = "1"


def _ridge_capture(bench: Bench) -> dict[str, Tensor]:
    return ridge.capture(
        bench.loaded, bench.writers, bench.tokens, bench.responses(), bench.config, bench.on_event
    )


def _ridge(bench: Bench, captured: Tensors) -> Method:
    layers = len(bench.loaded.anatomy.layers)
    return ridge.RidgeMethod(bench.writers, layers, captured, bench.config)


def _ara_capture(bench: Bench) -> dict[str, Tensor]:
    return ara.capture(bench.loaded, bench.writers, bench.tokens, bench.on_event)


def _ara(bench: Bench, captured: Tensors) -> Method:
    layers = len(bench.loaded.anatomy.layers)
    return ara.AraMethod(bench.writers, layers, captured, bench.config)


def _subspace_capture(bench: Bench) -> dict[str, Tensor]:
    target, contrast = bench.residuals("target"), bench.residuals("contrast")
    return subspace.capture(target, contrast, bench.directions, bench.config)


def _subspace(bench: Bench, captured: Tensors) -> Method:
    return subspace.SubspaceMethod(
        bench.writers,
        bench.directions,
        captured,
        bench.config.edit,
        strengthen=bench.strengthen,
    )


def _directional(bench: Bench, _captured: Tensors) -> Method:
    return DirectionalMethod(
        bench.writers, bench.directions, bench.config.edit, strengthen=bench.strengthen
    )


KINDS: dict[str, Kind] = {
    "directional": Kind(lambda _: {}, _directional, lambda *_: None),
    "subspace": Kind(_subspace_capture, _subspace, subspace.check),
    "ara": Kind(_ara_capture, _ara, ara.check),
    "ridge": Kind(_ridge_capture, _ridge, ridge.check, layout="2"),
}


def named(config: Config, anatomy: Anatomy) -> Config:
    """Return the configuration with its method named; where it names none, with the default.

    That is `ridge`, which removes a behaviour at the least drift for its time (docs/methods.md). It is
    `directional` where only directions will do or ridge was not tried: for refinement, for row norms "pre",
    for strengthening, and where experts are edited, whose moments would take more memory than the model.
    """
    if config.method is not None:
        return config
    only = config.search.refine > 0 or config.edit.row_norms == "pre"
    plain = _edited_experts(anatomy, config) or only or config.goal == "strengthen"
    return config.model_copy(update={"method": "directional" if plain else "ridge"})


def _edited_experts(anatomy: Anatomy, config: Config) -> list[Writer]:
    return [w for w in anatomy.select(config.edit.components) if w.expert is not None]


def kind_of(config: Config) -> Kind:
    """Return the method that a configuration names."""
    assert config.method is not None, "`named` comes first"
    return KINDS[config.method]


def check_method(anatomy: Anatomy, sets: PromptSets, config: Config) -> None:
    """Refuse settings that the method cannot work with, as far as that is known before the capture.

    Raises:
        ConfigError: settings, prompts and model do not fit.
    """
    if config.search.refine and config.method != "directional":
        raise ConfigError(
            f"search.refine moves the strengths of directions, and method {config.method} has none: "
            "use --method directional with --refine"
        )
    experts = _edited_experts(anatomy, config)
    if config.search.refine and experts:
        raise ConfigError(
            "search.refine does not reach into fused experts: leave "
            f"{experts[0].component} out of edit.components, or search without --refine"
        )
    kind_of(config).check(config, min(len(sets.target), len(sets.contrast)), anatomy)
