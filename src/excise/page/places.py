"""The folders that a page may see and write to, and what a browser may name: no path ever comes from it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from excise.errors import ConfigError, OutputError, RunStateError
from excise.named_models import NAMED
from excise.reading import is_file, is_folder
from excise.report.stored_record import FILE as RECORD
from excise.runs.changed_settings import CONFIG
from excise.search import journal

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_DEEPEST = 2  # levels below a folder at which runs are looked for


@dataclass(frozen=True)
class Place:
    """A run folder: its key in addresses, its name on pages."""

    key: str
    name: str
    folder: Path


class Places:
    """The folders that `excise ui` was started with.

    Raises:
        RunStateError: one is no folder.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        for root in roots:
            if not is_folder(root):
                raise RunStateError(f"{root} is not a folder: give run folders, or folders of runs")
        self.roots = [root.resolve() for root in roots]

    def runs(self) -> dict[str, Place]:
        """Find the run folders there are now, by key."""
        found = {}
        for root in self.roots:
            for folder in _runs_below(root, _DEEPEST):
                key = hashlib.sha256(str(folder).encode("utf-8", "surrogateescape")).hexdigest()[
                    :12
                ]
                name = folder.name if folder == root else folder.relative_to(root).as_posix()
                found[key] = Place(key, name, folder)
        return found

    def run(self, key: str) -> Place:
        """Return the run of a key.

        Raises:
            RunStateError: there is none.
        """
        place = self.runs().get(key)
        if place is None:
            raise RunStateError("there is no such run: it may have been moved")
        return place

    def new(self, name: str) -> Path:
        """Return where a new run or export of this name goes: into the first of the folders.

        Raises:
            OutputError: it is no plain name, or is taken.
        """
        root = self.roots[0]
        if _is_run(root):
            raise OutputError(f"{root} is a run itself: start `excise ui` with a folder of runs")
        if not _NAME.fullmatch(name):
            raise OutputError("give a plain name: letters, digits, dots, dashes and underscores")
        if (root / name).exists():
            raise OutputError(f"{name} exists in {root}: give another name")
        return root / name

    def model(self, text: str) -> str:
        """Return the model that a browser may name: a named one, a Hub id, or a folder below the roots.

        Raises:
            ConfigError: it is none of these.
        """
        text = text.strip()
        if text in NAMED:
            return text
        for root in self.roots:
            if "\0" not in text and text and ".." not in Path(text).parts:
                path = (root / text).resolve()
                if path != root and path.is_relative_to(root) and path.exists():
                    return str(path)
        if _HUB.fullmatch(text) and not Path(text).exists():
            return text
        raise ConfigError(
            f"the model must be {', '.join(NAMED)}, a Hub id that was downloaded before, or a folder below "
            "those that the page was started with"
        )

    def within(self, path: Path) -> bool:
        """Return whether a path lies in one of the folders, links followed."""
        resolved = path.resolve()
        return any(resolved.is_relative_to(root) for root in self.roots)


def _is_run(folder: Path) -> bool:
    return any(is_file(folder / name) for name in (CONFIG, RECORD, journal.FILE))


def _runs_below(folder: Path, levels: int) -> Iterator[Path]:
    if _is_run(folder):
        yield folder
    elif levels:
        try:
            inside = sorted(folder.iterdir())
        except OSError:
            return
        for path in inside:
            if not path.name.startswith(".") and not path.is_symlink() and is_folder(path):
                yield from _runs_below(path, levels - 1)
