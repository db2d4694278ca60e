"""What is wrong with how a command ended: each fault has a class, by which they are counted."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fuzz.running import Outcome

CODES = (0, 1, 2, 130)
LINES, LENGTH = 3, 2000  # the most that a message may have
CLASSES = (
    "traceback",
    "long message",
    "wrong result",
    "limit",
    "escape",
    "written",
    "exit code",
    "left over",
)
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_PARTIAL = re.compile(r"partial|^\.record\.json\.|^excise-|\.before$|^\.config\.toml\.")


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, in words, and its class."""

    kind: str
    words: str


def faults_of_ending(found: Outcome) -> Iterator[Fault]:
    """What the exit code, the output and the time say, whatever the command was."""
    if found.stopped:
        yield Fault(
            "limit", f"stopped: {found.stopped}, {found.seconds:.0f} s, {found.peak / 2**30:.1f} GB"
        )
        return
    if found.code not in CODES:
        yield Fault("exit code", f"ended with {found.code}")
    message = found.err.strip()
    if "Traceback (most recent call last)" in found.err + found.out or "panicked at" in message:
        yield Fault(
            "traceback", message.splitlines()[-1][:200] if message else "on standard output"
        )
    elif found.code != 0:
        yield from _faults_of_message(message)
    if _CONTROL.search(found.out + found.err):
        yield Fault("escape", f"a control character: {_around(found.out + found.err)}")
    if found.left:
        yield Fault("left over", "a process that still runs")


def _faults_of_message(message: str) -> Iterator[Fault]:
    lines = message.splitlines()
    if not lines:
        yield Fault("long message", "no message at all")
    if len(lines) > LINES:
        yield Fault(
            "long message", f"{len(lines)} lines: {lines[0][:80]!r} ... {lines[-1][:120]!r}"
        )
    elif len(message) > LENGTH:
        yield Fault("long message", f"{len(message)} characters: {lines[0][:100]!r}")


def _around(text: str) -> str:
    found = _CONTROL.search(text)
    assert found is not None
    return ascii(text[max(0, found.start() - 40) : found.end() + 10])


def faults_of_files(
    found: Outcome, before: dict[Path, str], absent: tuple[Path, ...], folder: Path
) -> Iterator[Fault]:
    """What lies on the disk that should not: anything new after bad input, anything unfinished ever.

    Args:
        found: how the command ended.
        before: folder -> its digest before it.
        absent: places where bad input leaves nothing.
        folder: where the input is.
    """
    if found.code == 2 and not found.stopped:
        for place in absent:
            if place.exists():
                yield Fault("written", f"bad input, and {place.name} was made")
        for kept, was in before.items():
            if digest(kept) != was:
                yield Fault("written", f"bad input, and {kept.name} was changed")
    if found.stopped or found.code < 0:
        return
    for path in sorted(folder.rglob("*")):
        if _PARTIAL.search(path.name):
            yield Fault("left over", f"{path.relative_to(folder)}")


def digest(folder: Path) -> str:
    """What a folder holds, but for its lock."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.name != ".lock":
            regular = path.is_file() and not path.is_symlink()
            found.update(
                f"{path.relative_to(folder)} {path.lstat().st_mode}".encode("utf-8", "replace")
            )
            found.update(path.read_bytes() if regular else b"")
    return found.hexdigest()
