"""Every exception that Excise raises on purpose.

    ExciseError                     exit code 1: it failed while running
    |-- InputError                  exit code 2: the user can fix it; nothing was written
    |   |-- ConfigError             unknown key, bad value, bad expression
    |   |-- PromptError             prompt file missing, empty, wrong column, sets not distinct
    |   |-- ModelError              no weights, pickled, truncated or NaN weights
    |   |   `-- UnknownArchitecture no data row says where the writers are
    |   |-- OutputError             the output folder holds something else
    |   `-- RunStateError           a run folder that cannot be resumed, read or exported from
    |-- MeasurementError            a measurement is not a number, or cannot be made
    |-- JudgeError                  a judge cannot be asked, or its answers are no verdicts
    |-- ClusterError                Ray cannot be started, or its cluster not be reached
    |-- MemoryExhausted             one row at a time does not fit
    |-- StorageError                disk full, or a write that failed
    |-- PageError                   a report or card could not be written; record and exports are there
    |-- ExportError                 the written model is not the measured one
    `-- HubError                    the Hub cannot be reached, or an upload broke off

A message says what happened, where, and what to do. Programmer errors are `assert`s.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

_LONGEST = 300  # characters of another library's message


class ExciseError(Exception):
    """Root of the tree; `exit_code` is what the command line returns for it."""

    exit_code = EXIT_FAILED


class InputError(ExciseError, ValueError):
    """Something the user gave cannot be used; nothing was written."""

    exit_code = EXIT_BAD_INPUT


class ConfigError(InputError):
    """A configuration key, value or expression is not valid."""


class PromptError(InputError):
    """A prompt set cannot be read, is empty, or is not distinct from its counterpart."""


class ModelError(InputError):
    """A model folder or id cannot be loaded as it is."""


class UnknownArchitecture(ModelError):
    """No architecture row says where this model's layers and writers are."""


class OutputError(InputError):
    """The place to write to already holds something else."""


class RunStateError(InputError):
    """A run folder is missing, locked, or does not belong to this model or configuration."""


class MeasurementError(ExciseError):
    """A measurement is not finite or could not be made."""


class JudgeError(ExciseError):
    """A judge cannot be asked, or answers what is no verdict; what was measured before is kept."""


class ClusterError(ExciseError):
    """Ray cannot be started here, or no cluster of it answers."""


class MemoryExhausted(ExciseError):
    """Even the smallest batch does not fit in memory."""


class StorageError(ExciseError):
    """A write failed: disk full, permissions, or a broken mount."""


class ExportError(ExciseError):
    """An exported model does not reproduce what was measured."""


class PageError(ExciseError):
    """A report or a card could not be written; the record and the exports are there."""


class HubError(ExciseError):
    """An upload did not come to its end; nothing was committed."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether this is how a device, or the CPU's allocator, reports that memory has run out."""
    # By name: this module must load without torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return any(s in text for s in ("out of memory", "can't allocate memory", "not enough memory"))


def first_line(error: BaseException) -> str:
    """Return a library's error as one line of bounded length, or its type where it says nothing.

    Where the first line ends with a colon, the next one is added.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
