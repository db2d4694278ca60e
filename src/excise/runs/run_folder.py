"""Make run folders, and read and write what they keep of the model.

That is the directions, how responses begin, and what the method captured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from excise.capture.directions import Directions
from excise.checkpoints.loading import Loaded
from excise.errors import OutputError, RunStateError, StorageError
from excise.files import check_writable, replacing
from excise.prompts.measured_sets import Opening
from excise.reading import is_file, is_folder, is_unicode
from excise.record import Separation
from excise.run_lock import LOCK, hold
from excise.runs.changed_settings import CONFIG
from excise.search import journal

DIRECTIONS = "directions.safetensors"
CAPTURED = "method.safetensors"
LAYOUT = "layout"  # in its metadata: which things were captured, and how


def check_output(out: Path, resume: bool) -> None:
    """Refuse a folder that holds something else.

    Raises:
        OutputError: it is a file, or a folder with another run or other files.
    """
    if not is_unicode(str(out)):
        raise OutputError(f"{str(out)!r} is not UTF-8 text: give --out another name")
    if resume:
        if not is_folder(out):
            raise RunStateError(f"{out} is not a run folder")
        return
    check_writable(out)
    if (out / journal.FILE).exists() or (out / CONFIG).exists():
        raise OutputError(
            f"{out} already holds a run: go on with `excise resume {out}`, or choose a new --out"
        )
    # A run that was killed as it began leaves its lock alone.
    if out.is_dir() and any(path.name != LOCK for path in out.iterdir()):
        raise OutputError(f"{out} is not empty: give --out a new folder")


def check_apart(out: Path, loaded: Loaded) -> None:
    """Refuse a run inside the model's own folder, which exports are copies of.

    Raises:
        OutputError: it is there.
    """
    for folder in {loaded.folder, Path(loaded.place) if loaded.is_local else loaded.folder}:
        if out.resolve().is_relative_to(folder.resolve()):
            raise OutputError(
                f"{out} is inside the model's folder {folder}, whose files every export copies: "
                "choose another --out"
            )


@contextmanager
def held_anew(out: Path) -> Iterator[None]:
    """Make a new run folder and hold it; refuse one that others began to use meanwhile.

    Raises:
        OutputError, RunStateError: they did.
        StorageError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {out}: {error.strerror}") from None
    with hold(out):
        check_output(out, resume=False)
        yield


def hash_files(folder: Path) -> dict[str, str]:
    """Hash each of these files that a run folder has: name -> SHA-256."""
    found = {}
    for name in (DIRECTIONS, CAPTURED):
        if is_file(folder / name):
            with (folder / name).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def check_files(folder: Path, known: Mapping[str, str]) -> None:
    """Refuse files other than those that the trials were measured with.

    Raises:
        RunStateError: one is gone, new, or not as it was.
    """
    try:
        now = hash_files(folder)
    except OSError as error:
        raise RunStateError(f"{error.filename} cannot be read: {error.strerror}") from None
    for name in (DIRECTIONS, CAPTURED):
        if known and known.get(name) != now.get(name):
            how = "gone" if name not in now else "not the one that its trials were measured with"
            raise RunStateError(
                f"{folder / name} is {how}: put it back as it was, or start again with a new --out"
            )


def save_directions(
    path: Path, directions: Directions, separation: Separation, opening: Opening
) -> None:
    """Write `directions.safetensors`: unit (L, D), contrast (L, D), auc (L).

    Its metadata hold the opening of the responses that the residuals were captured at.
    """
    tensors = {
        "unit": directions.unit.contiguous(),
        "contrast": directions.contrast.contiguous(),
        "auc": torch.tensor(separation.auc, dtype=torch.float64),
    }
    metadata = {"format": "pt", "projected": str(directions.projected).lower()}
    metadata["opening"] = json.dumps(opening.as_dict())
    save_tensors(path, tensors, metadata)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file of tensors, whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        with replacing(path) as new:
            save_file(tensors, new, metadata=metadata)
    except SafetensorError as error:
        raise StorageError(f"cannot write {path}: {error}") from None


def read_tensors(path: Path, layout: str) -> dict[str, Tensor] | None:
    """Read the tensors of a file; None when there is none to trust.

    Raises:
        RunStateError: they were saved in another layout than this one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get(LAYOUT)
        if found != layout:
            raise RunStateError(
                f"{path} was written by another version of Excise, which captured other things: "
                "start the run again with a new --out, or use that version"
            )
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def read_directions(path: Path) -> tuple[Directions, Separation] | None:
    """Read the directions of a run; None when there are none to trust."""
    try:
        with safe_open(path, framework="pt") as file:
            projected = (file.metadata() or {}).get("projected") == "true"
            unit, contrast, auc = (file.get_tensor(name) for name in ("unit", "contrast", "auc"))
    except (OSError, SafetensorError):
        return None
    if unit.dim() != 2 or unit.shape != contrast.shape or auc.shape != unit.shape[:1]:
        return None
    if not all(bool(torch.isfinite(one).all()) for one in (unit, contrast, auc)):
        return None
    return Directions(unit, contrast, projected), Separation(auc=auc.tolist())


def read_opening(path: Path) -> Opening | None:
    """Read the opening that `save_directions` was given; None where there is nothing to trust."""
    try:
        with safe_open(path, framework="pt") as file:
            return Opening.from_dict(json.loads((file.metadata() or {})["opening"]))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
