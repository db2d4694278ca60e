"""Commands that are struck by signals in every phase: what is left of them, and what comes after.

    python tests/kills.py --moments 20 --seed 0 --out runs/kills.json

strikes a run, a GGUF export and an upload at so many random moments with each signal, and prints what
it struck. `tests/test_kills.py` is its short form. Phases and moments are told from `--json-events`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gguf_models
import hub_server
import psutil
from conftest import job, write_prompts

from excise.report.stored_record import read_record

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
START = "start"  # before the first event
REPO = "someone/struck"
_AFTER = "after "  # what is done between phases is named by the one before
_UNFINISHED = (".excise-new", ".excise-old", ".partial")
_PATIENCE = 60.0  # seconds in which a signal must have ended a command
_LINGER = 10.0  # seconds in which its children must be gone
_BRIEF = 0.1  # a phase of fewer seconds is struck by chance only
_LEAST = 0.05  # of a phase: what is not met so near to its beginning is not met


class Fault(Exception):
    """Something was left, lost, or did not end."""


@dataclass
class Place:
    """A folder with all that the commands work on, and the only one for their temporary files."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.temporary = self.root / "tmp"
        self.temporary.mkdir(parents=True, exist_ok=True)
        known = ("PATH", "LANG", "LD_LIBRARY_PATH")
        home = {name: str(self.root / "home") for name in ("HOME", "HF_HOME")}
        self.environment = {
            **{name: os.environ[name] for name in known if name in os.environ},
            **home,
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TORCHINDUCTOR_CACHE_DIR": str(self.root / "home" / "inductor"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **self.environment,
        }


@dataclass(frozen=True)
class Struck:
    """One strike: where it was meant to land and did, and how the command ended."""

    command: str
    signal: str
    asked: str
    phase: str
    code: int
    seconds: float
    met: bool = False  # it still ran
    around: tuple[str, ...] = ()  # the phases that this one was within


class Command:
    """A command that runs, and the phase that it says it is in."""

    def __init__(self, place: Place, arguments: Sequence[str]) -> None:
        quiet = [a for a in arguments if a not in ("--quiet", "--json-events")]
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "excise.cli", *quiet, "--json-events"],
            env=place.environment,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            preexec_fn=_default_signals,
        )
        self.begun = time.monotonic()
        self.spans: dict[str, float] = {}  # seconds of every phase that has ended
        self.seen: set[str] = {START}
        self._open: list[tuple[str, float]] = [(START, self.begun)]
        self._over = False
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def open(self) -> list[str]:
        """The phases that run, innermost last."""
        with self._news:
            return [name for name, _ in self._open]

    @property
    def phase(self) -> str:
        """The innermost phase."""
        return self._open[-1][0]

    def reached(self, phase: str) -> bool:
        """Wait until this phase has begun, or the command has ended; whether it has begun."""
        with self._news:
            self._news.wait_for(lambda: phase in self.seen or self._over, 300)
        return phase in self.seen

    def wait(self, seconds: float) -> int:
        """Its exit code.

        Raises:
            Fault: it does not end.
        """
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise Fault(f"still running after {seconds:.0f} s, in {self.phase}") from None
        self._reader.join()
        gap, since = self._open[-1]
        self.spans[gap] = time.monotonic() - since
        return code

    def said(self) -> str:
        """What it wrote to standard error."""
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line, parse_constant=_no_constant)
            now = time.monotonic()
            with self._news:
                if event["event"] == "PhaseStarted":
                    if len(self._open) == 1 and self._is_gap():
                        self._close(now)
                    self._begin(event["phase"], now)
                elif event["event"] == "PhaseEnded":
                    self._close(now)
                    if not self._open:
                        self._begin(_AFTER + event["phase"], now)
                self._news.notify_all()
        with self._news:
            self._over = True
            self._news.notify_all()

    def _is_gap(self) -> bool:
        return self.phase == START or self.phase.startswith(_AFTER)

    def _begin(self, phase: str, now: float) -> None:
        self._open.append((phase, now))
        self.seen.add(phase)

    def _close(self, now: float) -> None:
        phase, begun = self._open.pop()
        self.spans[phase] = now - begun


