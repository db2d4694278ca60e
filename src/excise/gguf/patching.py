"""Fold edits into a GGUF of the same model instead of converting the model anew.

Only the edited tensors' bytes change, and each keeps its type: every other tensor, every key and all
offsets in the file stay what they were. Rows are computed a block at a time, so memory does not grow with
the file. The source model's values are edited where they are in memory, else the values in the GGUF.

The file must hold this model's values, as far as its types can show that: names only say where to look.

Shapes: O rows and I columns of a writer, E experts.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import TensorNameMap
from torch import Tensor, nn

from excise.checkpoints.gguf_header import (
    GgufFile,
    GgufTensor,
    check_sizes,
    gguf_name,
    name_map,
    read_shards,
)
from excise.errors import ExportError, ModelError
from excise.events import OnEvent, ignore, track
from excise.export.merging import rows_of_edit
from excise.files import add_files, check_destination, copy_bytes, staged
from excise.gguf.ggml import Raw, check_can_store, from_float, to_float
from excise.model.anatomy import Writer
from excise.model.edits import Edit
from excise.model.overrides import threads

PATCHED = "edited-"  # put before the names of patched files
_BLOCK = 1 << 18  # elements computed at a time
_WORKERS = 2  # blocks computed at a time: ggml's quantiser and torch release the GIL
_PROBE = 16  # rows compared at each of a tensor's two ends and its middle
# Relative Frobenius distance between a model's values and their rounding to a type, with a margin; by
# bits per weight. Another model's values of the same shape are at about 1.4.
_ROUNDING = ((16, 0.01), (8, 0.03), (6, 0.06), (5, 0.1), (4, 0.2), (3, 0.35), (0, 0.6))
_SAME_NORMS = 0.01


@dataclass(frozen=True)
class Place:
    """Place of a writer's matrix or bias: `rows` rows of a shard's tensor, from row `first` on.

    Fused experts are one tensor (E, O, I), and its rows are those of all experts.
    """

    shard: int
    tensor: GgufTensor
    first: int
    rows: int
    is_bias: bool


@dataclass(frozen=True)
class _Fold:
    place: Place
    edit: Edit
    values: Tensor | None  # (O, I) or (O,): the source's, None where they are not in memory


@dataclass(frozen=True)
class Patch:
    """Files that a patch wrote, and the names of the tensors that changed."""

    files: tuple[Path, ...]
    tensors: tuple[str, ...]
    bytes: int


def patch_gguf(
    base: Path,
    destination: Path,
    edits: Mapping[str, Edit],
    writers: Sequence[Writer],
    model: nn.Module,
    on_event: OnEvent = ignore,
    extra_files: Mapping[str, str] | None = None,
    *,
    prefix: str = PATCHED,
) -> Patch:
    """Write `base` with `edits` folded in to the new folder `destination`.

    Args:
        base: a GGUF of the writers' model, or any one file of a split one.
        destination: a new or empty folder; it appears when all of it is there.
        edits: writer name -> edit.
        writers: the loaded model's writers, holding their original values.
        model: the model that they are of; its norms are compared too.
        on_event: told of each edited tensor.
        extra_files: name -> text of files to add.
        prefix: put before the names of the files.

    Raises:
        ModelError: `base` is not a whole GGUF of this model.
        ExportError: an edit cannot be stored in it.
        OutputError, StorageError: as `files.staged`.
    """
    check_destination(destination)
    shards = read_shards(base)
    folds = find_folds(shards, edits, writers, model)
    size = sum(shard.size for shard in shards)
    with staged(destination, size) as folder:
        steps = track(folds, "export", len(folds), on_event)
        for number, shard in enumerate(shards):
            mine = sum(fold.place.shard == number for fold in folds)
            target = folder / patched_name(shard.path, prefix)
            _write(shard.path, target, islice(steps, mine))
        add_files(folder, dict(extra_files or {}))
    files = tuple(destination / patched_name(shard.path, prefix) for shard in shards)
    return Patch(files, tuple(sorted({f.place.tensor.name for f in folds})), size)


def patched_name(base: Path, prefix: str = PATCHED) -> str:
    """Name the patched copy of a file, without what shells and Modelfiles could misread."""
    stem = re.sub(r"[^\w.+@-]+", "-", base.name.removesuffix(".gguf"))
    return f"{prefix}{stem}.gguf"


def find_folds(
    shards: Sequence[GgufFile],
    edits: Mapping[str, Edit],
    writers: Sequence[Writer],
    model: nn.Module,
) -> list[_Fold]:
    """Find where each edit goes, in the files' order; check everything before anything is written.

    Raises:
        ModelError: a tensor is missing, or has another shape or other values than the model's.
        ExportError: an edit needs a bias that the file lacks, or a type that cannot be written here.
    """
    check_sizes(shards)
    names = name_map(shards[0])
    where = {tensor.name: n for n, shard in enumerate(shards) for tensor in shard.tensors.values()}
    tensors = {t.name: t for shard in shards for t in shard.tensors.values()}
    path = shards[0].path
    _check_norms(path, shards, names, tensors, where, model)
    folds: list[_Fold] = []
    for writer in writers:
        edit = edits.get(writer.name)
        if edit is None:
            continue
        parts = [("weight", writer.weight)]
        if writer.bias is not None:
            parts.append(("bias", writer.bias))
        elif edit.shift is not None and bool(edit.shift.any()):
            raise ExportError(f"the edit of {writer.name} needs a bias, and {path} has none there")
        for part, values in parts:
            name = gguf_name(names, f"{_module_name(writer)}.{part}")
            if name is None or name not in tensors:
                raise ModelError(
                    f"{path} has no tensor for {writer.name}.{part}: it is not a GGUF of this model"
                )
            rows = 1 if part == "bias" else int(values.shape[0])
            first = rows * (writer.expert or 0)
            place = Place(where[name], tensors[name], first, rows, part == "bias")
            shape = tensors[name].shape[0 if writer.expert is None else 1 :]
            if shape != tuple(values.shape):
                raise ModelError(_shape(path, tensors[name], writer.name, tuple(values.shape)))
            _check_values(shards[place.shard].path, place, writer.name, values)
            check_can_store(place.tensor.type)
            folds.append(_Fold(place, edit, None if values.is_meta else values.detach()))
    return sorted(folds, key=lambda f: (f.place.shard, f.place.tensor.start, f.place.first))


def _module_name(writer: Writer) -> str:
    """Return a writer's name; for an expert, that of the module which holds all of them."""
    if writer.expert is None:
        return writer.name
    return re.sub(rf"\.{writer.expert}(?=\.[^.]+$)", "", writer.name)


