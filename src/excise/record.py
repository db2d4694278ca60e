"""What was done, in a versioned file: `record.json`. Cards, reports and exports read nothing else.

The shape is a contract: keys may be added, never renamed or removed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict

from excise.errors import RunStateError
from excise.staging import replacing

SCHEMA = 1
FILE = "record.json"


class Part(BaseModel):
    """Base of the record's parts: immutable; keys of later versions are kept."""

    model_config = ConfigDict(frozen=True, extra="allow", ser_json_inf_nan="strings")


class ScoreRecord(Part):
    """A measurement. `parts` holds the same by group of prompts, where they are grouped."""

    value: float
    n: int
    interval: tuple[float, float] | None = None
    parts: dict[str, ScoreRecord] | None = None


Scores = dict[str, ScoreRecord]


class ModelRecord(Part):
    """The source model."""

    source: str
    revision: str | None = None
    model_type: str
    dtype: str
    device: str
    layers: int
    width: int
    parameters: int
    config_sha256: str
    license: str | None = None
    multimodal: bool = False  # it has towers for images or sounds beside its language model
    sampling: dict[str, Any] = {}  # of the generation config: temperature, top_p and the like
    fingerprint: str | None = None  # `identity.fingerprint` of its checkpoint
    notes: list[str] = []  # what the measured weights are, where they are not simply the source's


class PromptRecord(Part):
    """One role's prompts, by name and hash: never their text."""

    source: str
    sha256: str
    n: int


class TrialRecord(Part):
    """One trial. `screened`: its drift alone put it behind the front, so it met fewer prompts."""

    number: int
    state: Literal["complete", "screened", "failed", "running"]
    params: dict[str, Any]
    scores: Scores
    seconds: dict[str, float]
    screened: bool = False
    reason: str | None = None


class CoverageRecord(Part):
    """What the edit touches, and what it does not and why."""

    edited: list[str]
    not_edited: list[str]


class Sample(Part):
    """One prompt of the search set with the responses before and after; benign sets only."""

    side: Literal["target", "contrast"]
    prompt: str
    before: str
    after: str
    answer: str | None = None


class Separation(Part):
    """How well each layer's direction separates the two direction sets: area under the ROC."""

    auc: list[float]


class ArtifactRecord(Part):
    """An exported model: loaded again, and measured again beside what the search measured.

    `expected` was measured by the search's engine, `measured` on the loaded artifact, both on the
    search prompts; `sha256` is over the names and hashes of the files that hold weights, `files` has
    the hash of every file but the card, which is written anew as the record grows. `coverage` says
    what this trial's edit touches, which may be less than what the search could have edited.
    """

    path: str
    format: str
    sha256: str
    files: dict[str, str] = {}
    trial: int
    bytes: int
    expected: Scores = {}
    measured: Scores = {}
    coverage: CoverageRecord | None = None
    details: dict[str, Any] = {}


class Record(Part):
    """The whole run."""

    schema_version: int = pydantic.Field(SCHEMA, alias="schema")
    behaviour: str
    description: str = ""
    method: str
    model: ModelRecord
    versions: dict[str, str]
    seed: int
    config: dict[str, Any]
    prompts: dict[str, PromptRecord]
    formatting: dict[str, Any] = {}  # how prompts are put to the model: `stage.Tokens.as_dict`
    objectives: list[str]
    goals: list[Literal["minimize", "maximize"]]
    baseline: Scores
    trials: list[TrialRecord]
    front: list[int]
    selection: str
    selected: int | None
    holdout: Scores = {}
    holdout_baseline: Scores = {}
    final: Scores = {}
    final_baseline: Scores = {}
    coverage: CoverageRecord
    engine: dict[str, Any]
    separation: Separation | None = None
    geometry: list[dict[str, float]] = []
    importance: dict[str, dict[str, float]] = {}
    samples: list[Sample] = []
    timing: dict[str, float]
    artifacts: list[ArtifactRecord] = []

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)

    def trial(self, number: int) -> TrialRecord:
        """The trial of this number.

        Raises:
            RunStateError: there is none.
        """
        for trial in self.trials:
            if trial.number == number:
                return trial
        raise RunStateError(f"this run has no trial {number}; it has 0 to {len(self.trials) - 1}")

    def chosen(self) -> TrialRecord:
        """The selected trial.

        Raises:
            RunStateError: nothing was selected yet.
        """
        if self.selected is None:
            raise RunStateError("this run has not selected a trial yet: run `excise resume` first")
        return self.trial(self.selected)


def read_record(folder: Path) -> Record:
    """The record of a run folder, or of a record's own path.

    Raises:
        RunStateError: there is none, or it is not a record of this schema.
    """
    path = folder if folder.is_file() else folder / FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("schema") != SCHEMA:
            raise RunStateError(
                f"{path} has schema {data.get('schema')!r}; this version reads {SCHEMA}"
            )
        return Record.model_validate(data)
    except FileNotFoundError:
        raise RunStateError(
            f"{folder} holds no {FILE}: the run has not finished (`excise resume {folder}`), "
            "or this is not a run folder"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, RunStateError):
            raise
        raise RunStateError(f"{path} is not a readable record: {error}") from None


def write_record(folder: Path, record: Record) -> Path:
    """Write the record in one step: readers see the old file or the new one, never half of one."""
    text = record.model_dump_json(by_alias=True, indent=1) + "\n"
    return write_text(folder / FILE, text)


def write_text(path: Path, text: str) -> Path:
    """Write a text file beside its place and rename it there.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")
    return path
