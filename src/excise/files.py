"""Write files and folders atomically: beside their place, synced, then renamed.

An unfinished folder has a lock file beside it, which the operating system releases when its process
ends. `sweep` removes unfinished folders whose locks are free.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from excise.errors import OutputError, StorageError

WEIGHTS = (".safetensors", ".gguf")
CARD = "README.md"  # rewritten as the record grows, so the record holds no hash of it
_CHUNK = 1 << 24  # bytes copied at a time
_NEW = ".excise-new"  # suffix of a file that is being written
_OLD = ".excise-old"  # suffix of a folder that is being replaced
_CLAIM = re.compile(r"(\..+\.partial|excise-[a-z]+)-[0-9a-f]{8}")
_LOCK = ".lock"
_NAME = 50  # characters of the final name in an unfinished folder's: file systems bound names


# -- hashes ----------------------------------------------------------------------------------------


def hashes_of(folder: Path) -> dict[str, str]:
    """Hash every file in a folder but its card: relative name -> SHA-256."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: _sha256(path) for name, path in sorted(files.items()) if name != CARD}


def sha256_of(folder: Path) -> str:
    """Hash a folder's weight files (safetensors and GGUF): SHA-256 over their sorted names and hashes."""
    found = [path for suffix in WEIGHTS for path in folder.rglob(f"*{suffix}")]
    return weights_sha256({path.relative_to(folder).as_posix(): _sha256(path) for path in found})


def weights_sha256(hashes: Mapping[str, str]) -> str:
    """Return what `sha256_of` gives for a folder whose files have these hashes."""
    total = hashlib.sha256()
    for name, digest in sorted(hashes.items()):
        if name.endswith(WEIGHTS):
            total.update(f"{digest}  {name}\n".encode())
    return total.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- folders that are one process's ----------------------------------------------------------------


class Claim:
    """New, empty folder that this process holds by a lock.

    It is removed when it is closed, when nothing refers to it any more, and at exit. Where the process is
    killed, the next one that claims a folder at this place removes it.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, parent: Path, name: str, mode: int = 0o777) -> None:
        sweep(parent)
        lock = None
        while lock is None or not _acquire(lock):
            self.path = parent / f"{name}-{uuid.uuid4().hex[:8]}"
            lock = _lock_of(self.path)
        self._end = weakref.finalize(self, _remove, self.path, lock)
        self.path.mkdir(mode=mode)  # locked first: a sweep removes unlocked folders

    def close(self) -> None:
        """Remove the folder and all that is in it."""
        self._end()


def temporary(purpose: str) -> Claim:
    """Claim a folder among the system's temporary files, readable by this user alone.

    Args:
        purpose: one word, part of its name.

    Raises:
        StorageError: it cannot be made.
    """
    place = Path(tempfile.gettempdir())
    try:
        return Claim(place, f"excise-{purpose}", mode=0o700)
    except OSError as error:
        raise StorageError(f"cannot write to {place}: {error.strerror or error}") from None


def sweep(folder: Path) -> None:
    """Remove claimed folders whose processes have ended; leave what cannot be removed."""
    with suppress(OSError):
        names = [entry for entry in os.scandir(folder) if entry.name.endswith(_LOCK)]
        for entry in names:
            path = folder / entry.name.removesuffix(_LOCK)
            if _CLAIM.fullmatch(path.name) and entry.is_file(follow_symlinks=False):
                lock = _lock_of(path)
                with suppress(OSError):
                    if _acquire(lock):
                        _remove(path, lock)


def sweep_held(folder: Path) -> None:
    """Remove what earlier processes left unfinished in a folder that only the caller writes to.

    A folder that was about to be replaced is put back where its replacement is missing.
    """
    sweep(folder)
    with suppress(OSError):
        inside = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
        for path in [p for place in (folder, *inside) for p in place.glob(f".*{_NEW}")]:
            path.unlink(missing_ok=True)
        for old in folder.glob(f".*{_OLD}"):
            path = folder / old.name.removeprefix(".").removesuffix(_OLD)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(path)


def _lock_of(folder: Path) -> FileLock:
    return FileLock(folder.with_name(folder.name + _LOCK), thread_local=False)


def _acquire(lock: FileLock) -> bool:
    """Try to lock; say whether the lock is held and its file still exists, as a sweep may remove it."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    if Path(lock.lock_file).exists():
        return True
    lock.release()
    return False


def _remove(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    gone = not os.path.lexists(folder)
    lock.release()
    if gone:
        with suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)


# -- new folders -----------------------------------------------------------------------------------


def check_destination(destination: Path, source: Path | None = None) -> None:
    """Refuse a destination that cannot become a new folder.

    Raises:
        OutputError: it exists and is not an empty folder, is a mount point, is inside `source`, or
            cannot be made by this user.
    """
    check_writable(destination)
    if destination.is_dir() and any(destination.iterdir()):
        raise OutputError(f"{destination} already exists: remove it, or choose another folder")
    if destination.is_mount():
        raise OutputError(f"{destination} is a mount point: export to a folder inside it")
    if source is not None and destination.resolve().is_relative_to(source.resolve()):
        raise OutputError(f"{destination} is inside the source {source}: choose another folder")


