"""What was done, in a versioned file: `record.json`. Cards, reports and exports read nothing else.

The shape is a contract: keys may be added, never renamed or removed. What `read_record` gives is typed
and consistent, so that no code behind it looks again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from excise.config import misfit
from excise.errors import RunStateError
from excise.reading import is_file, is_folder, read_json
from excise.space import from_params, hill_of, shares_of
from excise.staging import replacing

SCHEMA = 1
FILE = "record.json"
# What was measured and chosen, of which the record holds a hash.
_FIGURES = (
    *("method", "objectives", "goals", "baseline", "trials", "front", "selected"),
    *("holdout", "holdout_baseline", "final", "final_baseline"),
)
_PATH_CHARS = 4096
_LARGEST = 1e100  # of what has a meaning; figures can still be drawn

Size = Annotated[int, Field(ge=0, lt=1 << 63)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Finite = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST)]


def _check_params(params: dict[str, Any]) -> dict[str, Any]:
    for name, value in params.items():
        if not isinstance(value, str | int | float) or not _is_bounded(value):
            raise ValueError(
                f"parameter {name!r:.60} is neither text nor a number of reasonable size"
            )
    return params


def _is_bounded(value: Any) -> bool:
    return isinstance(value, str) or abs(value) <= _LARGEST


def _check_path(path: str) -> str:
    if not path or len(path) > _PATH_CHARS or "\0" in path:
        raise ValueError("is not the path of a folder")
    return path


class Part(BaseModel):
    """Base of the record's parts: immutable; keys of later versions are kept."""

    model_config = ConfigDict(frozen=True, extra="allow", ser_json_inf_nan="strings")


class ScoreRecord(Part):
    """A measurement. `parts` holds the same by group of prompts, where they are grouped."""

    value: float
    n: Size
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
    layers: int = Field(ge=1, le=10_000)
    width: Size
    parameters: Size
    config_sha256: str
    license: str | None = None
    multimodal: bool = False  # it has towers for images or sounds beside its language model
    sampling: dict[
        str, bool | int | Finite
    ] = {}  # of the generation config: temperature, top_p and the like
    fingerprint: str | None = None  # `identity.fingerprint` of its checkpoint
    notes: list[str] = []  # what the measured weights are, where they are not simply the source's


class PromptRecord(Part):
    """One role's prompts, by name and hash: never their text."""

    source: str
    sha256: str
    n: Size
    labels_sha256: str | None = None  # of their answers and groups


class TrialRecord(Part):
    """One trial. `screened`: its drift alone put it behind the front, so it met fewer prompts."""

    number: int
    state: Literal["complete", "screened", "failed", "running"]
    params: Annotated[dict[str, Any], AfterValidator(_check_params)]
    scores: Scores
    seconds: dict[str, Seconds]
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


class FileRecord(Part):
    """One file of a GGUF export, with its figures beside those of its unedited counterpart."""

    file: str = ""
    type: str = ""
    part: str = "model"
    bytes: Size = 0
    original: Scores | None = None
    edited: Scores | None = None


def _check_details(details: dict[str, Any]) -> dict[str, Any]:
    pydantic.TypeAdapter(list[FileRecord]).validate_python(details.get("files", []))
    pydantic.TypeAdapter(list[str]).validate_python(details.get("not_carried", []))
    pydantic.TypeAdapter(Size).validate_python(details.get("rank", 1))
    return details


class Formatting(Part):
    """What pages read of how prompts are put to the model."""

    notes: list[str] = []
    opening: dict[str, Any] | None = None


def _check_formatting(formatting: dict[str, Any]) -> dict[str, Any]:
    Formatting.model_validate(formatting)
    return formatting


