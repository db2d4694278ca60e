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
_FIRST = b'{"op_code":0,'  # what Optuna's line that makes a study begins with
_TRIAL = b'{"op_code":4,'  # and the one that makes a trial
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
    """A journal that one process writes; what it writes `together` goes to the disk at once.

    A line for every parameter, each waited for until it is on the disk, takes most of the time of
    asking for trials: some milliseconds, and on a network disk much more.

    With `trials` it ends before the trial of that number. What a file holds after the end, that or a line
    that power left half-written, goes when the journal is next written to: what is refused stays as it was.
    """

    def __init__(self, path: Path, trials: int | None = None) -> None:
        self._path = path
        self._end = check_lines(path, trials)
        self._waiting: list[dict[str, Any]] | None = None  # None: nothing has to wait

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write these, or have them wait."""
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
        """Yield all logs from this number on, those that wait included."""
        if log_number_from < self._end.lines:
            with self._path.open("rb") as file:
                for line in islice(file, log_number_from, self._end.lines):
                    yield json.loads(line)
        yield from (self._waiting or [])[max(0, log_number_from - self._end.lines) :]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Write what is logged within this context when it ends, however it ends."""
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
        """Return the study as it was before it was asked for the trial of this number.

        What was written since goes from the file when the study is next written to.
        """
        return Study(self.path, number)


def create_study(
    folder: Path,
    goals: Sequence[Goal],
    identity: dict[str, Any],
    sizing: dict[str, Any],
    **facts: Any,
) -> Study:
    """A new study in a run folder, in place of one that was stopped while it was made.

    `identity` says what its trials belong to, `sizing` what a resume must repeat; `facts` are further
    attributes.

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
    """The study of a run folder, without a line that a power cut left half-written.

    None when the run was stopped before its study was there and whole: nothing is lost by a new one.
    Nothing is changed in the file before the study is written to.

    Raises:
        RunStateError: not an Excise journal, or not as it was written.
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
    """Whether a study begins here; no where a stop left less than its first line.

    Raises:
        RunStateError: something else does.
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

    Lines at its beginning may have no sum: earlier versions wrote none.

    Raises:
        RunStateError: a line is not the one that was written there.
    """
    end, signed, there = _End(), False, 0
    with path.open("rb") as file:
        for line in file:
            there += line.startswith(_TRIAL)
            if not line.endswith(b"\n") or (
                trials is not None and there > trials
            ):  # the last, torn
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
