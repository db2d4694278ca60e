"""Find which tensor of a checkpoint a writer was loaded from, and prove it by its values.

Loaders rename, fuse and transpose, so names only say where to look first. A tensor is a writer's
when it has its shape and, cast to the loaded dtype, equals it in every element. So is a slice of a
3-D tensor that holds all experts of a layer, and so is either one stored transposed. Quantised sources
are not known here: no tensor holds their writers' values, and that is an error.

Shapes: O and I a writer's out and in features, E experts.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from excise.checkpoints.model_folder import read_tensors, weight_files
from excise.checkpoints.safetensors_headers import StoredTensor
from excise.errors import ExportError, ModelError
from excise.model.anatomy import Writer
from excise.model.overrides import threads
from excise.model.parameters import is_packed

# What can be edited where it stands; 8 bit and packed formats would need a reading of their own.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_BLOCK = 1 << 17  # elements compared at a time: they stay in the processor's cache
_PRINT = 8  # elements that are looked up before all are compared


@dataclass(frozen=True)
class TensorPlace:
    """Place of one tensor of a checkpoint, or of one expert's slice of it.

    Attributes:
        file: relative to the checkpoint's folder.
        key: its name there.
        dtype: as safetensors writes it, such as "BF16".
        shape: as stored, of the slice where it is one.
        start, stop: its bytes in the file.
        expert: which slice it is, or None.
        transposed: the writer's matrix (O, I) is stored as (I, O).
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    expert: int | None = None
    transposed: bool = False

    def read(self, file: io.BufferedReader, first: int, last: int) -> Tensor:
        """Read stored rows first <= row < last in the stored dtype, from the open `file`."""
        rows = torch.empty((last - first, *self.shape[1:]), dtype=_DTYPES[self.dtype])
        file.seek(self._offset(first))
        if file.readinto(_bytes(rows)) != rows.nbytes:
            raise ExportError(f"{self.file} ends inside tensor {self.key}: download it again")
        return rows

    def write(self, file: io.BufferedWriter | io.BufferedRandom, first: int, rows: Tensor) -> None:
        """Store `rows`, which are of this tensor's dtype, from row `first` on."""
        assert rows.dtype == _DTYPES[self.dtype]
        file.seek(self._offset(first))
        file.write(_bytes(rows))

    def blocks(self, elements: int) -> Iterator[tuple[int, int]]:
        """Yield spans of rows with about this many elements; together they are all rows."""
        step = max(1, elements * self.shape[0] // torch.Size(self.shape).numel())
        for first in range(0, self.shape[0], step):
            yield first, min(first + step, self.shape[0])

    def named_as_module(self) -> str:
        """Return the name that the tensor would have if every expert were a module of its own."""
        head, _, tail = self.key.rpartition(".")
        return self.key if self.expert is None else f"{head}.{self.expert}.{tail}"

    def _offset(self, row: int) -> int:
        return self.start + row * ((self.stop - self.start) // self.shape[0])


@dataclass(frozen=True)
class WriterPlace:
    """Tensors that a writer's weight (O, I) and bias (O,) were loaded from."""

    weight: TensorPlace
    bias: TensorPlace | None = None


def find_tensors(source: Path, writers: Sequence[Writer]) -> dict[str, WriterPlace]:
    """Find the tensors of the checkpoint that hold each writer's values: writer name -> tensors.

    Of several that do, the one whose name ends most like the module's is taken.

    Raises:
        ExportError: no tensor does, two do equally well, or one would belong to two writers.
    """
    shelf = _Shelf(source)
    found: dict[str, WriterPlace] = {}
    owners: dict[TensorPlace, str] = {}
    for writer in writers:
        with threads(1):
            weight = _find(shelf, writer, "weight", writer.weight)
            bias: TensorPlace | None = None
            if writer.bias is not None:
                bias = _find(shelf, writer, "bias", writer.bias)
        for place in (weight, bias):
            if place is not None and owners.setdefault(place, writer.name) != writer.name:
                raise ExportError(
                    f"{owners[place]} and {writer.name} are both loaded from {place.key}, so they "
                    "cannot be edited apart: leave one of them out of edit.components"
                )
        found[writer.name] = WriterPlace(weight, bias)
    return found


def check_stored(source: Path, writers: Sequence[Writer]) -> None:
    """Refuse writers that an export could not edit, by looking up each one's first values.

    Writers that are offloaded or packed are not checked.

    Raises:
        ModelError: no tensor that can be edited begins with the values of one of them.
    """
    shelf = _Shelf(source)
    for writer in writers:
        held = getattr(writer.module, "weight" if writer.expert is None else "down_proj")
        if held.is_meta or is_packed(writer.module):
            continue
        for kind, values in (("weight", writer.weight), ("bias", writer.bias)):
            if values is not None and not shelf.like(values):
                raise ModelError(_not_found(shelf, f"{writer.name}.{kind}", values))


def list_tensors(source: Path) -> list[TensorPlace]:
    """List every tensor of the checkpoint in the folder `source`.

    Raises:
        ModelError: the checkpoint is not whole.
    """
    return [_place(source, tensor) for tensor in read_tensors(weight_files(source))]


def _place(source: Path, tensor: StoredTensor) -> TensorPlace:
    file = tensor.file.relative_to(source)
    return TensorPlace(file, tensor.name, tensor.dtype, tensor.shape, tensor.start, tensor.stop)


class _Shelf:
    """Index of a checkpoint's tensors, and slices of them, by shape and first values."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.tensors = list_tensors(source)
        self._prints: dict[
            tuple[tuple[int, ...], torch.dtype], dict[tuple[float, ...], list[TensorPlace]]
        ] = {}

    def like(self, values: Tensor) -> list[TensorPlace]:
        """Return the places of this shape, in either layout, that begin with the same values."""
        shape = tuple(values.shape)
        known = self._prints.get((shape, values.dtype))
        if known is None:
            known = self._prints[shape, values.dtype] = {}
            for place in self.tensors:
                if place.dtype in _DTYPES:
                    for part in _parts(place, shape):
                        first = _begin(self._rows(part, 0, _PRINT), part).to(values.dtype)
                        known.setdefault(tuple(first.tolist()), []).append(part)
        begin = values[0] if values.ndim > 1 else values
        return known.get(tuple(begin[:_PRINT].detach().cpu().tolist()), [])

    def holds(self, place: TensorPlace, values: Tensor) -> bool:
        """Return whether the stored values, cast to the dtype of `values`, equal them everywhere."""
        stored = values.mT if place.transposed else values
        with (self.source / place.file).open("rb") as file:
            return all(
                torch.equal(place.read(file, a, b).to(stored.dtype), stored[a:b].detach().cpu())
                for a, b in place.blocks(_BLOCK)
            )

    def _rows(self, place: TensorPlace, first: int, last: int) -> Tensor:
        last = min(last, place.shape[0]) if place.transposed or len(place.shape) == 1 else first + 1
        with (self.source / place.file).open("rb") as file:
            return place.read(file, first, last)


def _begin(rows: Tensor, place: TensorPlace) -> Tensor:
    """Return the first values of the matrix's first row, or of the bias."""
    if rows.ndim == 1:
        return rows[:_PRINT]
    return rows[:_PRINT, 0] if place.transposed else rows[0, :_PRINT]


def _parts(place: TensorPlace, shape: tuple[int, ...]) -> Iterator[TensorPlace]:
    """List the parts of a stored tensor that could hold a matrix (O, I) or a bias (O,) of this shape."""
    if place.shape == shape:
        yield place
    if len(shape) == 2 and place.shape == shape[::-1]:
        yield replace(place, transposed=True)
    if len(place.shape) == len(shape) + 1 and place.shape[0]:
        size = (place.stop - place.start) // place.shape[0]
        for expert in range(place.shape[0]):
            start = place.start + expert * size
            part = replace(
                place, shape=place.shape[1:], start=start, stop=start + size, expert=expert
            )
            if part.shape == shape:
                yield part
            if len(shape) == 2 and part.shape == shape[::-1]:
                yield replace(part, transposed=True)


def _find(shelf: _Shelf, writer: Writer, kind: str, values: Tensor) -> TensorPlace:
    name = f"{writer.name}.{kind}"
    if values.is_meta:
        raise ExportError(f"{name} is offloaded: its values must be in memory to be recognised")
    names = {name, writer.name if kind == "weight" else f"{writer.name}_bias"}
    by_likeness: dict[int, list[TensorPlace]] = {}
    for place in shelf.like(values):
        likeness = max(_common_end(place.named_as_module(), one) for one in names)
        by_likeness.setdefault(likeness, []).append(place)
    for likeness in sorted(by_likeness, reverse=True):
        equal = [place for place in by_likeness[likeness] if shelf.holds(place, values)]
        if len(equal) > 1:
            raise ExportError(
                f"{equal[0].key} and {equal[1].key} of {shelf.source} both hold the values of "
                f"{name} and are named equally like it: remove the one that the model does not use"
            )
        if equal:
            return equal[0]
    raise ExportError(_not_found(shelf, name, values))


def _not_found(shelf: _Shelf, name: str, values: Tensor) -> str:
    near = max(shelf.tensors, key=lambda place: _common_end(place.key, name))
    return (
        f"no tensor of {shelf.source} holds the values of {name} {tuple(values.shape)} in a form that can "
        f"be edited (nearest name: {near.key}, {near.dtype} {near.shape}): use the unquantised checkpoint "
        "that the model was made from, or leave this component out of edit.components"
    )


def _common_end(a: str, b: str) -> int:
    """Count the dotted parts that two names share, from the end."""
    pairs = zip(reversed(a.split(".")), reversed(b.split(".")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
