"""Fold edits into a source checkpoint, tensor by tensor.

An edit changes neither dtype nor shape, so a file is copied as it is and only the bytes of its
edited tensors are written anew: every header, offset, other tensor and other file stays what it
was, and memory does not grow with the model. The copy stands beside its destination until it is
complete, then takes its name.

Which tensor a writer was loaded from is proven by its values (`matching`). An expert's matrix is
edited where it stands: in a tensor of its own, or in its slice of one that holds all experts.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from excise.checkpoints.model_folder import is_other_form, weight_files, weight_index
from excise.errors import ExportError
from excise.events import Notice, OnEvent, ignore, track
from excise.export.matching import TensorPlace, WriterPlace, find_tensors
from excise.files import add_files, check_destination, copy_bytes, staged
from excise.folders import list_files
from excise.model.anatomy import Writer
from excise.model.edits import Edit
from excise.model.overrides import threads

_LOW_RANK = 16  # an edit of at most this rank costs a few operations per element
_BLOCK = 1 << 17  # elements computed at a time: they stay in the processor's cache
_PRODUCT_BLOCK = 1 << 20  # the same for higher ranks, whose products need more rows at a time
_WORKERS = 2  # files in work at a time: one is copied while another's tensors are computed


@dataclass(frozen=True)
class Merge:
    """Result of a merge.

    Attributes:
        tensors: the checkpoint's names of the edited tensors.
        left_out: files of the source that were not copied: its weights in other formats.
        unindexed: weight files that are not part of the checkpoint; they were copied unedited.
        bytes: size of all files together.
    """

    path: Path
    tensors: tuple[str, ...]
    left_out: tuple[str, ...]
    unindexed: tuple[str, ...]
    bytes: int


def merge_checkpoint(
    source: Path,
    destination: Path,
    edits: Mapping[str, Edit],
    writers: Sequence[Writer],
    on_event: OnEvent = ignore,
    extra_files: Mapping[str, str] | None = None,
) -> Merge:
    """Write `source` with `edits` folded in to the new folder `destination`.

    Args:
        source: folder of the checkpoint that the writers' model was loaded from.
        destination: a new or empty folder; it is seen when all of it is there.
        edits: writer name -> edit; writers without one are left alone.
        writers: the loaded model's writers, holding their original values.
        on_event: told of each file.
        extra_files: name -> text of files to add, in place of the source's of the same name.

    Raises:
        OutputError: `destination` holds something, or no folder can be made there.
        ExportError: a writer's values are not in the checkpoint, or an edit cannot be stored.
        StorageError: the disk is full or a write failed; nothing is left behind.
    """
    check_destination(destination, source)
    chosen = [writer for writer in writers if writer.name in edits]
    assert len(chosen) == len(edits), "an edit of a writer that this model does not have"
    places = find_tensors(source, chosen)
    return write_checkpoint(source, destination, edits, places, on_event, extra_files)


def write_checkpoint(
    source: Path,
    destination: Path,
    edits: Mapping[str, Edit],
    places: Mapping[str, WriterPlace],
    on_event: OnEvent = ignore,
    extra_files: Mapping[str, str] | None = None,
    *,
    finish: Callable[[Path], None] | None = None,
) -> Merge:
    """Merge as `merge_checkpoint`, where the tensors of every edited writer are known already.

    Blocks of rows are computed in float32 (float64 stays) from the source's values and rounded once
    to the tensor's own dtype. Memory: a few blocks, whatever the size of the tensors.
    `finish` is given the folder once the source's files are in it, before it is seen.
    """
    check_destination(destination, source)
    extra = dict(extra_files or {})
    folds = _folds(edits, places)
    weights = _weights(source)
    files, left_out = _files(source, set(extra), weights)
    other = tuple(str(f) for f in files if f.suffix == ".safetensors" and f not in weights)
    if other:
        on_event(Notice(f"not part of the checkpoint, so copied unedited: {', '.join(other)}"))
    size = sum((source / file).stat().st_size for file in files)
    size += sum(len(text.encode()) for text in extra.values())
    each = threads(_threads_each(edits.values()))
    with staged(destination, size) as folder, each, ThreadPoolExecutor(_WORKERS) as pool:
        jobs = [
            pool.submit(_write_file, source / file, folder / file, folds.get(file, []))
            for file in files
        ]
        try:
            for job in track(jobs, "export", len(jobs), on_event):
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)
        if finish is not None:
            finish(folder)
        add_files(folder, extra)
    tensors = sorted({place.key for found in folds.values() for place, _ in found})
    return Merge(destination, tuple(tensors), left_out, other, size)


_Fold = tuple[TensorPlace, Edit]


def _folds(edits: Mapping[str, Edit], places: Mapping[str, WriterPlace]) -> dict[Path, list[_Fold]]:
    """Group the tensors that change by file, each with its edit."""
    folds: dict[Path, list[_Fold]] = {}
    for name, edit in edits.items():
        place = places[name]
        folds.setdefault(place.weight.file, []).append((place.weight, edit))
        shifts = edit.shift is not None and bool(edit.shift.any())
        if place.bias is not None and (shifts or edit.scale is not None):
            folds.setdefault(place.bias.file, []).append((place.bias, edit))
        elif shifts:
            raise ExportError(f"the edit of {name} needs a bias, and the checkpoint has none there")
    return folds


def _weights(source: Path) -> set[Path]:
    """List the files that the model is loaded from, relative to `source`: shards, and their index."""
    index = weight_index(source)
    files = weight_files(source) if index is None else [index, *weight_files(source)]
    return {file.relative_to(source) for file in files}


def _files(
    source: Path, replaced: set[str], weights: set[Path]
) -> tuple[list[Path], tuple[str, ...]]:
    """List the files to copy, relative to `source`, and those left out."""
    files = list_files(source, ExportError)
    stale = [file for file in files if _is_stale(file, weights)]
    kept = [file for file in files if file not in stale and str(file) not in replaced]
    return kept, tuple(str(file) for file in stale)


def _is_stale(file: Path, weights: set[Path]) -> bool:
    """Return whether a file holds the unedited weights in a format other than what was loaded.

    None of those is what was measured, and a runner might prefer one of them.
    """
    name = file.name.lower()
    beside = name.endswith((".safetensors", ".safetensors.index.json")) and file.parent == Path()
    return is_other_form(name) or (beside and file not in weights)


def _write_file(source: Path, target: Path, folds: list[_Fold]) -> None:
    """Write one file: its edited tensors, and all the bytes between them as they are."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as old, target.open("xb") as new:
        done = 0
        for place, edit in sorted(folds, key=lambda one: one[0].start):
            copy_bytes(old, new, done, place.start)
            fold(place, edit, old, new)
            done = place.stop
        copy_bytes(old, new, done, os.fstat(old.fileno()).st_size)
        new.flush()
        os.fsync(new.fileno())  # here, where another worker has something to compute meanwhile


