"""The study on disk: an Optuna journal that survives kill -9 and power loss, and shows when it was changed.

One process at a time holds a run folder (an operating-system lock that dies with it), so the
journal needs no lock file of its own, and a stale one can never block a resume.

Every line carries a sum over itself and all lines before it, in a key that Optuna does not read. A
journal may end early, as a kill ends it; a line that is changed, lost, doubled or moved is seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend

from excise.errors import ExciseError, RunStateError, StorageError
from excise.reading import check_regular, parse_json

Goal = Literal["minimize", "maximize"]

FILE = "study.journal"
STUDY = "excise"
_FIRST = b'{"op_code":0,'  # how the line begins with which Optuna creates a study
_TRIAL = b'{"op_code":4,'  # and a trial
_FIRST_BYTES = 4096  # more than that line has
_MOST_BYTES = 1 << 30
_BACK = "put it back as it was, or choose a new --out"
_SUM = re.compile(rb'^(\{.*),"sum":"([0-9a-f]{16})"\}\n$', re.DOTALL)


@dataclass(frozen=True)
class _End:
    """Where a journal ends: after so many whole lines and bytes, with this sum over them."""

    lines: int = 0
    size: int = 0
    sum: str = ""

    def after(self, line: bytes, total: str) -> _End:
        return _End(self.lines + 1, self.size + len(line), total)


class Journal(BaseJournalBackend):
    """An Optuna journal with one writer; what is logged within `together` is flushed once.

    Optuna logs a line for every parameter. Flushing each would take most of the time of asking for
    trials: some milliseconds a line, much more on a network disk.

    With `trials` the journal ends before the trial of that number. The next write, and nothing before it,
    truncates the file to that end, or to the last whole line: a file that is refused stays as it was.
    """

    def __init__(self, path: Path, trials: int | None = None) -> None:
        self._path = path
        self._end = check_lines(path, trials)
        self._read = _End()  # up to where it was read last
        self._waiting: list[dict[str, Any]] | None = None  # buffered within `together`, else None

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write these logs, or buffer them within `together`."""
        if self._waiting is None:
            self._write(logs)
        else:
            self._waiting += json.loads(json.dumps(logs))  # as they come back from the file

    def _write(self, logs: list[dict[str, Any]]) -> None:
        lines, end = [], self._end
        for log in logs:
            total = _add(end.sum, json.dumps(log, separators=(",", ":")).encode())
            lines.append(json.dumps({**log, "sum": total}, separators=(",", ":")).encode() + b"\n")
            end = end.after(lines[-1], total)
        with self._path.open("rb+") as file:
            file.seek(self._end.size)
            file.truncate()
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        self._end = end

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yield all logs from this number on, buffered ones included."""
        if log_number_from < self._end.lines:
            # Mostly what was written last: a long journal is not read again from its first line.
            start = self._read if self._read.lines <= log_number_from else _End()
            with self._path.open("rb") as file:
                file.seek(start.size)
                for line in islice(
                    file, log_number_from - start.lines, self._end.lines - start.lines
                ):
                    yield json.loads(line)
            self._read = self._end
        yield from (self._waiting or [])[max(0, log_number_from - self._end.lines) :]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Buffer the logs of this context; write them with one flush at its end, also after an error."""
        if self._waiting is not None:  # within another such context, which ends later
            yield
            return
        self._waiting = []
        try:
            yield
        finally:
            waiting, self._waiting = self._waiting, None
            if waiting:
                self._write(waiting)


class Study(optuna.Study):
    """The study that a journal holds; with `trials`, without the trials from that number on."""

    def __init__(self, path: Path, trials: int | None = None) -> None:
        self.path = path
        self.journal = Journal(path, trials)
        super().__init__(STUDY, JournalStorage(self.journal))

    def before(self, number: int) -> Study:
        """Return the study without the trials from this number on.

        The file is truncated when the study is next written to.
        """
        return Study(self.path, number)