def _no_constant(name: str) -> float:
    raise Fault(f"bare {name} in an event")


def _default_signals() -> None:
    """As from a terminal: a background shell has some of them ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def finish(place: Place, arguments: Sequence[str]) -> Command:
    """A command, to its end.

    Raises:
        Fault: it fails.
    """
    command = Command(place, arguments)
    code = command.wait(600)
    if code:
        raise Fault(f"{arguments[0]} exits with {code}: {command.said()}")
    return command


def strike(
    place: Place,
    arguments: Sequence[str],
    number: signal.Signals,
    phase: str,
    delay: float,
    last: str,
) -> Struck:
    """Start a command, and send it the signal so many seconds after a phase has begun.

    `last` is what comes after all of them: Python's own end, when the work is done.

    Raises:
        Fault: it does not end, ends otherwise than it should, or leaves a process.
    """
    command = Command(place, arguments)
    command.reached(phase)
    time.sleep(delay)
    (*around, where), ended = command.open, command.process.poll() is not None
    command.process.send_signal(number)
    begun = time.monotonic()
    code = command.wait(_PATIENCE)
    found = Struck(
        arguments[0],
        number.name,
        phase,
        where,
        code,
        round(time.monotonic() - begun, 2),
        not ended,
        tuple(around),
    )
    said = command.said()
    expected = {0} if ended else {0, -number} if number == signal.SIGKILL else {0, 130}
    if where in (START, last):  # Python itself is not yet there to take it, or not any more
        expected.add(-number)
    if code not in expected or "Traceback" in said:
        raise Fault(f"{found}: {said}")
    _check_processes(place, found)
    if code == 130:
        check_folder(place.temporary, found)
    return found


def _check_processes(place: Place, found: Struck) -> None:
    """Nothing that the command started may outlive it."""
    end = time.monotonic() + _LINGER
    while left := [p for p in psutil.process_iter() if _is_of(place, p)]:
        if time.monotonic() > end:
            raise Fault(f"{found} leaves {left}")
        time.sleep(0.05)


def _is_of(place: Place, process: psutil.Process) -> bool:
    """Whether a process works in this place: by its command, its environment, or its open files."""
    root = str(place.root)
    if process.pid == os.getpid():
        return False
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        words = [*process.cmdline(), process.environ().get("TMPDIR", "")]
        files = [file.path for file in process.open_files()]
    except psutil.Error:
        return False
    return any(root in word for word in (*words, *files))


def check_folder(folder: Path, found: Any) -> None:
    """Nothing unfinished may be in a folder; a folder for temporary files must be empty.

    Raises:
        Fault: something is.
    """
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*")]
    left = names if folder.name == "tmp" else [n for n in names if any(u in n for u in _UNFINISHED)]
    if left:
        raise Fault(f"{found} leaves {left[:5]} in {folder}")


def facts(out: Path) -> Any:
    """What must be equal however often a run was struck: trials without their timing."""
    record = read_record(out)
    trials = [(t.number, t.state, t.params, t.scores) for t in record.trials]
    return trials, record.front, record.selected, record.holdout


def names(folder: Path) -> list[str]:
    """All files below a folder."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def _finished(folder: Path) -> list[str]:
    """All files below a folder but those that a kill may leave until the next command."""
    return [name for name in names(folder) if not any(u in name for u in _UNFINISHED)]


# -- the three commands ----------------------------------------------------------------------------


