"""Standard output and standard error, whatever they are: the only module that writes to them.

Either may be closed, full, a pipe that nobody reads, or of an encoding that lacks characters. What is
said beside the work never ends it; what is the work is known to be lost.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from excise.errors import ConfigError, StorageError
from excise.visible import one_line, visible


def prepare() -> None:
    """Make the standard streams ones that can be written to."""
    # A closed one's number would be taken by the next file, which libraries would then write into.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stdout = sys.stdout or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries would run through ours


def out(text: str) -> None:
    """Write to standard output, at once.

    Raises:
        BrokenPipeError: its reader went away.
        StorageError: it cannot be written.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _leave()
        raise
    except OSError as error:
        _leave()
        raise StorageError(f"cannot write to standard output: {error.strerror or error}") from None


def encoding() -> str:
    """Return the encoding of standard output."""
    return getattr(sys.stdout, "encoding", None) or "utf-8"


def _leave() -> None:
    """Discard what is still to be written to standard output."""
    with suppress(OSError):  # where it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def beside_the_work() -> Iterator[None]:
    """Ignore failures to print within this context: the work is done, and the exit code says so."""
    try:
        yield
    except BrokenPipeError:
        pass
    except StorageError as error:
        complain(f"{error}; the work itself is done")


def say(text: str) -> None:
    """Print one line on standard output."""
    out(visible(text) + "\n")


def ask(prompt: str) -> str | None:
    """Read a line from standard input; None at its end. The prompt is shown to people alone.

    Raises:
        ConfigError: it is no text.
    """
    with suppress(ImportError):
        import readline  # noqa: F401 (lines can be edited, and earlier ones come back)
    try:
        return input(prompt if is_watched() else "")
    except EOFError:
        return None
    except UnicodeDecodeError:
        raise ConfigError("standard input is not text in the terminal's encoding") from None
    except RuntimeError:  # there is none
        return None


def is_watched() -> bool:
    """Return whether a person reads standard output and writes standard input."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def show_json(data: Any, indent: int | None = 1) -> None:
    """Print data as JSON on standard output."""
    out(json.dumps(_finite(data), indent=indent, allow_nan=False) + "\n")


def _finite(data: Any) -> Any:
    """Return data with NaN and infinities as text, as the record writes them: JSON lacks them."""
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list | tuple) else data


def complain(text: str) -> None:
    """Print an error as one line on standard error, however many lines the reason has."""
    stream = errors()
    stream.write(f"excise: {one_line(text)}\n")
    stream.flush()


def errors() -> TextIO:
    """Return standard error as a stream whose writes never fail."""
    return cast("TextIO", _Unheeded(sys.stderr))


class _Unheeded:
    """Stream that may be gone: what cannot be written to it is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        with suppress(OSError, ValueError):  # ValueError: it is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write out what waits, where that can be."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def judge_token() -> str | None:
    """Return what a server that judges is shown: read here alone, and kept in no setting."""
    return os.environ.get("EXCISE_JUDGE_TOKEN") or None
