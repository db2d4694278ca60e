"""Record of a run, `record.json`: a versioned file that cards, reports and exports are made from.

Its shape is a contract: keys may be added, never renamed or removed. `report.stored_record` reads it
typed and checks its consistency, so that no other module has to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from excise.errors import RunStateError

SCHEMA = 1
_PATH_CHARS = 4096
_LARGEST = 1e100  # of a figure: no larger one has a meaning or can be drawn

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
    """Base of the record's parts: immutable, and keeps keys of later versions."""

    model_config = ConfigDict(frozen=True, extra="allow", ser_json_inf_nan="strings")


class ScoreRecord(Part):
    """Measurement. `parts` holds the same by group of prompts, where they are grouped.

    `spread` says how the samples behind a mean lie: of the KL divergence of single tokens the `median`, the
    95th percentile `p95` and the largest, `max`.
    """

    value: float
    n: Size
    interval: tuple[float, float] | None = None
    parts: dict[str, ScoreRecord] | None = None
    spread: dict[str, Finite] | None = None


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
    multimodal: bool = False  # it has image or audio towers
    # Of the generation config: temperature, top_p and the like.
    sampling: dict[str, bool | int | Finite] = {}
    fingerprint: str | None = None  # of its checkpoint: `study_identity.fingerprint`
    notes: list[str] = []  # how the measured weights differ from the source's


class PromptRecord(Part):
    """One role's prompts, by name and hash: never their text."""

    source: str
    sha256: str
    n: Size
    labels_sha256: str | None = None  # of their answers and groups


class TrialRecord(Part):
    """One trial.

    `front_probability` is the share of resampled prompt sets on which it is on the front, `regret` how
    far its knee's cost is from the best there, on average. `confirm` are its scores on prompts that the
    search had not used, where it was measured again.
    `screened`, in records of earlier versions: it was measured on 16 prompts a side, because its drift
    alone put it behind the front. Always false now. `told` is what the sampler was told of it, where that
    is not its scores: where in the region of interest it lies (`search.region`).
    """

    number: int
    state: Literal["complete", "screened", "failed", "running"]
    params: Annotated[dict[str, Any], AfterValidator(_check_params)]
    scores: Scores
    seconds: dict[str, Seconds]
    screened: bool = False
    reason: str | None = None
    told: list[Finite] | None = None
    front_probability: Annotated[float, Field(ge=0, le=1)] | None = None
    regret: Finite | None = None
    confirm: Scores | None = None


class SearchRecord(Part):
    """How the search went: what it was judged by, beside what it was told.

    Attributes:
        seconds: what its batches took, those of earlier processes included.
        startup_trials: the random ones that came first, as many as were asked for or fewer, where the
            time allowed few trials in all.
        region: objective -> its best and its worst value of interest, for the trials' `told`; {} where
            the sampler was told scores as they are.
    """

    seconds: Seconds
    startup_trials: Size
    region: dict[str, tuple[Finite, Finite]] = {}


class CertificateRecord(Part):
    """How a judge's verdicts agree with those of people on labelled responses.

    Attributes:
        labelled: the file, and its hash.
        n: its responses.
        recall: verdict -> share of its responses that the judge gave it to.
        kappa: Cohen's, over all verdicts.
        kappa_shows: the same for whether the behaviour is shown or not.
        confusion: true verdict -> the judge's -> count.
    """

    labelled: str
    sha256: str
    n: Size
    recall: Scores
    kappa: ScoreRecord
    kappa_shows: ScoreRecord
    confusion: dict[str, dict[str, Size]] = {}


class JudgeRecord(Part):
    """Who gave the verdicts behind `scores`; without a certificate, how far it errs is not known."""

    name: str
    facts: dict[str, Any]
    scores: list[str]
    certificate: CertificateRecord | None = None


class CoverageRecord(Part):
    """Writers that the edit changes, and those that it does not, with the reason."""

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
    """What reports read of how prompts are put to the model."""

    notes: list[str] = []
    opening: dict[str, Any] | None = None


