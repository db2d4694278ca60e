"""Files and folders that appear whole or not at all: written beside their place, then renamed.

Whatever ends a process, what it was writing is told from what another one writes now: beside every
unfinished folder lies a lock that dies with its process, and `sweep` removes what nobody holds.
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
CARD = "README.md"  # written anew as the record grows: no hash on the record is of it
_CHUNK = 1 << 24  # bytes copied at a time
_NEW, _OLD = (
    ".excise-new",
    ".excise-old",
)  # what becomes a file, and what a folder takes the place of
_CLAIM = re.compile(r"(\..+\.partial|excise-[a-z]+)-[0-9a-f]{8}")
_LOCK = ".lock"
_NAME = 50  # characters of a name in that of an unfinished folder: no file system takes long ones


# -- hashes ----------------------------------------------------------------------------------------


def hashes_of(folder: Path) -> dict[str, str]:
    """Relative name -> SHA-256 of every file in a folder but its card."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: _sha256(path) for name, path in sorted(files.items()) if name != CARD}


def sha256_of(folder: Path) -> str:
    """SHA-256 over the sorted names and hashes of a folder's weight files (safetensors and GGUF)."""
    found = [path for suffix in WEIGHTS for path in folder.rglob(f"*{suffix}")]
    return weights_sha256({path.relative_to(folder).as_posix(): _sha256(path) for path in found})


def weights_sha256(hashes: Mapping[str, str]) -> str:
    """`sha256_of` a folder whose files have these hashes."""
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
    """A new, empty folder of this process alone: it goes when it is closed, let go of, or at exit.

    Where the process is killed, the next one that claims a folder at this place removes it.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, parent: Path, name: str, mode: int = 0o777) -> None:
        sweep(parent)
        lock = None
        while lock is None or not _take(lock):
            self.path = parent / f"{name}-{uuid.uuid4().hex[:8]}"
            lock = _lock_of(self.path)
        self._end = weakref.finalize(self, _remove, self.path, lock)
        self.path.mkdir(mode=mode)  # under its lock: without one it would be nobody's

    def close(self) -> None:
        """Remove the folder and all that is in it."""
        self._end()


def temporary(purpose: str) -> Claim:
    """A claimed folder among the system's temporary files, which nobody else may look into.

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
    """Remove claimed folders whose processes are gone; what cannot be removed is left."""
    with suppress(OSError):
        names = [entry for entry in os.scandir(folder) if entry.name.endswith(_LOCK)]
        for entry in names:
            path = folder / entry.name.removesuffix(_LOCK)
            if _CLAIM.fullmatch(path.name) and entry.is_file(follow_symlinks=False):
                lock = _lock_of(path)
                with suppress(OSError):
                    if _take(lock):
                        _remove(path, lock)


def sweep_held(folder: Path) -> None:
    """Tidy a folder that only the caller writes to: what any process before it left unfinished there.

    A folder that was on its way out comes back where nothing has taken its place.
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


def _take(lock: FileLock) -> bool:
    """Whether a lock was free, and its file is the one that others see: a sweep may have removed it."""
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
    """Whether a folder of this name is there or can be made, and may be written to.

    Raises:
        OutputError: it or what it would be made in is a file, or is not this user's to write to.
    """
    try:
        target = destination.resolve()
        target.exists()  # says of a name that it is too long
        place = next(p for p in (target, *target.parents) if os.path.lexists(p))
        if place.is_dir() and os.access(place, os.R_OK | os.W_OK | os.X_OK):
            return
        reason = f"{place} " + ("permits no writing" if place.is_dir() else "is a file")
    except (OSError, ValueError, RuntimeError) as error:  # also a NUL, or links in a circle
        reason = str(getattr(error, "strerror", None) or error).lower()
    raise OutputError(f"the folder {destination} cannot be made: {reason}; choose another folder")


@contextmanager
def staged(destination: Path, size: int) -> Iterator[Path]:
    """A folder beside `destination` that takes its name on leaving, and is removed on any failure.

    Raises:
        StorageError: less than `size` bytes are free, or a write within the context failed.
    """
    destination = destination.resolve()  # a link keeps pointing where it did
    with _beside(destination, size, f"cannot write {_shown(destination)}") as partial:
        yield partial
        publish(partial, destination)


@contextmanager
def scratch(destination: Path, size: int) -> Iterator[Path]:
    """An empty folder beside `destination` for what is needed on the way; it is always removed.

    Raises:
        StorageError: less than `size` bytes are free, or a write within the context failed.
    """
    destination = destination.resolve()
    with _beside(destination, size, f"cannot write beside {_shown(destination)}") as folder:
        yield folder


@contextmanager
def claimed(destination: Path) -> Iterator[Path]:
    """A folder beside `destination` in which it can be made and tried before it is `publish`ed.

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
        with suppress(OSError):  # where something is in it now
            for parent in made:
                parent.rmdir()


def publish(folder: Path, destination: Path, *, replace: bool = False) -> None:
    """Give a finished folder its name, on the disk for good.

    Args:
        folder: on the same file system.
        destination: where nothing stands, or an empty folder.
        replace: a folder that stands there goes.

    Raises:
        StorageError: it cannot be. What stood there still does.
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
    """A claimed folder beside `destination`; what fails within it is a failed write."""
    full = _check_room(destination, size)
    with claimed(destination) as folder:
        try:
            yield folder
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise full from error
            raise StorageError(f"{failed}: {error}") from error


def _check_room(destination: Path, size: int) -> StorageError:
    """The error that a full disk would be; raised at once where it is certain."""
    existing = next(parent for parent in destination.parents if parent.exists())
    full = StorageError(
        f"disk full: {_shown(destination)} needs {size / 1e9:.2f} GB; free some, or export to another "
        "disk"
    )
    if shutil.disk_usage(existing).free < size:
        raise full
    return full


def _shown(destination: Path) -> Path:
    """A destination as people know it: in place of a claimed folder, what that is for."""
    parent = destination.parent
    return parent.parent / destination.name if _CLAIM.fullmatch(parent.name) else destination


@contextmanager
def writing(destination: Path) -> Iterator[None]:
    """Within this context something is written for `destination`.

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
    """An empty file beside `path` to write to; on leaving it takes the name, with the usual permissions.

    Raises:
        StorageError: a write within the context failed; `path` is as it was.
    """
    new = path.with_name(f".{path.name}{_NEW}")
    try:
        new.unlink(missing_ok=True)
        new.touch(exist_ok=False)  # never through a link that somebody put there
        with usual_mode(new):
            yield new
        sync(new)  # a rename may outlast a power cut that the data do not
        new.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)


@contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """Within this context `path` is written; it ends with the permissions that new files have here."""
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
    """Make what was written to a file or folder outlast a power cut."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders, and needs not
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