def _check_norms(
    path: Path,
    shards: Sequence[GgufFile],
    names: TensorNameMap,
    tensors: Mapping[str, GgufTensor],
    where: Mapping[str, int],
    model: nn.Module,
) -> None:
    """Compare the norms: stored in float32, they tell a model from its siblings whatever the other types.

    Raises:
        ModelError: a norm has another shape, or other values.
    """
    pairs = []
    for name, parameter in model.named_parameters():
        found = tensors.get(gguf_name(names, name) or "") if parameter.dim() == 1 else None
        if found is None or "norm" not in name or parameter.is_meta or found.type.name != "F32":
            continue
        if found.shape != tuple(parameter.shape):
            raise ModelError(_shape(path, found, name, tuple(parameter.shape)))
        pairs.append((name, parameter, found))
    for name, parameter, found in pairs:
        with shards[where[found.name]].path.open("rb") as file:
            stored = torch.from_numpy(_read(file, found, 0, 1)[0].copy())
        ours = parameter.detach().float().cpu()
        # llama.cpp's converter adds one to gains that the model applies as 1 + weight.
        if not any(_distance(stored - shift, ours) <= _SAME_NORMS for shift in (0.0, 1.0)):
            raise ModelError(
                f"{found.name} of {path} does not hold the values of {name}: it is a GGUF of "
                "another model, or of this one in another version"
            )


