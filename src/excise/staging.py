"""Folders that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from excise.errors import OutputError, StorageError

WEIGHTS = (".safetensors", ".gguf")
_CHUNK = 1 << 24  # bytes copied at a time


def sha256_of(folder: Path) -> str:
    """SHA-256 over the sorted names and hashes of a folder's weight files (safetensors and GGUF)."""
    total = hashlib.sha256()
    found = [path for suffix in WEIGHTS for path in folder.rglob(f"*{suffix}")]
    files = {path.relative_to(folder).as_posix(): path for path in found}
    for name, path in sorted(files.items()):
        with path.open("rb") as file:
            total.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n".encode())
    return total.hexdigest()


def check_destination(destination: Path, source: Path | None = None) -> None:
    """Refuse a destination that cannot become a new folder.

    Raises:
        OutputError: it exists and is not an empty folder, is a mount point, or is inside `source`.
    """
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise OutputError(f"{destination} already exists: remove it, or export to another folder")
    if destination.is_mount():
        raise OutputError(f"{destination} is a mount point: export to a folder inside it")
    if source is not None and destination.resolve().is_relative_to(source.resolve()):
        raise OutputError(f"{destination} is inside the source {source}: choose another folder")


@contextmanager
def staged(destination: Path, size: int) -> Iterator[Path]:
    """A folder beside `destination` that takes its name on leaving, and is removed on any failure.

    Raises:
        StorageError: less than `size` bytes are free, or a write within the context failed.
    """
    destination = destination.resolve()  # a link keeps pointing where it did
    with _beside(destination, size, f"cannot write {destination}") as partial:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        partial.rename(destination)
        sync(destination.parent)


@contextmanager
def scratch(destination: Path, size: int) -> Iterator[Path]:
    """An empty folder beside `destination` for what is needed on the way; it is always removed.

    Raises:
        StorageError: less than `size` bytes are free, or a write within the context failed.
    """
    destination = destination.resolve()
    with _beside(destination, size, f"cannot write beside {destination}") as folder:
        yield folder


@contextmanager
def _beside(destination: Path, size: int, failed: str) -> Iterator[Path]:
    """A new folder beside `destination`; on leaving, what still bears its name is removed."""
    folder = destination.parent / f".{destination.name}.partial-{uuid.uuid4().hex[:8]}"
    full = _check_room(destination, size)
    try:
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise full from error
        raise StorageError(f"{failed}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_room(destination: Path, size: int) -> StorageError:
    """The error that a full disk would be; raised at once where it is certain."""
    existing = next(parent for parent in destination.parents if parent.exists())
    full = StorageError(
        f"disk full: {destination} needs {size / 1e9:.2f} GB; free some, or export to another disk"
    )
    if shutil.disk_usage(existing).free < size:
        raise full
    return full


def add_files(folder: Path, files: Mapping[str, str]) -> None:
    """Write these texts, name -> content, into `folder`."""
    for name, text in files.items():
        assert Path(name).name == name, f"{name} is not a plain file name"
        (folder / name).write_text(text, encoding="utf-8", newline="")


def copy_bytes(old: io.BufferedReader, new: io.BufferedWriter, start: int, stop: int) -> None:
    """Copy the bytes start <= byte < stop, within the kernel where it can."""
    while start < stop:
        size = min(stop - start, _CHUNK)
        try:
            copied = os.copy_file_range(old.fileno(), new.fileno(), size, start, start)
        except (AttributeError, OSError):  # not on this system, or not between these file systems
            copied = 0
        if not copied:
            old.seek(start)
            new.seek(start)
            copied = new.write(old.read(size))
        if not copied:
            raise OSError(errno.EIO, "the file ended while it was copied", old.name)
        start += copied


def sync(path: Path) -> None:
    """Make what was written to a file or folder outlast a power cut."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders, and needs not
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
