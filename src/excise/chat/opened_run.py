"""A run opened to be talked to: its model, untouched, and the edits of any of its trials.

The model, prompts and settings are proven to be those that the trials were measured with. Nothing is
written, and no lock is taken: the run may still be searched by another process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from excise.chat.run_so_far import run_so_far, trial_of
from excise.engine.stacking import ORIGINAL, CandidateEdits
from excise.errors import RunStateError
from excise.events import OnEvent, ignore
from excise.record import Record
from excise.runs import setup
from excise.runs.changed_settings import check_settings, read_settings
from excise.runs.finished_run import same_session
from excise.runs.run_folder import check_files
from excise.runs.session import EditingSession
from excise.search.scoring import Scoring, markers_of

BASE = "base"


@dataclass(frozen=True)
class Point:
    """Who answers in a column: the original, where `trial` is None, or a trial's edit of it."""

    trial: int | None = None

    @property
    def name(self) -> str:
        """What it is called: 'base', 'trial 12'."""
        return BASE if self.trial is None else f"trial {self.trial}"


@dataclass(frozen=True)
class OpenedRun:
    """A run whose model is loaded. `record` is what the folder said when it was last read."""

    folder: Path
    record: Record
    session: EditingSession

    def edits(self, point: Point) -> CandidateEdits:
        """Return the edits of a point; those of the original are none.

        Raises:
            RunStateError: there is no such trial.
            MeasurementError: it has no edit.
        """
        if point.trial is None:
            return ORIGINAL
        return self.session.edits(trial_of(self.record, point.trial).params)

    def reread(self) -> OpenedRun:
        """Return the same with the trials that the folder holds by now."""
        return replace(self, record=run_so_far(self.folder))


def open_run(
    folder: Path, record: Record, *, trust_run: bool = False, on_event: OnEvent = ignore
) -> OpenedRun:
    """Load the model of a run, finished or not, and prepare the edits of its trials.

    Args:
        folder: the run.
        record: what `run_so_far` says of it.
        trust_run: let code run that the folder names: a model's own.
        on_event: told of progress.

    Raises:
        RunStateError: its settings, files, model or prompts have changed, or it names code and is not
            trusted.
        ModelError: the model is gone.
    """
    unused = ("export.llama_cpp", "scores.files")  # nothing is exported or scored here
    config = read_settings(folder, trust=trust_run, unused=unused)
    config = check_settings(folder, config, record.config)
    check_files(folder, record.files)
    scoring = Scoring(markers_of(config))
    session = same_session(record, config, scoring, folder, on_event)
    return OpenedRun(folder, record, setup.restore(session, folder))


def default_points(record: Record) -> list[Point]:
    """Return the original, and the trial that the run selected, or would select by now.

    Raises:
        RunStateError: no trial was measured yet.
    """
    if record.selected is None:
        raise RunStateError("no trial of this run was measured yet: wait, or give --base")
    return [Point(), Point(record.selected)]


def points_of(record: Record, trials: Sequence[int], *, base: bool) -> list[Point]:
    """Return the points that were asked for, the original first; without any, the default ones.

    Raises:
        RunStateError: one is not a trial of this run.
    """
    if not trials and not base:
        return default_points(record)
    for number in trials:
        trial_of(record, number)
    return [Point()] * base + [Point(number) for number in dict.fromkeys(trials)]
