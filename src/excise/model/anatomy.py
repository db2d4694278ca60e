"""Where a model's layers are, and which matrices write to the residual stream.

Architectures are data (`data/architectures/*.toml`). A model that no row describes is a loud error,
never a guess; what a row names but a run does not edit is in the coverage list.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from excise.errors import ConfigError, UnknownArchitecture
from excise.model.parameters import device_of, is_packed, shape_of, values


class WriterRow(BaseModel):
    """One writer of every layer, as the architecture file states it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    component: str
    module: str
    post_norms: tuple[str, ...] = ()
    optional: bool = False  # some models of the family, or some layers, do not have it
    default: bool = True  # edited where edit.components names nothing
    experts: bool = False  # fused: one matrix per expert, in one tensor


class ArchitectureRow(BaseModel):
    """One architecture file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    model_types: tuple[str, ...]
    backbone: str
    layers: str
    gain: Literal["weight", "1+weight"] = "weight"
    shared_kv: str | None = None  # config attribute: per layer None, "store" or "reuse"
    skip: bool = (
        True  # layers below the first edited one may be left out when their output is known
    )
    padding_leaks: str | None = None  # config attribute: where true, padding changes what follows
    returns: Literal["tensor", "tuple"] = "tensor"  # what a layer gives
    stream: str | None = None  # config attribute: which of several residual streams layers read
    passes: tuple[str, ...] = ()  # modules whose output is added to the residual without a matrix
    writers: tuple[WriterRow, ...]


@dataclass(frozen=True)
class Writer:
    """A matrix whose output is added to the residual. Weight (O, I), O = D.

    `module` holds it: a Linear, a Conv1D (transposed), or all experts of a layer in one 3-D tensor,
    of which this writer is the one numbered `expert`.
    """

    component: str
    layer: int
    name: str  # module path in the model; of an expert, as if each had a module of its own
    module: Any
    gain: Tensor | None  # (O,) float32: product of the post-norms' gains, None without post-norm
    expert: int | None = None
    transposed: bool = False  # stored (I, O), or (E, I, O)
    floats: torch.dtype = torch.float32  # what the model computes in, where the weight is packed

    @property
    def key(self) -> str:
        """The name in tables and records."""
        expert = "" if self.expert is None else f".{self.expert}"
        return f"{self.component}@{self.layer}{expert}"

    @property
    def _tensor(self) -> str:
        return "weight" if self.expert is None else "down_proj"

    @property
    def weight(self) -> Tensor:
        """The matrix (O, I): a view of the module's parameter, or a copy where it is offloaded."""
        found = values(self.module, self._tensor)
        assert found is not None
        weight = found if self.expert is None else found[self.expert]
        return weight.mT if self.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """The bias (O,), or None: as `weight`."""
        if self.expert is None:
            return values(self.module, "bias")
        fused = values(self.module, "down_proj_bias")
        return None if fused is None else fused[self.expert]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I), without reading the weight."""
        o, i = shape_of(self.module, self._tensor)[-2:]
        return (i, o) if self.transposed else (o, i)

    @property
    def like(self) -> Tensor:
        """An empty tensor with the dtype and device of the outputs."""
        name = self._tensor
        dtype = self.floats if is_packed(self.module) else getattr(self.module, name).dtype
        return torch.empty(0, dtype=dtype, device=device_of(self.module, name))


@dataclass(frozen=True)
class Coverage:
    """What is edited, and what is not and why; shown in `inspect`, record and card."""

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
    defaults: tuple[str, ...] = ()  # components that are edited where none is named
    padding: bool = True  # whether its layers ignore left padding
    returns_tuple: bool = False  # whether a layer gives a tuple that begins with the hidden states
    stream: int | None = None  # of a stack of residual streams, the one that layers read
    passes: tuple[tuple[nn.Module, ...], ...] = ()  # per layer: what else is added, no matrix
    notes: tuple[str, ...] = ()  # what else there is to say of what is not edited
    tower: bool = False  # the language model of a multimodal model

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components, in the row's order."""
        return tuple(dict.fromkeys(writer.component for writer in self.writers))

    def residual(self, hidden: Tensor) -> Tensor:
        """Return the residual (B, T, D) that layers read, from what passes between them."""
        return hidden if self.stream is None else hidden[self.stream]

    def chosen(self, components: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Return these components; where none is named, the family's defaults.

        Raises:
            ConfigError: a component that this model does not have.
        """
        for name in components:
            if name not in self.components:
                raise ConfigError(
                    f"edit.components: {self.model_type} has no component {name!r}; "
                    f"it has {', '.join(self.components)}"
                )
        return components or self.defaults

    def select(self, components: tuple[str, ...] = ()) -> tuple[Writer, ...]:
        """Return the writers of `chosen(components)`."""
        names = self.chosen(components)
        return tuple(writer for writer in self.writers if writer.component in names)

    def coverage(self, components: tuple[str, ...] = ()) -> Coverage:
        """Return what an edit of `chosen(components)` touches, and what else writes to the residual."""
        names = self.chosen(components)
        edited, other = [], ["embedding: not a writer of a layer", *self.notes]
        for name in self.components:
            rows = [w for w in self.writers if w.component == name]
            line = f"{name}: {len(rows)} matrices, layers {spans([w.layer for w in rows])}"
            experts = len({w.expert for w in rows} - {None})
            line += f", {experts} experts each" if experts else ""
            if name in names:
                edited.append(line)
            else:
                other.append(f"{line} (name it in edit.components to edit it)")
        return Coverage(tuple(edited), tuple(other))


@cache
def architectures() -> dict[str, ArchitectureRow]:
    """Return the rows of the data files by model type."""
    rows: dict[str, ArchitectureRow] = {}
    folder = Path(str(resources.files("excise"))) / "data" / "architectures"
    for path in sorted(folder.glob("*.toml")):
        row = ArchitectureRow.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        rows.update(dict.fromkeys(row.model_types, row))
    return rows


def has_row(model: nn.Module) -> bool:
    """Return whether a row describes the model, or its language model where it is multimodal."""
    config: Any = model.config
    return config.get_text_config().model_type in architectures()


def row_for(model_type: str) -> ArchitectureRow:
    """Return the row of a model type.

    Raises:
        UnknownArchitecture: there is none.
    """
    row = architectures().get(model_type)
    if row is None:
        raise UnknownArchitecture(
            f"model type {model_type!r}: no data row says where its writers are; docs/families.md "
            "lists the known families, ARCHITECTURE.md shows how to add one"
        )
    return row


def describe(model: nn.Module) -> Anatomy:
    """Find the layers and writers of a loaded causal LM, or of a multimodal model's language model.

    Raises:
        UnknownArchitecture: no row, or the model lacks what its row names.
    """
    whole: Any = model.config
    config = whole.get_text_config()
    row = row_for(config.model_type)
    prefix, backbone = text_backbone(model, row)
    path = f"{prefix}{row.layers.removeprefix(row.backbone)}"
    layers = tuple(_get(model, path, config.model_type))
    writers = [
        writer
        for index, layer in enumerate(layers)
        for spec in row.writers
        for writer in _writers(row, spec, index, layer, f"{path}.{index}", config.model_type)
    ]
    check_unshared(writers, config.model_type)
    floats = getattr(model, "dtype", torch.float32)
    writers = [replace(w, floats=floats) if is_packed(w.module) else w for w in writers]
    found = dict.fromkeys(w.component for w in writers)
    notes = [f"{name}: added to the residual without a matrix" for name in row.passes]
    if whole is not config:
        notes.append("vision and audio towers and projectors: not part of the language model")
    return Anatomy(
        model_type=config.model_type,
        backbone=backbone,
        layers=layers,
        writers=tuple(writers),
        width=int(config.hidden_size),
        skippable=_skippable(row, config, len(layers)),
        defaults=tuple(s.component for s in row.writers if s.default and s.component in found),
        padding=row.padding_leaks is None or not getattr(config, row.padding_leaks, False),
        returns_tuple=row.returns == "tuple",
        stream=None if row.stream is None else int(getattr(config, row.stream)),
        passes=tuple(
            tuple(_get(layer, name, config.model_type) for name in row.passes) for layer in layers
        ),
        notes=tuple(notes),
        tower=whole is not config,
    )


def text_backbone(model: nn.Module, row: ArchitectureRow) -> tuple[str, nn.Module]:
    """Return path and module of the language model below its head, also inside a multimodal model.

    Raises:
        UnknownArchitecture: it is not found.
    """
    whole: Any = model.config
    text = whole.get_text_config()
    if whole is text:
        return row.backbone, _get(model, row.backbone, text.model_type)
    inner = row.layers.removeprefix(f"{row.backbone}.")
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if config is text and isinstance(getattr(module, inner, None), nn.ModuleList):
            return path, module
    raise UnknownArchitecture(
        f"model type {whole.model_type!r}: no module of it runs the {text.model_type!r} layers"
    )


def _writers(
    row: ArchitectureRow,
    spec: WriterRow,
    index: int,
    layer: nn.Module,
    path: str,
    model_type: str,
) -> list[Writer]:
    """Return the writers of one row at one layer: none, one, or one per expert."""
    if spec.optional and _missing(layer, spec.module):
        return []
    module = _get(layer, spec.module, model_type)
    gain = _gain(row, spec, layer, model_type)
    name = f"{path}.{spec.module}"
    where = f"{model_type}, layer {index}: {spec.module}"
    if spec.experts:
        fused = getattr(module, "down_proj", None)
        if not isinstance(fused, nn.Parameter) or fused.dim() != 3:
            raise UnknownArchitecture(f"{where} is a {type(module).__name__}, not fused experts")
        return [
            Writer(
                spec.component,
                index,
                f"{name}.{expert}.down_proj",
                module,
                gain,
                expert,
                transposed=experts_transposed(module),
            )
            for expert in range(fused.shape[0])
        ]
    conv = type(module).__name__ == "Conv1D"
    if not isinstance(module, nn.Linear) and not conv:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        raise UnknownArchitecture(
            f"{where} is a {kind}, not a torch.nn.Linear: merge what wraps it"
        )
    return [Writer(spec.component, index, name, module, gain, transposed=conv)]


def experts_transposed(module: nn.Module) -> bool:
    """Return whether fused experts store their matrices as (E, I, O), as gpt-oss and Llama 4 do."""
    # Transformers' own interface states it; Llama 4 stands outside that interface.
    return bool(getattr(module, "is_transposed", type(module).__name__ == "Llama4TextExperts"))


def _gain(
    row: ArchitectureRow, spec: WriterRow, layer: nn.Module, model_type: str
) -> Tensor | None:
    gain: Tensor | None = None
    for name in spec.post_norms:
        if _missing(layer, name):  # a norm that only some layers have, such as those with experts
            continue
        norm = _get(layer, name, model_type)
        if isinstance(norm, nn.Identity):  # of models that leave the norm out
            continue
        found = values(norm, "weight")
        assert found is not None
        weight = found.detach().float() + (1.0 if row.gain == "1+weight" else 0.0)
        gain = weight if gain is None else gain * weight
    return gain


def check_unshared(writers: list[Writer], model_type: str) -> None:
    """Refuse a model in which two writers are one matrix.

    Raises:
        UnknownArchitecture: two are.
    """
    owners: dict[tuple[int, int | None], Writer] = {}
    for writer in writers:
        parameter = writer.module.weight if writer.expert is None else writer.module.down_proj
        other = owners.setdefault((id(parameter), writer.expert), writer)
        if other is not writer:
            raise UnknownArchitecture(
                f"model type {model_type!r}: {other.name} and {writer.name} are one matrix, so an "
                "edit of one layer would change another"
            )


def _skippable(row: ArchitectureRow, config: Any, layers: int) -> int:
    if not row.skip or row.stream is not None:
        return 0
    if row.shared_kv is None:
        return layers
    modes = getattr(config, row.shared_kv)
    stores = [index for index, mode in enumerate(modes) if mode == "store"]
    return min(stores, default=layers) if "reuse" in modes else layers


def _missing(root: nn.Module, path: str) -> bool:
    try:
        return root.get_submodule(path) is None
    except AttributeError:
        return True


def _get(root: nn.Module, path: str, model_type: str) -> Any:
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise UnknownArchitecture(
            f"model type {model_type!r}: its data row names {path}, which this model does not have"
        ) from None


def spans(numbers: list[int]) -> str:
    """Format numbers as ranges: [0, 1, 2, 5] -> '0-2, 5'."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
