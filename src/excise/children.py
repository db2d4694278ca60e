"""Start child processes: llama.cpp's tools, and our own workers. No other module starts any.

Children get no shell, no code from the current folder (which may be a downloaded one), none of our API
keys in their environment, and a folder of their own for temporary files. They end with this process,
however that ends (`launcher`), and at once on an interrupt.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from excise.errors import ExportError
from excise.files import temporary

# Variables by which a program finds itself, its libraries and its files; no others are passed on.
_PASSED = frozenset(
    (
        "PATH HOME LANG LANGUAGE TZ LD_LIBRARY_PATH DYLD_LIBRARY_PATH PYTHONPATH "
        "OMP_NUM_THREADS MKL_NUM_THREADS OPENBLAS_NUM_THREADS NUMEXPR_NUM_THREADS "
        "CUDA_VISIBLE_DEVICES HIP_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES GGML_VK_VISIBLE_DEVICES "
        # Windows starts no program without some of these.
        "SYSTEMROOT SYSTEMDRIVE WINDIR COMSPEC PATHEXT USERPROFILE APPDATA LOCALAPPDATA PROGRAMDATA "
        "NUMBER_OF_PROCESSORS PROCESSOR_ARCHITECTURE"
    ).split()
)
_LAUNCHER = Path(__file__).with_name("launcher.py")
_LOOK = 0.5  # seconds between two checks of a child that is waited for
_PATIENCE = 120.0  # seconds for which a child may use no CPU while it is waited for
_KEPT = 1 << 16  # bytes that are read of the end of a child's standard error


def environment(temporary: Path, code: Sequence[Path] = ()) -> dict[str, str]:
    """Build the environment of a child.

    Args:
        temporary: its folder for temporary files.
        code: folders that it imports from beside its own libraries.
    """
    passed = {k: v for k, v in os.environ.items() if k in _PASSED or k.startswith("LC_")}
    # An empty entry would be the current folder.
    paths = [*map(str, code), *filter(None, passed.pop("PYTHONPATH", "").split(os.pathsep))]
    if paths:
        passed["PYTHONPATH"] = os.pathsep.join(paths)
    return passed | {
        **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary)),
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",  # whatever they read was downloaded before
    }


def python(script: Path) -> tuple[str, ...]:
    """Begin a command that runs one of our scripts, or a tool's, with this interpreter."""
    return (sys.executable, "-P", str(script))


class Child:
    """Running program; whoever starts it must `stop` it.

    Attributes:
        process: it, with pipes for standard input and output where it `talks`, else with neither.
        late: whether it was ended because a line of its output took too long.

    Raises:
        ExportError: it cannot be run.
    """

    def __init__(
        self, command: Sequence[str], what: str, *, talks: bool = False, code: Sequence[Path] = ()
    ) -> None:
        self._what = what
        self._hung = self.late = False
        self._room = temporary("child")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `stop`)
        # Without site packages it starts five times as fast; on other systems it needs psutil.
        flags = ["-I", "-S"] if sys.platform == "linux" else ["-I"]
        launcher = [sys.executable, *flags, str(_LAUNCHER), str(os.getpid())]
        pipe = subprocess.PIPE if talks else subprocess.DEVNULL
        try:
            self.process = subprocess.Popen(
                [*launcher, *command],
                stdin=pipe,
                stdout=pipe,
                stderr=self._errors,
                env=environment(self._room.path, code),
                start_new_session=True,  # interrupts reach this process alone, which ends it
            )
        except (OSError, ValueError) as error:  # ValueError: a NUL within an argument
            self._errors.close()
            self._room.close()
            raise ExportError(f"{what} cannot be run: {error}") from None

    def stop(self) -> None:
        """Kill it and its own children where they still run, and remove its temporary files."""
        _kill(self.process)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # flushes what nobody reads any more
                    continue
        self._errors.close()
        self._room.close()

    def wait(self, look: Callable[[], None] | None = None) -> int:
        """Wait for its end, `look` now and then meanwhile, and return its exit code."""
        with self.awaited():
            while look is not None and self.process.poll() is None:
                look()
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(_LOOK)
            return self.process.wait()

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Watch the child while the caller waits; kill it once it has used no CPU for two minutes."""
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(over,), daemon=True)
        watch.start()
        try:
            yield
        finally:
            over.set()
            watch.join()

    def _watch(self, over: threading.Event) -> None:
        before, idle = -1.0, 0.0
        while not over.wait(_LOOK):
            now = _work(self.process.pid)
            idle = idle + _LOOK if now == before else 0.0
            before = now
            if idle >= _PATIENCE:
                self._hung = True
                _kill(self.process)
                return

    def line(self, seconds: float, longest: int) -> bytes:
        """Read the next line of its output, newline included.

        The newline is missing where the child ended first, or was ended after so many seconds.
        """
        assert self.process.stdout is not None
        timer = threading.Timer(seconds, self._end_late)
        timer.daemon = True
        timer.start()
        try:
            return self.process.stdout.readline(longest)
        finally:
            timer.cancel()

    def _end_late(self) -> None:
        self.late = True
        _kill(self.process)

    def stderr_tail(self) -> str:
        """Return the end of its standard error."""
        if self._hung:
            return f"error: it did nothing for {_PATIENCE:g} seconds, and was ended"
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - _KEPT))
        return self._errors.read().decode(errors="replace")


def run(
    command: Sequence[str],
    what: str,
    code: Sequence[Path] = (),
    look: Callable[[], None] | None = None,
) -> tuple[int, str]:
    """Run a program to its end.

    Args:
        command: the program's whole path and its arguments.
        what: what it does, for messages: "llama.cpp's converter".
        code: folders that it imports from beside its own libraries.
        look: called twice a second while it runs.

    Returns:
        Its exit code, and the end of its standard error.

    Raises:
        ExportError: it cannot be run.
    """
    child = Child(command, what, code=code)
    try:
        return child.wait(look), child.stderr_tail()
    finally:
        child.stop()


def _work(pid: int) -> float:
    """Sum the CPU seconds of a process and its descendants; NaN, equal to nothing, if one reads a disk."""
    total = 0.0
    try:
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            if one.status() == psutil.STATUS_DISK_SLEEP:
                return float("nan")
            total += sum(one.cpu_times()[:2])
    except psutil.Error:
        return float("nan")
    return total


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    if os.name == "posix":
        try:
            os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own
        except (ProcessLookupError, PermissionError):  # it ended just now
            process.kill()
    else:
        try:
            for one in psutil.Process(process.pid).children(recursive=True):
                one.kill()
        except psutil.Error:
            pass
        process.kill()
    process.wait()
