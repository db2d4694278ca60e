"""Fold edits into a quantised checkpoint: what is edited is packed again, every other byte is a copy.

The search ran on a plain copy. A writer is found there by its values (`matching`), and its tensor in the
source by its name, which the copy keeps. An edited tensor is decoded, edited in float32, packed with its
scheme's own formula and written over the copied bytes, values and scales each in its place; headers,
offsets and settings stay what they were.

Scales of activations that were calibrated beforehand (static ones) stay too: they are of the original.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from excise.checkpoints.dequantise import Plain, mxfp4, tensor_of, wide_fp8
from excise.checkpoints.model_folder import read_tensors, weight_files
from excise.checkpoints.quantisation import SCALES
from excise.checkpoints.safetensors_headers import FP8, StoredTensor
from excise.errors import ConfigError, ExportError, StorageError
from excise.events import OnEvent, ignore, track
from excise.export.matching import TensorPlace, WriterPlace, find_tensors, list_tensors
from excise.export.merging import Merge, fold, write_checkpoint
from excise.export.packing import Repacked, output_directions, repack_fp8, repack_mxfp4
from excise.files import check_destination
from excise.model.anatomy import Writer
from excise.model.edits import Edit


@dataclass(frozen=True)
class Packing:
    """What packing did to one tensor.

    Attributes:
        error: |packed - edited| / |edited|, Frobenius norms.
        lost: |packed - edited| / |edited - original| along the edit's output directions: 1 where
            rounding undid the edit.
    """

    error: float
    lost: float


def merge_packed(
    plain: Plain,
    destination: Path,
    edits: Mapping[str, Edit],
    writers: Sequence[Writer],
    on_event: OnEvent = ignore,
    extra_files: Mapping[str, str] | None = None,
) -> tuple[Merge, dict[str, Packing]]:
    """Write a quantised checkpoint with `edits` folded in to the new folder `destination`.

    Args:
        plain: the copy that the writers' model was loaded from.
        destination: a new or empty folder; it is seen when all of it is there.
        edits: writer name -> edit; writers without one are left alone.
        writers: the loaded model's writers, holding the copy's values.
        on_event: told of each file and of each tensor.
        extra_files: name -> text of files to add, in place of the source's of the same name.

    Returns:
        The merge, and by tensor of the source what packing did to it.

    Raises:
        OutputError, ExportError, StorageError: as `merging.merge_checkpoint`.
    """
    check_destination(destination, plain.source)
    chosen = [writer for writer in writers if writer.name in edits]
    assert len(chosen) == len(edits), "an edit of a writer that this model does not have"
    places = find_tensors(plain.folder, chosen)
    stored = {t.name: t for t in read_tensors(weight_files(plain.source))}
    copied = {place.key: place for place in list_tensors(plain.folder)}
    parts, unpacked = _sorted(edits, places, stored)
    found: dict[str, Packing] = {}

    def write(folder: Path) -> None:
        steps: list[_Part | _Plain] = [*unpacked, *parts]
        for step in track(steps, "export", len(steps), on_event):
            if isinstance(step, _Part):
                values = step.stored
                target = folder / values.file.relative_to(plain.source)
                scales = folder / step.scales.file.relative_to(plain.source)
                packed = _pack(step, plain)
                _put(target, values, packed.values, step.expert)
                _put(scales, step.scales, packed.scales, step.expert)
                _note(found, values.name, packed)
            else:
                _fold_where_it_stands(step, stored[step[0].key], copied, plain.source, folder)

    merge = write_checkpoint(plain.source, destination, {}, {}, on_event, extra_files, finish=write)
    names = {*(place.key for place, _ in unpacked), *found}
    return replace(merge, tensors=tuple(sorted(names))), found


def check_packed(plain: Plain, writers: Sequence[Writer]) -> None:
    """Refuse writers that share a scale, and so could not be packed apart.

    Raises:
        ConfigError: experts in one tensor have one scale.
    """
    if all(writer.expert is None for writer in writers):
        return
    stored = {t.name: t for t in read_tensors(weight_files(plain.source))}
    for name, tensor in stored.items():
        scales = next((stored[name + end] for end in SCALES if name + end in stored), None)
        if scales is not None and len(tensor.shape) == 3 and scales.elements == 1:
            raise ConfigError(
                f"the experts in {name} share one scale, so an edit of one would change all: export "
                "with --unpack, or leave experts out of edit.components"
            )


@dataclass(frozen=True)
class _Part:
    """A packed matrix, or one expert's slice of a packed tensor, with its edit."""

    stored: StoredTensor
    scales: StoredTensor
    expert: int | None
    edit: Edit


