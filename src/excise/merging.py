"""Fold edits into a source checkpoint, tensor by tensor.

An edit changes neither dtype nor shape, so a file is copied as it is and only the bytes of its
edited tensors are written anew: every header, offset, other tensor and other file stays what it
was, and memory does not grow with the model. The copy stands beside its destination until it is
complete, then takes its name.

Which tensor a writer was loaded from is proven by its values, never taken from its name: loaders
rename, so names only say where to look first. Fused experts and quantised sources are not known
here: no single tensor holds their writers' values, and that is an `ExportError`.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from excise.anatomy import Writer
from excise.edits import Edit
from excise.errors import ExportError
from excise.events import Notice, OnEvent, ignore, track
from excise.loading import weight_files
from excise.staging import add_files, check_destination, copy_bytes, staged

# What can be edited where it stands; 8 bit and packed formats would need a reading of their own.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Other forms of the unedited weights (the first four are pickles, which also can run code): none of
# them is what was measured, and a runner might prefer one of them.
_STALE = (".bin", ".pt", ".pth", ".ckpt", ".bin.index.json", ".gguf", ".onnx", ".h5", ".msgpack")
_HIDDEN = {".cache", ".git"}
_LOW_RANK = 16  # an edit of at most this rank costs a few operations per element
_BLOCK = 1 << 17  # elements computed at a time: they stay in the processor's cache
_PRODUCT_BLOCK = 1 << 20  # the same for higher ranks, whose products need more rows at a time
_WORKERS = 2  # files in work at a time: one is copied while another's tensors are computed


@dataclass(frozen=True)
class TensorPlace:
    """Where one tensor of a checkpoint is stored.

    Attributes:
        file: relative to the checkpoint's folder.
        key: its name there.
        dtype: as safetensors writes it, such as "BF16".
        start, stop: its bytes in the file.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self, file: io.BufferedReader, first: int, last: int) -> Tensor:
        """Rows first <= row < last in the stored dtype, from the open `file`."""
        rows = torch.empty((last - first, *self.shape[1:]), dtype=_DTYPES[self.dtype])
        file.seek(self._offset(first))
        if file.readinto(_bytes(rows)) != rows.nbytes:
            raise ExportError(f"{self.file} ends inside tensor {self.key}: download it again")
        return rows

    def write(self, file: io.BufferedWriter, first: int, rows: Tensor) -> None:
        """Store `rows`, which are of this tensor's dtype, from row `first` on."""
        assert rows.dtype == _DTYPES[self.dtype]
        file.seek(self._offset(first))
        file.write(_bytes(rows))

    def blocks(self, elements: int) -> Iterator[tuple[int, int]]:
        """Spans of rows with about this many elements; together they are all rows."""
        step = max(1, elements * self.shape[0] // torch.Size(self.shape).numel())
        for first in range(0, self.shape[0], step):
            yield first, min(first + step, self.shape[0])

    def _offset(self, row: int) -> int:
        return self.start + row * ((self.stop - self.start) // self.shape[0])


@dataclass(frozen=True)
class WriterPlace:
    """The tensors that a writer's weight (O, I) and bias (O,) were loaded from."""

    weight: TensorPlace
    bias: TensorPlace | None = None


@dataclass(frozen=True)
class Merge:
    """What a merge wrote.

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


def find_tensors(source: Path, writers: Sequence[Writer]) -> dict[str, WriterPlace]:
    """Writer name -> the tensors of the checkpoint that hold its values.

    A tensor is a writer's when it has its shape and, cast to the loaded dtype, equals it in every
    element. Of several that do, the one whose name ends most like the module's is taken.

    Raises:
        ExportError: no tensor does, two do equally well, or one would belong to two writers.
    """
    tensors = list_tensors(source)
    found: dict[str, WriterPlace] = {}
    owners: dict[TensorPlace, str] = {}
    for writer in writers:
        with _threads(1):
            weight = _find(source, tensors, f"{writer.name}.weight", writer.module.weight)
            bias: TensorPlace | None = None
            if writer.module.bias is not None:
                bias = _find(source, tensors, f"{writer.name}.bias", writer.module.bias)
        for place in (weight, bias):
            if place is not None and owners.setdefault(place, writer.name) != writer.name:
                raise ExportError(
                    f"{owners[place]} and {writer.name} are both loaded from {place.key}, so they "
                    "cannot be edited apart: leave one of them out of edit.components"
                )
        found[writer.name] = WriterPlace(weight, bias)
    return found


def list_tensors(source: Path) -> list[TensorPlace]:
    """Every tensor of the checkpoint in the folder `source`.

    Raises:
        ModelError: the checkpoint is not whole.
    """
    files = weight_files(source)
    if not (source / "model.safetensors.index.json").is_file():
        # Without an index this one is what loaders take, whatever else lies beside it.
        files = [file for file in files if file.name == "model.safetensors"] or files
    return [place for file in files for place in _read_header(source, file)]


def write_checkpoint(
    source: Path,
    destination: Path,
    edits: Mapping[str, Edit],
    places: Mapping[str, WriterPlace],
    on_event: OnEvent = ignore,
    extra_files: Mapping[str, str] | None = None,
) -> Merge:
    """`merge_checkpoint` where the tensors of every edited writer are known already.

    Blocks of rows are computed in float32 (float64 stays) from the source's values and rounded once
    to the tensor's own dtype. Memory: a few blocks, whatever the size of the tensors.
    """
    check_destination(destination, source)
    extra = dict(extra_files or {})
    folds = _folds(edits, places)
    files, left_out = _files(source, set(extra))
    known = {place.file for place in list_tensors(source)}
    other = tuple(str(f) for f in files if f.suffix == ".safetensors" and f not in known)
    if other:
        on_event(Notice(f"not part of the checkpoint, so copied unedited: {', '.join(other)}"))
    size = sum((source / file).stat().st_size for file in files)
    size += sum(len(text.encode()) for text in extra.values())
    threads = _threads(_threads_each(edits.values()))
    with staged(destination, size) as folder, threads, ThreadPoolExecutor(_WORKERS) as pool:
        jobs = [
            pool.submit(_write_file, source / file, folder / file, folds.get(file, []))
            for file in files
        ]
        try:
            for job in track(jobs, "export", len(jobs), on_event):
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)
        add_files(folder, extra)
    tensors = sorted(place.key for found in folds.values() for place, _ in found)
    return Merge(destination, tuple(tensors), left_out, other, size)


def _read_header(source: Path, file: Path) -> list[TensorPlace]:
    """The tensors of one shard; `weight_files` has checked that it is a whole safetensors file."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    places = []
    for key, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        shape = tuple(entry["shape"])
        places.append(
            TensorPlace(file.relative_to(source), key, entry["dtype"], shape, start, stop)
        )
    return places


def _find(source: Path, tensors: list[TensorPlace], name: str, values: Tensor) -> TensorPlace:
    if values.is_meta:
        raise ExportError(f"{name} is offloaded: its values must be in memory to be recognised")
    by_likeness: dict[int, list[TensorPlace]] = {}
    for place in tensors:
        if place.shape == tuple(values.shape) and place.dtype in _DTYPES:
            by_likeness.setdefault(_common_end(place.key, name), []).append(place)
    for likeness in sorted(by_likeness, reverse=True):
        equal = [place for place in by_likeness[likeness] if _holds(source, place, values)]
        if len(equal) > 1:
            raise ExportError(
                f"{equal[0].key} and {equal[1].key} of {source} both hold the values of {name} and "
                "are named equally like it: remove the one that the model does not use"
            )
        if equal:
            return equal[0]
    near = max(tensors, key=lambda place: _common_end(place.key, name))
    raise ExportError(
        f"no tensor of {source} holds the values of {name} {tuple(values.shape)} (nearest name: "
        f"{near.key}, {near.dtype} {near.shape}): export from the unquantised checkpoint that the "
        "model was loaded from, or leave this component out of edit.components"
    )


def _common_end(a: str, b: str) -> int:
    """How many dotted parts two names share, counted from the end."""
    pairs = zip(reversed(a.split(".")), reversed(b.split(".")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _holds(source: Path, place: TensorPlace, values: Tensor) -> bool:
    """Whether the stored tensor, cast to the dtype of `values`, equals it: a few rows, then all."""
    end = place.shape[0]
    probes = [(row, row + 1) for row in (0, end // 2, end - 1)]
    with (source / place.file).open("rb") as file:
        return all(
            torch.equal(place.read(file, a, b).to(values.dtype), values[a:b].detach().cpu())
            for spans in (probes, place.blocks(_BLOCK))
            for a, b in spans
        )


_Fold = tuple[TensorPlace, Edit]


def _folds(edits: Mapping[str, Edit], places: Mapping[str, WriterPlace]) -> dict[Path, list[_Fold]]:
    """File -> its tensors that change, each with its edit."""
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


def _files(source: Path, replaced: set[str]) -> tuple[list[Path], tuple[str, ...]]:
    """The files to copy, relative to `source`, and those left out; links are followed."""

    def unreadable(error: OSError) -> None:
        raise ExportError(f"cannot read {error.filename}: {error.strerror}")

    files: list[Path] = []
    seen: set[str] = set()
    for top, folders, names in os.walk(source, followlinks=True, onerror=unreadable):
        seen.add(os.path.realpath(top))
        folders[:] = [
            name
            for name in folders
            if name not in _HIDDEN and os.path.realpath(Path(top, name)) not in seen
        ]
        files += [Path(top, name).relative_to(source) for name in sorted(names)]
    stale = [file for file in files if file.name.lower().endswith(_STALE)]
    files = [file for file in files if file not in stale and str(file) not in replaced]
    for file in files:
        if not (source / file).is_file():
            raise ExportError(f"{source / file} links to a missing file: download the model again")
    return files, tuple(str(file) for file in stale)


def _write_file(source: Path, target: Path, folds: list[_Fold]) -> None:
    """Write one file: its edited tensors anew, and all the bytes between them as they are."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as old, target.open("xb") as new:
        done = 0
        for place, edit in sorted(folds, key=lambda fold: fold[0].start):
            copy_bytes(old, new, done, place.start)
            _fold(place, edit, old, new)
            done = place.stop
        copy_bytes(old, new, done, os.fstat(old.fileno()).st_size)
        new.flush()
        os.fsync(new.fileno())  # here, where another worker has something to compute meanwhile


def _fold(place: TensorPlace, edit: Edit, old: io.BufferedReader, new: io.BufferedWriter) -> None:
    whole = rows_of_edit(edit, 0, place.shape[0])
    size = _BLOCK if edit.left.shape[1] <= _LOW_RANK else _PRODUCT_BLOCK
    for first, last in place.blocks(size):
        rows, part = place.read(old, first, last), rows_of_edit(whole, first, last)
        edited = part.apply_to_weight(rows) if rows.ndim > 1 else part.apply_to_bias(rows)
        stored = edited.to(rows.dtype)
        if not all(map(torch.isfinite, torch.aminmax(stored))):
            raise ExportError(f"the edited {place.key} holds values that {place.dtype} cannot")
        place.write(new, first, stored)


def _threads_each(edits: Iterable[Edit]) -> int:
    """Threads of each worker: only edits of high rank have products that are worth several.

    Elsewhere the threads wait for each other at every small step, which on a busy machine made a
    merge ten times slower.
    """
    rank = max((edit.left.shape[1] for edit in edits), default=0)
    return 1 if rank <= _LOW_RANK else max(1, torch.get_num_threads() // _WORKERS)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with `count` threads here, and in threads that start within."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rows_of_edit(edit: Edit, first: int, last: int) -> Edit:
    """The edit of the output rows first <= row < last, on the CPU."""
    scale = None if edit.scale is None else edit.scale[first:last].cpu()
    shift = None if edit.shift is None else edit.shift[first:last].cpu()
    return Edit(edit.left[first:last].cpu(), edit.right.cpu(), scale, shift)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