def fold(
    place: TensorPlace,
    edit: Edit,
    old: io.BufferedReader,
    new: io.BufferedWriter | io.BufferedRandom,
) -> None:
    """Read a tensor from one file, edit it, and write it to the other at the same place.

    Raises:
        ExportError: its dtype cannot hold the edited values.
    """
    whole = rows_of_edit(edit, 0, len(edit.left))
    size = _BLOCK if edit.left.shape[1] <= _LOW_RANK else _PRODUCT_BLOCK
    for first, last in place.blocks(size):
        rows = place.read(old, first, last)
        if place.transposed:
            edited = _columns(whole, first, last).apply_to_weight(rows.mT).mT
        else:
            part = rows_of_edit(whole, first, last)
            edited = part.apply_to_weight(rows) if rows.ndim > 1 else part.apply_to_bias(rows)
        stored = edited.to(rows.dtype).contiguous()
        if not all(map(torch.isfinite, torch.aminmax(stored))):
            raise ExportError(f"the edited {place.key} holds values that {place.dtype} cannot")
        place.write(new, first, stored)


def _threads_each(edits: Iterable[Edit]) -> int:
    """Choose the threads of each worker: only edits of high rank have products that are worth several.

    Elsewhere the threads wait for each other at every small step, which on a busy machine made a
    merge ten times slower.
    """
    rank = max((edit.left.shape[1] for edit in edits), default=0)
    return 1 if rank <= _LOW_RANK else max(1, torch.get_num_threads() // _WORKERS)


def rows_of_edit(edit: Edit, first: int, last: int) -> Edit:
    """Return the edit of the output rows first <= row < last, on the CPU."""
    scale = None if edit.scale is None else edit.scale[first:last].cpu()
    shift = None if edit.shift is None else edit.shift[first:last].cpu()
    return Edit(edit.left[first:last].cpu(), edit.right.cpu(), scale, shift)


def _columns(edit: Edit, first: int, last: int) -> Edit:
    """Return the edit of the input columns first <= column < last."""
    return Edit(edit.left, edit.right[:, first:last], edit.scale, edit.shift)
