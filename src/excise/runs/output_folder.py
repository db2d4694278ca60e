"""Where a run may be written: a folder that is new, not the model's own, and held by this process alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from excise.checkpoints.loading import Loaded
from excise.errors import OutputError, RunStateError, StorageError
from excise.files import check_writable
from excise.reading import is_folder, is_whole
from excise.runs.resume_terms import CONFIG
from excise.search import journal


def check_output(out: Path, resume: bool) -> None:
    """Refuse a folder that holds something else.

    Raises:
        OutputError: it is a file, or a folder with another run or other files.
    """
    if not is_whole(str(out)):
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
    if out.is_dir() and any(path.name != journal.LOCK for path in out.iterdir()):
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
    """A new run folder, made and held; refused where others began in it meanwhile.

    Raises:
        OutputError, RunStateError: they did. StorageError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {out}: {error.strerror}") from None
    with journal.hold(out):
        check_output(out, resume=False)
        yield