_Plain = tuple[TensorPlace, Edit]


def _sorted(
    edits: Mapping[str, Edit],
    places: Mapping[str, WriterPlace],
    stored: Mapping[str, StoredTensor],
) -> tuple[list[_Part], list[_Plain]]:
    """Tell the edited tensors that are packed from those that the source stores as they are."""
    parts, unpacked = [], []
    for name, edit in edits.items():
        place = places[name].weight
        values, scales = _packed_as(place.key, stored)
        if values is None or scales is None:
            unpacked.append((place, edit))
        elif values.dtype in FP8 and place.transposed:
            raise ExportError(
                f"{values.name} is stored transposed in {values.dtype}, which cannot be packed again here: "
                "export it with --unpack"
            )
        else:
            parts.append(_Part(values, scales, place.expert, edit))
        bias = places[name].bias
        shifts = edit.shift is not None and bool(edit.shift.any())
        if bias is not None and (shifts or edit.scale is not None):
            unpacked.append((bias, edit))
    return parts, unpacked


def _packed_as(
    key: str, stored: Mapping[str, StoredTensor]
) -> tuple[StoredTensor | None, StoredTensor | None]:
    """Return the values and scales that a tensor of the plain copy was decoded from, where it was."""
    values = stored.get(key)
    if values is None:
        return stored[f"{key}_blocks"], stored[f"{key}_scales"]
    if values.dtype not in FP8:
        return None, None
    return values, next(stored[key + end] for end in SCALES if key + end in stored)


def _pack(part: _Part, plain: Plain) -> Repacked:
    values, scales = (tensor_of(t, part.expert) for t in (part.stored, part.scales))
    if values.dtype == torch.uint8:
        weight = mxfp4(values[None], scales[None])[0].mT.float()
    else:
        weight = wide_fp8(values, scales, plain.scheme.block)
    edited = part.edit.apply_to_weight(weight)
    if not bool(edited.isfinite().all()):
        raise ExportError(f"the edited {part.stored.name} holds values that are no numbers")
    basis = output_directions(part.edit, weight)
    if values.dtype == torch.uint8:
        return repack_mxfp4(edited, values, scales, basis)
    return repack_fp8(edited, values, scales, plain.scheme.block, basis)


def _put(file: Path, place: StoredTensor, values: Tensor, expert: int | None) -> None:
    """Write a tensor, or one expert's slice of it, over what stands in its place."""
    raw = values.contiguous().view(-1).view(torch.uint8).numpy().data
    try:
        with file.open("r+b") as opened:
            opened.seek(place.start + (expert or 0) * raw.nbytes)
            opened.write(raw)
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error.strerror or error}") from None


def _fold_where_it_stands(
    step: _Plain,
    stored: StoredTensor,
    copied: Mapping[str, TensorPlace],
    source: Path,
    folder: Path,
) -> None:
    """Edit a tensor that the source stores plainly, at its place there."""
    place, edit = step
    file = stored.file.relative_to(source)
    shift = stored.start - copied[place.key].start
    here = replace(place, file=file, start=place.start + shift, stop=place.stop + shift)
    with (source / file).open("rb") as old, (folder / file).open("r+b") as new:
        fold(here, edit, old, new)


def _note(found: dict[str, Packing], name: str, packed: Repacked) -> None:
    """Add what packing did to a matrix; of experts in one tensor the worst is kept."""
    (error, size), (behind, moved) = packed.squares, packed.along
    one = Packing(
        math.sqrt(error / size) if size else 0.0, math.sqrt(behind / moved) if moved else 0.0
    )
    worst = found.get(name, one)
    found[name] = Packing(max(one.error, worst.error), max(one.lost, worst.lost))
