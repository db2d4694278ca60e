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
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock

from excise.errors import ExciseError, RunStateError, StorageError
from excise.reading import check_regular, parse_json

Goal = Literal["minimize", "maximize"]

FILE = "study.journal"
STUDY = "excise"
_FIRST = b'{"op_code":0,'  # what Optuna's line that makes a study begins with
_FIRST_BYTES = 4096  # more than that line has
_MOST_BYTES = 1 << 30
_BACK = "put it back as it was, or choose a new --out"
_SUM = re.compile(rb'^(\{.*),"sum":"([0-9a-f]{16})"\}\n$', re.DOTALL)


class _HeldAlready(BaseJournalFileLock):
    """The run folder's own lock already keeps other processes out."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        return None


class Journal(JournalFileBackend):
    """A journal that one process writes; what it writes `together` goes to the disk at once.

    A line for every parameter, each waited for until it is on the disk, takes most of the time of
    asking for trials: some milliseconds, and on a network disk much more.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), lock_obj=_HeldAlready())
        self._written, self._sum = check_lines(path)  # lines: Optuna reads what they say
        self._waiting: list[dict[str, Any]] | None = None  # None: nothing has to wait
        self._path, self._mended = path, False

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write these, or have them wait."""
        if self._waiting is not None:
            self._waiting += json.loads(json.dumps(logs))  # as they come back from the file
            return
        if not self._mended:  # not before: what is refused stays as it was
            _drop_torn_line(self._path)
            self._mended = True
        total, signed = self._sum, []
        for log in logs:
            total = _add(total, json.dumps(log, separators=(",", ":")).encode())
            signed.append({**log, "sum": total})
        super().append_logs(signed)
        self._written, self._sum = self._written + len(logs), total

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """All logs from this number on, those that wait included."""
        waiting = self._waiting or []
        if log_number_from < self._written or not waiting:
            yield from super().read_logs(log_number_from)
        yield from waiting[max(0, log_number_from - self._written) :]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is written within this context is on the disk when it ends, however it ends."""
        if self._waiting is not None:  # within another such context, which ends later
            yield
            return
        self._waiting = []
        try:
            yield
        finally:
            waiting, self._waiting = self._waiting, None
            if waiting:
                self.append_logs(waiting)


@contextmanager
def together(study: optuna.Study) -> Iterator[None]:
    """As `Journal.together`, for the journal of a study that has one."""
    backend = getattr(study._storage, "_backend", None)
    with backend.together() if isinstance(backend, Journal) else nullcontext():
        yield


def create_study(
    folder: Path,
    goals: Sequence[Goal],
    identity: dict[str, Any],
    sizing: dict[str, Any],
    **facts: Any,
) -> optuna.Study:
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
        study = optuna.create_study(storage=_storage(path), study_name=STUDY, directions=goals)
        for name, value in {**facts, "sizing": sizing}.items():
            study.set_user_attr(name, value)
        study.set_user_attr("identity", identity)  # last: with it the study is whole
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from None
    return study


def open_study(folder: Path) -> optuna.Study | None:
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
        study = optuna.load_study(study_name=STUDY, storage=_storage(path))
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


def check_lines(path: Path) -> tuple[int, str]:
    """The number of whole lines of a journal, and the sum after the last.

    Lines at its beginning may have none: earlier versions wrote them.

    Raises:
        RunStateError: a line is not the one that was written there.
    """
    number, total, signed = 0, "", False
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):  # the last, torn
                break
            number += 1
            match = _SUM.match(line)
            total = _add(total, line[:-1] if match is None else match[1] + b"}")
            if (signed and match is None) or (match is not None and match[2] != total.encode()):
                raise RunStateError(
                    f"{path}, line {number}: changed since it was written, or not where it was: {_BACK}"
                )
            signed = match is not None
    return number, total


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


def _storage(path: Path) -> JournalStorage:
    return JournalStorage(Journal(path))


def _drop_torn_line(path: Path) -> None:
    """Cut the journal after its last whole line: what follows was being written when power went."""
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        tail = b""
        start = end
        while start and b"\n" not in tail:
            size = min(65536, start)
            start -= size
            file.seek(start)
            tail = file.read(size) + tail
        whole = start + tail.rfind(b"\n") + 1 if b"\n" in tail else 0
        if whole != end:
            file.truncate(whole)
            os.fsync(file.fileno())
