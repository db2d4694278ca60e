"""Where a model's layers are, and which matrices write to the residual stream.

Architectures are data (`data/architectures/*.toml`). A model that no row describes is a loud error,
never a guess; what a row names but a run does not edit is in the coverage list.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from excise.errors import ConfigError, UnknownArchitecture


class WriterRow(BaseModel):
    """One writer of every layer, as the architecture file states it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    component: str
    module: str
    post_norms: tuple[str, ...] = ()
    optional: bool = False  # some models of the family, or some layers, do not have it


class ArchitectureRow(BaseModel):
    """One architecture file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    model_types: tuple[str, ...]
    backbone: str
    layers: str
    gain: Literal["weight", "1+weight"] = "weight"
    shared_kv: str | None = None  # config attribute: per layer None, "store" or "reuse"
    unknown: tuple[str, ...] = ()  # parts of a layer that write and that no row can edit yet
    writers: tuple[WriterRow, ...]


@dataclass(frozen=True)
class Writer:
    """A matrix whose output is added to the residual. Weight (O, I), O = D."""

    component: str
    layer: int
    name: str  # module path in the model
    module: nn.Linear
    gain: Tensor | None  # (O,) float32: product of the post-norms' gains, None without post-norm

    @property
    def key(self) -> str:
        """Its name in tables and records."""
        return f"{self.component}@{self.layer}"


@dataclass(frozen=True)
class Coverage:
    """What is edited and what is not, with the reason; shown in `inspect`, record and card."""

    edited: tuple[str, ...]
    not_edited: tuple[str, ...]


@dataclass(frozen=True)
class Anatomy:
    """Layers and writers of one loaded model. L layers, residual width D."""

    model_type: str
    backbone: nn.Module
    layers: tuple[nn.Module, ...]
    writers: tuple[Writer, ...]  # all that the row names and the model has
    width: int
    skippable: int  # layers below this one may be skipped when their output is known

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components, in the row's order."""
        return tuple(dict.fromkeys(writer.component for writer in self.writers))

    def select(self, components: tuple[str, ...]) -> tuple[Writer, ...]:
        """The writers of these components.

        Raises:
            ConfigError: a component that this model does not have.
        """
        for name in components:
            if name not in self.components:
                raise ConfigError(
                    f"edit.components: {self.model_type} has no component {name!r}; "
                    f"it has {', '.join(self.components)}"
                )
        return tuple(writer for writer in self.writers if writer.component in components)

    def coverage(self, components: tuple[str, ...]) -> Coverage:
        """What an edit of `components` touches, and what else writes to the residual."""
        edited, other = [], ["embedding: not a writer of a layer"]
        for name in self.components:
            rows = [w for w in self.writers if w.component == name]
            line = f"{name}: {len(rows)} matrices, layers {_spans([w.layer for w in rows])}"
            if name in components:
                edited.append(line)
            else:
                other.append(f"{line} (name it in edit.components to edit it)")
        return Coverage(tuple(edited), tuple(other))


@cache
def architectures() -> dict[str, ArchitectureRow]:
    """model_type -> row, from the data files."""
    rows: dict[str, ArchitectureRow] = {}
    folder = Path(str(resources.files("excise"))) / "data" / "architectures"
    for path in sorted(folder.glob("*.toml")):
        row = ArchitectureRow.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        rows.update(dict.fromkeys(row.model_types, row))
    return rows


def row_for(model_type: str) -> ArchitectureRow:
    """The row of a model type.

    Raises:
        UnknownArchitecture: there is none.
    """
    row = architectures().get(model_type)
    if row is None:
        known = ", ".join(sorted(architectures()))
        raise UnknownArchitecture(
            f"model type {model_type!r}: no data row says where its writers are (known: {known}); "
            "ARCHITECTURE.md shows how to add one"
        )
    return row


def describe(model: nn.Module) -> Anatomy:
    """Find the layers and writers of a loaded causal LM.

    Raises:
        UnknownArchitecture: no row, or the model lacks what its row names.
    """
    config: Any = model.config
    row = row_for(config.model_type)
    layers = tuple(_get(model, row.layers, config.model_type))
    for name in row.unknown:
        if any(getattr(layer, name, None) is not None for layer in layers):
            raise UnknownArchitecture(
                f"model type {config.model_type!r}: its layers have {name}, which write to the "
                "residual and which no data row describes yet: they would be left unedited"
            )
    writers = [
        writer
        for index, layer in enumerate(layers)
        for spec in row.writers
        if (writer := _writer(row, spec, index, layer, config.model_type)) is not None
    ]
    return Anatomy(
        model_type=config.model_type,
        backbone=_get(model, row.backbone, config.model_type),
        layers=layers,
        writers=tuple(writers),
        width=int(config.hidden_size),
        skippable=_skippable(row, config, len(layers)),
    )


def _writer(
    row: ArchitectureRow, spec: WriterRow, index: int, layer: nn.Module, model_type: str
) -> Writer | None:
    first = spec.module.split(".")[0]
    if spec.optional and getattr(layer, first, None) is None:
        return None
    module = _get(layer, spec.module, model_type)
    if not isinstance(module, nn.Linear):
        raise UnknownArchitecture(
            f"{model_type}, layer {index}: {spec.module} is a {type(module).__name__}, not a Linear"
        )
    norms = [_get(layer, name, model_type) for name in spec.post_norms]
    gain: Tensor | None = None
    for norm in norms:
        weight = norm.weight.detach().float() + (1.0 if row.gain == "1+weight" else 0.0)
        gain = weight if gain is None else gain * weight
    return Writer(spec.component, index, f"{row.layers}.{index}.{spec.module}", module, gain)


def _skippable(row: ArchitectureRow, config: Any, layers: int) -> int:
    if row.shared_kv is None:
        return layers
    modes = getattr(config, row.shared_kv)
    stores = [index for index, mode in enumerate(modes) if mode == "store"]
    return min(stores, default=layers)


def _get(root: nn.Module, path: str, model_type: str) -> Any:
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise UnknownArchitecture(
            f"model type {model_type!r}: its data row names {path}, which this model does not have"
        ) from None


def _spans(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def check_finite(model: nn.Module) -> str | None:
    """Name of the first parameter that holds a NaN or an infinity, if any does."""
    for name, parameter in model.named_parameters():
        # Both ends show any NaN or infinity, several times faster than a mask of all elements.
        if parameter.numel() and not all(map(torch.isfinite, torch.aminmax(parameter))):
            return name
    return None