def check_writable(destination: Path) -> None:
    """Refuse a folder that is not there and cannot be made, or that this user may not write to.

    Raises:
        OutputError: it or its nearest existing parent is a file, or is not this user's to write to.
    """
    try:
        target = destination.resolve()
        target.exists()  # raises where a name is too long
        place = next(p for p in (target, *target.parents) if os.path.lexists(p))
        if place.is_dir() and os.access(place, os.R_OK | os.W_OK | os.X_OK):
            return
        reason = f"{place} " + ("permits no writing" if place.is_dir() else "is a file")
    except (OSError, ValueError, RuntimeError) as error:  # also a NUL, or circular links
        reason = str(getattr(error, "strerror", None) or error).lower()
    raise OutputError(f"the folder {destination} cannot be made: {reason}; choose another folder")


@contextmanager
def staged(destination: Path, size: int) -> Iterator[Path]:
    """Yield a folder beside `destination`; rename it there on success, remove it on failure.

    Raises:
        StorageError: less than `size` bytes are free, or a write within the context failed.
    """
    destination = destination.resolve()  # through links, so that a link is not replaced
    with _beside(destination, size, f"cannot write {_shown(destination)}") as partial:
        yield partial
        publish(partial, destination)


@contextmanager
def scratch(destination: Path, size: int) -> Iterator[Path]:
    """Yield an empty folder beside `destination` for intermediate files; always remove it.

    Raises:
        StorageError: less than `size` bytes are free, or a write within the context failed.
    """
    destination = destination.resolve()
    with _beside(destination, size, f"cannot write beside {_shown(destination)}") as folder:
        yield folder


@contextmanager
def claimed(destination: Path) -> Iterator[Path]:
    """Yield a claimed folder beside `destination`, to be filled, tried and then `publish`ed.

    Raises:
        StorageError: it cannot be made.
    """
    destination = destination.resolve()
    made = [parent for parent in destination.parents if not parent.exists()]
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        claim = Claim(destination.parent, f".{destination.name[:_NAME]}.partial")
    except OSError as error:
        raise StorageError(f"cannot write {destination}: {error.strerror or error}") from None
    try:
        yield claim.path
    finally:
        claim.close()
        with suppress(OSError):  # where it is no longer empty
            for parent in made:
                parent.rmdir()


def publish(folder: Path, destination: Path, *, replace: bool = False) -> None:
    """Sync a finished folder and rename it to `destination`.

    Args:
        folder: on the same file system.
        destination: a path where nothing stands, or an empty folder.
        replace: remove a folder that stands there.

    Raises:
        StorageError: it cannot be renamed. What stood there still does.
    """
    destination = destination.resolve()
    old = destination.with_name(f".{destination.name}{_OLD}")
    replace = replace and destination.exists()
    try:
        for path in [*folder.rglob("*"), folder]:
            sync(path)
        if replace:
            shutil.rmtree(old, ignore_errors=True)
            destination.rename(old)
        try:
            folder.rename(destination)
        finally:
            if replace and not destination.exists():
                old.rename(destination)
        sync(destination.parent)
    except OSError as error:
        raise StorageError(f"cannot write {destination}: {error.strerror or error}") from None
    if replace:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _beside(destination: Path, size: int, failed: str) -> Iterator[Path]:
    """Yield a claimed folder beside `destination`; turn an OSError within it into a StorageError."""
    full = _check_room(destination, size)
    with claimed(destination) as folder:
        try:
            yield folder
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise full from error
            raise StorageError(f"{failed}: {error}") from error


def _check_room(destination: Path, size: int) -> StorageError:
    """Raise where less than `size` bytes are free; return the error for a disk that fills up later."""
    existing = next(parent for parent in destination.parents if parent.exists())
    full = StorageError(
        f"disk full: {_shown(destination)} needs {size / 1e9:.2f} GB; free some, or export to another "
        "disk"
    )
    if shutil.disk_usage(existing).free < size:
        raise full
    return full


def _shown(destination: Path) -> Path:
    """Return the path to name in messages: for one inside a claimed folder, the final one."""
    parent = destination.parent
    return parent.parent / destination.name if _CLAIM.fullmatch(parent.name) else destination


@contextmanager
def writing(destination: Path) -> Iterator[None]:
    """Turn an OSError within this context into a StorageError that names `destination`.

    Raises:
        StorageError: a write failed.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {destination}: {error.strerror or error}") from None


# -- files -----------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty file beside `path`; on success give it the default permissions and rename it there.

    Raises:
        StorageError: a write within the context failed; `path` is as it was.
    """
    new = path.with_name(f".{path.name}{_NEW}")
    try:
        new.unlink(missing_ok=True)
        new.touch(exist_ok=False)  # never through a planted link
        with usual_mode(new):
            yield new
        sync(new)  # a power cut may keep the rename and lose the data
        new.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)


@contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """Give `path`, written within this context, the permissions that new files have here."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    yield
    path.chmod(mode)


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
    """Flush a file or folder to the disk, so that it survives a power cut."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot sync folders, and does not need to
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> Path:
    """Write a text file beside its place and rename it there.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")
    return path
