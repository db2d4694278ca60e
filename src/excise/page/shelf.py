"""What all pages of one server share: folders, watched runs, jobs, the model that is talked to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from excise.config import behaviours
from excise.errors import ConfigError
from excise.formats import FORMATS
from excise.page.jobs import Job, Jobs
from excise.page.places import Place, Places
from excise.page.talking import Talker
from excise.page.watching import Watch

_MOST_TRIALS = 100_000


class Shelf:
    """The state of a server; pages of the browser hold none.

    Raises:
        RunStateError: a folder is none.
    """

    def __init__(self, roots: Sequence[Path], *, trust_run: bool) -> None:
        self.places = Places(roots)
        self.jobs = Jobs()
        self.talker = Talker(trust_run=trust_run)
        self._trust = ["--trust-run"] if trust_run else []
        self._watches: dict[Path, Watch] = {}

    def watch(self, place: Place) -> Watch:
        """Return the watch of a run."""
        return self._watches.setdefault(place.folder, Watch(place.folder))

    def begin(self, name: str, model: str, behaviour: str, method: str, trials: object) -> Job:
        """Start a search in a new folder; "" leaves the method to the model.

        Raises:
            ConfigError, OutputError: a value cannot be used.
        """
        out = self.places.new(name)
        flags = ["--out", str(out), "--trials", _count(trials)]
        if behaviour not in behaviours():
            raise ConfigError("choose one of the behaviours")
        flags += ["--behaviour", behaviour, *(["--method", method] if method else [])]
        return self.jobs.start(out, "run", [self.places.model(model), *flags])

    def resume(self, place: Place, trials: object) -> Job:
        """Go on with a run, up to so many trials in all.

        Raises:
            ConfigError, RunStateError: it cannot be resumed.
        """
        flags = ["--trials", _count(trials), *self._trust]
        return self.jobs.start(place.folder, "resume", [str(place.folder), *flags])

    def export(self, place: Place, trial: int, file_format: str, name: str) -> Job:
        """Export a trial into a new folder beside the runs.

        Raises:
            ConfigError, OutputError, RunStateError: it cannot be exported so.
        """
        if file_format not in FORMATS:
            raise ConfigError("choose one of the formats")
        flags = ["--to", str(self.places.new(name)), "--trial", str(int(trial))]
        flags += ["--format", file_format, *self._trust]
        return self.jobs.start(place.folder, "export", [str(place.folder), *flags])

    def close(self) -> None:
        """End all that was started."""
        self.jobs.stop_all()
        self.talker.close()


def _count(value: object) -> str:
    if not isinstance(value, int | float) or not 1 <= value <= _MOST_TRIALS or value != int(value):
        raise ConfigError(f"give a number of trials, 1 to {_MOST_TRIALS}")
    return str(int(value))