def create_study(
    folder: Path,
    goals: Sequence[Goal],
    identity: dict[str, Any],
    sizing: dict[str, Any],
    **facts: Any,
) -> Study:
    """Create the study of a run folder; replace one whose creation was interrupted.

    Args:
        folder: the run's.
        goals: the direction of each objective.
        identity: what the trials depend on: model, prompts, settings. A resume compares it.
        sizing: the batch sizes, which a resume repeats.
        facts: further attributes.

    Raises:
        StorageError: it cannot be written.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = folder / FILE
    try:
        path.unlink(missing_ok=True)
        path.touch()
        storage = JournalStorage(Journal(path))
        optuna.create_study(storage=storage, study_name=STUDY, directions=goals)
        study = Study(path)
        for name, value in {**facts, "sizing": sizing}.items():
            study.set_user_attr(name, value)
        study.set_user_attr("identity", identity)  # last: with it the study is whole
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from None
    return study


def open_study(folder: Path) -> Study | None:
    """Open the study of a run folder, up to the last whole line of its journal.

    Returns None where the run was stopped before its study was complete: a new one loses nothing. The
    file is not changed before the study is written to.

    Raises:
        RunStateError: not an Excise journal, or changed since it was written.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = folder / FILE
    if not os.path.lexists(path) or not _begins(path):
        return None
    try:
        study = Study(path)
        attributes, trials = study.user_attrs, len(study.get_trials(deepcopy=False))
    except ExciseError:
        raise
    except (LookupError, ValueError, AssertionError, TypeError, AttributeError, RuntimeError):
        raise RunStateError(f"{path} is not a readable Excise journal: {_BACK}") from None
    facts = [attributes.get(name) for name in ("identity", "sizing")]
    if all(isinstance(one, dict) for one in facts):
        config, files = (attributes.get(name, {}) for name in ("config", "files"))
        typed = isinstance(config, dict) and isinstance(files, dict)
        if not typed or not all(isinstance(digest, str) for digest in files.values()):
            raise RunStateError(f"{path} does not say what it was started with: {_BACK}")
        return study
    if trials or any(one is not None for one in facts):
        raise RunStateError(f"{path} does not say what its trials belong to: {_BACK}")
    return None


def _begins(path: Path) -> bool:
    """Return whether the first line creates a study; false where a kill left less than that line.

    Raises:
        RunStateError: the file is not a journal of Excise.
    """
    if check_regular(path, "journal", RunStateError) > _MOST_BYTES:
        raise RunStateError(f"{path} is larger than any study of Excise: {_BACK}")
    with path.open("rb") as file:
        first = file.readline(_FIRST_BYTES)
    if not first.endswith(b"\n") and first[: len(_FIRST)] == _FIRST[: len(first)]:
        if len(first) < _FIRST_BYTES:
            return False
    elif first.startswith(_FIRST):
        log = parse_json(first, str(path), RunStateError)
        if log.get("study_name") == STUDY:
            return True
    raise RunStateError(f"{path} is not a readable Excise journal: choose a new --out")


def check_lines(path: Path, trials: int | None = None) -> _End:
    """Return where the whole lines of a journal end; with `trials`, before the trial of that number.

    The first lines may have no sum: earlier versions wrote none.

    Raises:
        RunStateError: a line was changed, lost, doubled or moved.
    """
    end, signed, there = _End(), False, 0
    with path.open("rb") as file:
        for line in file:
            there += line.startswith(_TRIAL)
            torn = not line.endswith(b"\n")  # the last one
            if torn or (trials is not None and there > trials):
                break
            match = _SUM.match(line)
            total = _add(end.sum, line[:-1] if match is None else match[1] + b"}")
            if (signed and match is None) or (match is not None and match[2] != total.encode()):
                raise RunStateError(
                    f"{path}, line {end.lines + 1}: changed since it was written, or not where it was: "
                    f"{_BACK}"
                )
            end, signed = end.after(line, total), match is not None
    return end


def _add(total: str, line: bytes) -> str:
    return hashlib.sha256(total.encode() + line).hexdigest()[:16]


def check_identity(folder: Path, study: optuna.Study, identity: dict[str, Any]) -> None:
    """Refuse to mix trials of two runs.

    Raises:
        RunStateError: the study was started with another model, prompt set or setting.
    """
    check_same(folder / FILE, study.user_attrs["identity"], identity)


def check_same(path: Path, known: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse what does not belong to the trials of `path`.

    Raises:
        RunStateError: some of what they belong to is not the same now.
    """
    changed = sorted(k for k in {*known, *now} if known.get(k) != now.get(k))
    if changed:
        raise RunStateError(
            f"{path} belongs to another run: {', '.join(changed)} differ. "
            "Go on with what it was started with, or choose a new --out"
        )