class Runs:
    """A run, struck and resumed; and beside it the unbroken one."""

    name = "run"

    def __init__(self, place: Place, more: Sequence[str]) -> None:
        self.place, self.more = place, more
        gguf_models.checkpoint(place.root / "model", "qwen3", **gguf_models.WIDE)
        for side in ("target", "contrast"):
            write_prompts(place.root, side)
        (place.root / "markers.txt").write_text("a\n")
        self.whole, self.cut = place.root / "whole", place.root / "runs" / "cut"
        self.cut.parent.mkdir()
        self.spans = finish(place, job(place.root, self.whole, *self.more)).spans

    def arguments(self) -> list[str]:
        """The command as it is to be given next."""
        if (self.cut / "config.toml").is_file():
            return ["resume", str(self.cut)]
        return job(self.place.root, self.cut, *self.more)

    def after(self, found: Struck) -> None:
        """What must hold at once."""
        if found.code == 130 and self.cut.exists():
            check_folder(self.cut, found)

    def close(self) -> None:
        """To the end; all must be as if nothing had been, and the next series begins anew."""
        finish(self.place, self.arguments())
        if facts(self.cut) != facts(self.whole):
            raise Fault("a run that was struck has other trials")
        if names(self.cut) != names(self.whole):
            raise Fault(f"left over: {sorted({*names(self.cut)} ^ {*names(self.whole)})}")
        check_folder(self.place.temporary, self.name)
        shutil.rmtree(self.cut)
        if list(self.cut.parent.iterdir()):
            raise Fault(f"left beside the run: {names(self.cut.parent)}")


class Exports:
    """A GGUF export of a finished run: converted, quantised, run by llama.cpp."""

    name = "export"

    def __init__(self, place: Place, run: Path, types: str) -> None:
        self.place, self.run, self.types = place, run, types
        self.to = place.root / "exports" / "gguf"
        self.to.parent.mkdir()
        self.before = facts(run), _finished(run)
        stem = "model-edited"
        self.files = [
            "Modelfile",
            "README.md",
            *sorted(f"{stem}-{kind}.gguf" for kind in types.split(",")),
        ]
        self.spans = finish(place, self.arguments()).spans
        self.after(Struck("export", "none", "none", "none", 0, 0.0))

    def arguments(self) -> list[str]:
        """The command."""
        how = ["--format", "gguf", "--quantize", self.types]
        return ["export", str(self.run), "--to", str(self.to), *how]

    def after(self, found: Struck) -> None:
        """The run is as it was; an export that has its name is whole."""
        if (facts(self.run), _finished(self.run)) != self.before:
            raise Fault(f"{found} changes the run")
        if self.to.exists():
            if names(self.to) != self.files or "## Export check" not in self._card():
                raise Fault(f"{found} leaves half an export: {names(self.to)}")
            shutil.rmtree(self.to)
        if found.code == 130:
            check_folder(self.to.parent, found)

    def _card(self) -> str:
        return (self.to / "README.md").read_text(encoding="utf-8")

    def close(self) -> None:
        """The export once more, to its end."""
        finish(self.place, self.arguments())
        if names(self.to.parent) != ["gguf", *(f"gguf/{name}" for name in self.files)]:
            raise Fault(f"left over: {names(self.to.parent)}")
        check_folder(self.place.temporary, self.name)
        shutil.rmtree(self.to)
        self.before = facts(self.run), _finished(self.run)


class Pushes:
    """An upload of a finished run's model to a Hub that takes its time."""

    name = "push"

    def __init__(self, place: Place, run: Path, hub: hub_server.Hub) -> None:
        more = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub_server.WRITER, "HF_HUB_OFFLINE": "0"}
        more |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        self.place = Place(place.root, more)
        self.run, self.hub = run, hub
        self.before = facts(run), _finished(run)
        hub.pause = 0.3
        self.spans = finish(self.place, self.arguments()).spans
        self.files = dict(hub.repos[REPO]["files"])
        self._forget()

    def _forget(self) -> None:
        self.hub.repos.clear()
        self.hub.blobs.clear()
        self.hub.commits = 0

    def arguments(self) -> list[str]:
        """The command."""
        return ["push", str(self.run), REPO]

    def after(self, found: Struck) -> None:
        """The run is as it was; what was committed is whole, and else nothing is."""
        if (facts(self.run), _finished(self.run)) != self.before:
            raise Fault(f"{found} changes the run")
        files = self.hub.repos.get(REPO, {"files": {}})["files"]
        if files and files != self.files:
            raise Fault(f"{found} commits {sorted(files)}")

    def close(self) -> None:
        """The upload once more, to its end."""
        finish(self.place, self.arguments())
        if self.hub.repos[REPO]["files"] != self.files:
            raise Fault("an upload that was struck has other files")
        check_folder(self.place.temporary, self.name)
        self._forget()


