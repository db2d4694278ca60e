"""List folders that others made: regular, readable files, and links that stay within the folder.

Loading, exports and uploads decide here alike which links are followed: a link out of a downloaded
folder would bring a file of this machine into an export. Knows nothing of models but how the Hub's
cache lays them out.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from excise.errors import ExciseError
from excise.reading import is_unicode

_MOST = 100_000  # files; a folder with more is not a model's
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHARED = re.compile(r"[0-9a-f]{2}/[0-9a-f]{64}")  # a blob in the store shared by a cache's models


def list_files(root: Path, error: type[ExciseError]) -> list[Path]:
    """List every file in a folder and below it, relative to it and sorted; folders named .x are left out.

    Raises:
        error: a link leads out of the folder or nowhere, something is neither a file nor a folder, or
            cannot be read, or its name is not UTF-8.
    """

    def unreadable(problem: OSError) -> None:
        raise error(f"cannot read {problem.filename}: {problem.strerror}")

    files: list[Path] = []
    seen: set[str] = set()
    for top, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        seen.add(os.path.realpath(top))
        kept = [name for name in folders if not name.startswith(".")]
        real = {name: check_inside(Path(top, name), root, error) for name in sorted(kept)}
        folders[:] = [name for name in real if str(real[name]) not in seen]
        for name in names:
            file = Path(top, name)
            check_inside(file, root, error)
            _check_file(file, error)
            files.append(file.relative_to(root))
        if len(files) > _MOST:
            raise error(f"{root} holds more than {_MOST} files: is it the folder that was meant?")
    return sorted(files)


def check_inside(path: Path, root: Path, error: type[ExciseError]) -> Path:
    """Resolve a path and refuse one outside the folder `root`.

    A snapshot in the Hub's cache may also link to a blob of the same repository.

    Raises:
        error: a link leads elsewhere, or nowhere.
    """
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    if not real.is_relative_to(home) and not _is_blob(path, real, home):
        raise error(
            f"{path} is a link out of its folder, to {real}: put the file itself there, if it belongs"
        )
    if path.is_symlink() and not os.path.exists(path):  # noqa: PTH110 (Path's raises on long names)
        raise error(f"{path} links to a missing file: download the model again")
    return real


def commit_of(folder: Path) -> str | None:
    """Return the commit of a model's snapshot in the Hub's cache, models--OWNER--NAME/snapshots/COMMIT.

    None for any other folder, whatever it is called.
    """
    if len(folder.parents) < 2 or folder.parent.name != "snapshots":
        return None
    ours = folder.parents[1].name.startswith("models--") and _COMMIT.fullmatch(folder.name)
    return folder.name if ours else None


def _is_blob(path: Path, real: Path, home: Path) -> bool:
    """Return whether a snapshot's link leads to a blob of its repository, maybe in the shared store."""
    if commit_of(home) is None:
        return False
    blobs = home.parents[1] / "blobs"
    if real.is_relative_to(blobs):
        return True
    store = home.parents[2] / "blobs"
    if not real.is_relative_to(store) or not _SHARED.fullmatch(real.relative_to(store).as_posix()):
        return False
    if not path.is_symlink():
        return False
    step = os.path.normpath(Path(os.path.realpath(path.parent), path.readlink()))
    return Path(step).parent == blobs


def _check_file(file: Path, error: type[ExciseError]) -> None:
    try:
        mode = file.stat().st_mode
    except OSError as problem:
        raise error(f"{file} cannot be read: {problem.strerror}") from None
    if not stat.S_ISREG(mode):
        raise error(f"{file} is a pipe, socket or device, not a file: remove it")
    if not os.access(file, os.R_OK):
        raise error(f"{file} cannot be read: permission denied")
    if not is_unicode(file.name):
        raise error(f"{str(file)!a} has a name that is not UTF-8: rename it")