class ArtifactRecord(Part):
    """An exported model: loaded again, and measured again beside what the search measured.

    `expected` was measured by the search's engine, `measured` on the loaded artifact, both on the
    search prompts; `sha256` is over the names and hashes of the files that hold weights, `files` has
    the hash of every file but the card, which is written anew as the record grows. `coverage` says
    what this trial's edit touches, which may be less than what the search could have edited.
    """

    path: Annotated[str, AfterValidator(_check_path)]
    format: str
    sha256: str
    files: dict[str, str] = {}
    trial: Size
    bytes: Size
    expected: Scores = {}
    measured: Scores = {}
    coverage: CoverageRecord | None = None
    details: Annotated[dict[str, Any], AfterValidator(_check_details)] = {}


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
    # How prompts are put to the model: `stage.Tokens.as_dict`.
    formatting: Annotated[dict[str, Any], AfterValidator(_check_formatting)] = {}
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
    timing: dict[str, Seconds]
    artifacts: list[ArtifactRecord] = []
    files: dict[str, str] = {}  # SHA-256 of what the run folder keeps of the model, by name
    identity: dict[str, str] = {}  # hashes of what the trials belong to: `identity.digests`
    figures_sha256: str | None = None  # of what was measured and chosen

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
        RunStateError: there is none, or it is not a whole and consistent record of this schema.
    """
    path = folder / FILE if is_folder(folder) else folder
    if not is_file(path) and not path.is_symlink():
        raise RunStateError(
            f"{folder} holds no {FILE}: the run has not finished (`excise resume {folder}`), "
            "or this is not a run folder"
        )
    data = read_json(path, "record", RunStateError)
    if data.get("schema") != SCHEMA:
        raise RunStateError(
            f"{path} has schema {data.get('schema')!r:.60}; this version reads {SCHEMA}"
        )
    try:
        record = Record.model_validate(data)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        words = f"{key!r:.80}: {first['msg'].removeprefix('Value error, '):.160}"
        raise RunStateError(f"{path} is not a readable record: {words}") from None
    wrong = _contradiction(record)
    if wrong is None and record.figures_sha256 not in (None, _figures_sha256(data)):
        wrong = "its trials or figures are not those that were written"
    if wrong is not None:
        raise RunStateError(f"{path} is not a record that a run wrote: {wrong}")
    return record


def _figures_sha256(data: Mapping[str, Any]) -> str:
    parts = {name: data.get(name) for name in _FIGURES}
    # How long each took is no figure of it.
    parts["trials"] = [{**trial, "seconds": None} for trial in data["trials"]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _contradiction(record: Record) -> str | None:
    """What in a record cannot be, in words; None in one that a run wrote."""
    names = record.objectives
    if not names or len(set(names)) < len(names) or len(record.goals) != len(names):
        return "its objectives and their goals do not fit"
    for number, trial in enumerate(record.trials):
        if trial.number != number:
            return f"trial {trial.number} stands where trial {number} belongs"
        if not all(math.isfinite(score.value) for score in trial.scores.values()):
            return f"trial {number} has a score that is not a number"
        if trial.params and not _fits(record.method, trial.params):
            return f"trial {number} has not the parameters of method {record.method!r:.60}"
    full = {
        t.number for t in record.trials if t.state == "complete" and set(names) <= t.scores.keys()
    }
    if len(set(record.front)) < len(record.front) or not set(record.front) <= full:
        return "its front names trials that are not there, or were not measured in full"
    if record.selected is not None and record.selected not in full:
        return f"the selected trial {record.selected} is not there, or was not measured in full"
    if any(artifact.trial >= len(record.trials) for artifact in record.artifacts):
        return "an export is of a trial that is not there"
    if not all(row.keys() >= _GEOMETRY for row in record.geometry):
        return "its geometry lacks columns"
    unfit = misfit(record.config)
    return None if unfit is None else f"of what it was told, {unfit}"


_GEOMETRY = set(
    "layer target_norm contrast_norm difference_norm cosine silhouette auc effective_rank".split()
)


def _fits(method: str, params: Mapping[str, Any]) -> bool:
    """Whether parameters can be those of a method, as far as pages read them."""
    try:
        if method == "directional":
            from_params(params)
        elif method == "ridge":
            hill_of(params)
            shares_of(params)
            float(params["overshoot"])
    except (KeyError, ValueError, TypeError, OverflowError):
        return False
    return True


def write_record(folder: Path, record: Record) -> Path:
    """Write the record in one step: readers see the old file or the new one, never half of one."""
    data = json.loads(record.model_dump_json(by_alias=True))
    data["figures_sha256"] = _figures_sha256(data)
    return write_text(folder / FILE, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Write a text file beside its place and rename it there.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")
    return path