def _check_values(path: Path, place: Place, name: str, values: Tensor) -> None:
    tensor = place.tensor
    if values.is_meta:
        return
    matrix = values.detach()[None] if place.is_bias else values.detach()
    last = matrix.shape[0]
    spans = {(max(0, at), min(last, at + _PROBE)) for at in (0, last // 2, last - _PROBE)}
    with path.open("rb") as file:
        stored = [_read(file, tensor, place.first + a, place.first + b) for a, b in sorted(spans)]
    ours = torch.cat([matrix[a:b].float().cpu() for a, b in sorted(spans)])
    apart = _distance(torch.from_numpy(np.concatenate(stored)), ours)
    if not apart <= _limit(tensor):
        raise ModelError(
            f"{tensor.name} of {path} does not hold the values of {name} (they are {apart:.2g} "
            f"apart): it is a GGUF of another model, or of this one in another version"
        )


def _shape(path: Path, tensor: GgufTensor, name: str, shape: tuple[int, ...]) -> str:
    return (
        f"{tensor.name} of {path} has the shape {tensor.shape}, and {name} has {shape}: it is not a "
        "GGUF of this model"
    )


def _limit(tensor: GgufTensor) -> float:
    bits = 8 * tensor.row_bytes / tensor.shape[-1]
    return next(limit for least, limit in _ROUNDING if bits >= least)


def _distance(stored: Tensor, ours: Tensor) -> float:
    return float((stored - ours).norm() / ours.norm().clamp_min(1e-12))


def _read(file: io.BufferedReader, tensor: GgufTensor, first: int, last: int) -> Any:
    """Read rows first <= row < last as float32 (rows, I)."""
    size = tensor.row_bytes
    file.seek(tensor.start + first * size)
    raw = np.frombuffer(file.read((last - first) * size), dtype=np.uint8)
    return to_float(raw.reshape(last - first, size), tensor.type)


def _write(source: Path, target: Path, folds: Iterable[_Fold]) -> None:
    """Copy one file with its edited rows replaced."""
    with source.open("rb") as old, target.open("xb") as new:
        done = 0
        for fold in folds:
            start = fold.place.tensor.start + fold.place.first * fold.place.tensor.row_bytes
            copy_bytes(old, new, done, start)
            done = _fold(fold, start, old, new)
        copy_bytes(old, new, done, os.fstat(old.fileno()).st_size)
        new.flush()
        os.fsync(new.fileno())


def _fold(fold: _Fold, start: int, old: io.BufferedReader, new: io.BufferedWriter) -> int:
    """Write the edited rows; return where they end."""
    place, tensor = fold.place, fold.place.tensor
    if place.is_bias:
        values = (
            torch.from_numpy(_read(old, tensor, place.first, place.first + 1)[0])
            if fold.values is None
            else fold.values
        )
        edited = fold.edit.apply_to_bias(values.cpu())
        return _write_at(_stored(tensor, edited[None]), start, new)
    step = max(1, _BLOCK // tensor.shape[-1])
    spans = [(n, min(n + step, place.rows)) for n in range(0, place.rows, step)]
    at = start
    with ThreadPoolExecutor(_WORKERS) as workers, threads(1):
        # As many blocks at a time as there are workers: memory does not grow with the tensor.
        for index in range(0, len(spans), _WORKERS):
            some = spans[index : index + _WORKERS]
            rows = [_rows(fold, first, last, old) for first, last in some]
            for raw in workers.map(partial(_edited, fold), some, rows):
                at = _write_at(raw, at, new)
    return at


def _rows(fold: _Fold, first: int, last: int, old: io.BufferedReader) -> Tensor:
    """Return the values to edit: the source's, else those of the file."""
    if fold.values is not None:
        return fold.values[first:last].cpu()
    at = fold.place.first
    return torch.from_numpy(_read(old, fold.place.tensor, at + first, at + last))


def _edited(fold: _Fold, span: tuple[int, int], rows: Tensor) -> Raw:
    edited = rows_of_edit(fold.edit, *span).apply_to_weight(rows)
    return _stored(fold.place.tensor, edited)


def _stored(tensor: GgufTensor, rows: Tensor) -> Raw:
    """Encode rows in the tensor's type."""
    values = rows.float().contiguous().numpy()
    limit = np.finfo(np.float16).max if tensor.type.name == "F16" else np.inf
    if not np.isfinite(values).all() or np.abs(values).max(initial=0) > limit:
        raise ExportError(f"the edited {tensor.name} holds values that {tensor.type.name} cannot")
    return from_float(values, tensor.type)


def _write_at(raw: Raw, at: int, new: io.BufferedWriter) -> int:
    new.seek(at)
    new.write(raw.data)
    return at + raw.nbytes