Job = Runs | Exports | Pushes


def phases(work: Job) -> list[str]:
    """Those that can be aimed at, in the order in which they come to an end."""
    return [name for name, seconds in work.spans.items() if seconds >= _BRIEF]


def series(
    work: Job,
    numbers: Sequence[signal.Signals],
    asked: Sequence[str],
    draw: random.Random,
    within: float = 1.0,
) -> list[Struck]:
    """Strike these phases one after the other, each with the next signal; then go to the end.

    `within` is the part of a phase's time, from its beginning, in which it is struck.
    """
    out, last = [], list(work.spans)[-1]
    for index, phase in enumerate(asked):
        delay = draw.uniform(0, within * work.spans[phase])
        number = numbers[index % len(numbers)]
        found = strike(work.place, work.arguments(), number, phase, delay, last)
        work.after(found)
        out.append(found)
    work.close()
    return out


@contextlib.contextmanager
def all_jobs(root: Path, more: Sequence[str], types: str) -> Iterator[Iterator[Job]]:
    """The three of them, each made when it is asked for; exports and uploads are of the unbroken run.

    Args:
        root: an empty folder.
        more: flags of the run.
        types: of the GGUF export.
    """
    place = Place(root)
    with hub_server.serve() as hub:

        def made() -> Iterator[Job]:
            runs = Runs(place, more)
            yield runs
            yield Exports(place, runs.whole, types)
            yield Pushes(place, runs.whole, hub)

        yield made()


def main() -> int:
    """Strike everything at so many moments with each signal; says what was struck."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=20, help="with each signal, of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write every strike here, as JSON")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    struck: list[Struck] = []
    more = ("--trials", "24", "--startup-trials", "12")
    with (
        tempfile.TemporaryDirectory(prefix="kills-") as room,
        all_jobs(Path(room), more, "F16,Q4_K_M") as jobs,
    ):
        for work in jobs:
            for number in SIGNALS:
                struck += _at_all_phases(work, number, arguments.moments, draw)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps([asdict(one) for one in struck], indent=1))
    return 0


def _at_all_phases(
    work: Job, number: signal.Signals, moments: int, draw: random.Random
) -> list[Struck]:
    """So many strikes or more, until every phase was really met."""
    out: list[Struck] = []
    within, missing = 1.0, phases(work)
    while len(out) < moments or (missing and within > _LEAST):
        out += series(work, [number], missing or phases(work), draw, within)
        met = {name for one in out if one.met for name in (one.phase, *one.around)}
        missing = [phase for phase in phases(work) if phase not in met]
        # What was missed went by sooner than it did in the unbroken run.
        within = within / 2 if missing else 1.0
    counts = collections.Counter(one.phase for one in out if one.met)
    slowest = max(one.seconds for one in out)
    words = ", ".join(f"{phase} {count}" for phase, count in counts.items())
    sys.stdout.write(
        f"{work.name}, {number.name}: {len(out)} strikes ({words}); ended within {slowest:.1f} s; "
        f"resumed to the same, nothing left\n"
    )
    sys.stdout.flush()
    if missing:
        raise Fault(f"never met: {missing}")
    return out


if __name__ == "__main__":
    sys.exit(main())