def _check_formatting(formatting: dict[str, Any]) -> dict[str, Any]:
    Formatting.model_validate(formatting)
    return formatting


class ArtifactRecord(Part):
    """Exported model, loaded again and measured again.

    `expected` was measured by the search's engine, `measured` on the loaded artifact, both on the search
    prompts. `sha256` is over the names and hashes of the weight files. `files` has the hash of every file
    but the card, which is rewritten as the record grows. `coverage` says what this trial's edit changes,
    which may be less than what the search could have edited.
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


class BenchmarkRecord(Part):
    """One metric of one task, of the original and of a trial's edit on the same samples.

    `difference` is the edit's less the original's, with its 95 % `interval`. `gained` and `lost` count the
    samples that only the edit, or only the original, gets right, `p` is of McNemar's test on these; None
    where samples are not right or wrong. `samples_sha256` is over what the models were asked.
    """

    task: str
    metric: str
    trial: Size
    n: Size
    original: ScoreRecord
    edited: ScoreRecord
    difference: Finite
    interval: tuple[Finite, Finite]
    gained: Size | None = None
    lost: Size | None = None
    p: Annotated[float, Field(ge=0, le=1)] | None = None
    samples_sha256: str = ""


class Record(Part):
    """Whole run."""

    schema_version: int = pydantic.Field(SCHEMA, alias="schema")
    behaviour: str
    description: str = ""
    method: str
    model: ModelRecord
    versions: dict[str, str]
    seed: int
    config: dict[str, Any]
    prompts: dict[str, PromptRecord]
    # How prompts are put to the model: chat template, variables, header, response prefix.
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
    judge: JudgeRecord | None = None  # None: markers
    coverage: CoverageRecord
    engine: dict[str, Any]
    separation: Separation | None = None
    geometry: list[dict[str, float]] = []
    search: SearchRecord | None = None
    importance: dict[str, dict[str, float]] = {}
    samples: list[Sample] = []
    benchmarks: list[BenchmarkRecord] = []
    timing: dict[str, Seconds]
    artifacts: list[ArtifactRecord] = []
    files: dict[str, str] = {}  # SHA-256 of what the run folder keeps of the model, by name
    identity: dict[str, str] = {}  # hashes of what the trials depend on: `study_identity.digests`
    figures_sha256: str | None = None  # of what was measured and chosen

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)

    def trial(self, number: int) -> TrialRecord:
        """Return the trial of this number.

        Raises:
            RunStateError: there is none.
        """
        for trial in self.trials:
            if trial.number == number:
                return trial
        raise RunStateError(f"this run has no trial {number}; it has 0 to {len(self.trials) - 1}")

    def chosen(self) -> TrialRecord:
        """Return the selected trial.

        Raises:
            RunStateError: nothing was selected yet.
        """
        if self.selected is None:
            raise RunStateError("this run has not selected a trial yet: run `excise resume` first")
        return self.trial(self.selected)

    def with_artifacts(self, artifacts: Sequence[ArtifactRecord]) -> Record:
        """Return the record with these exports in place of its own."""
        return self._with(artifacts=list(artifacts))

    def with_benchmarks(self, found: Sequence[BenchmarkRecord]) -> Record:
        """Return the record with these benchmarks, in place of those of the same trial and task."""
        new = {(one.trial, one.task) for one in found}
        kept = [one for one in self.benchmarks if (one.trial, one.task) not in new]
        return self._with(benchmarks=[*kept, *found])

    def with_geometry(self, layers: Sequence[Mapping[str, float]]) -> Record:
        """Return the record with these figures of the residuals' geometry, by layer."""
        return self._with(geometry=list(layers))

    def with_timing(self, seconds: Mapping[str, float]) -> Record:
        """Return the record with these seconds by phase."""
        return self._with(timing=dict(seconds))

    def _with(self, **parts: Any) -> Record:
        """Return the record with other parts, validated."""
        return Record.model_validate({**dict(self), **parts})
