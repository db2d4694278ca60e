"""One process at a time holds a run folder, by an operating-system lock that dies with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from excise.errors import RunStateError, StorageError
from excise.files import sweep_held
from excise.reading import is_file

LOCK = ".lock"
_PATIENCE = 0.2  # seconds: `is_held` of another process has the lock for a moment


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process, and remove what one before it left unfinished there.

    Raises:
        RunStateError: another process works on it.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=_PATIENCE, poll_interval=0.02)
    except Timeout:
        raise RunStateError(
            f"{folder} is in use by another process: wait for it or stop it"
        ) from None
    except OSError as error:
        raise StorageError(f"cannot write {folder / LOCK}: {error.strerror or error}") from None
    try:
        sweep_held(folder)
        yield
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Return whether a process works on a run folder now; nothing is made or changed there."""
    if not is_file(folder / LOCK):
        return False
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # it may not be opened: nobody could hold it for us
        return False
    lock.release()
    return False
