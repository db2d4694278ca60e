"""Rebuild an edited model from its source, prompts and parameters alone, and compare it with the record.

Of the run's folder only the record is used: directions are captured again. Other files that are found
there only add detail to a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from excise.checkpoints.loading import Loaded, load
from excise.checkpoints.model_folder import weight_files
from excise.config import load_config
from excise.errors import ConfigError
from excise.events import OnEvent, ignore, phase
from excise.export.exporter import EditedModel, exporter
from excise.files import CARD, check_destination, scratch, staged
from excise.formats import DEFAULT, FORMATS
from excise.methods.registry import check_method
from excise.model.edits import Edit
from excise.prompts.sets import PromptSets, load_prompt_sets
from excise.record import ArtifactRecord, Record, TrialRecord
from excise.report.card import model_card
from excise.report.stored_record import read_record
from excise.runs import setup
from excise.runs.results import model_record, versions
from excise.runs.run_folder import DIRECTIONS, save_directions
from excise.runs.session import EditingSession, Session
from excise.search.scoring import Scoring, markers_of

# Software that computes or stores weights; the rest searches, draws or shows.
_COMPUTING = frozenset({"excise", "torch", "transformers", "tokenizers", "safetensors"})
_SETS = ("target", "contrast", "keep")  # the prompts that edits are made from


@dataclass(frozen=True)
class Difference:
    """Something that is not as it was; `matters`: whether it can change the weights."""

    what: str
    then: str
    now: str
    matters: bool


@dataclass(frozen=True)
class Rebuilt:
    """One export, written again.

    Attributes:
        format: its name.
        then: its hash on the record, None where it is not on it.
        now: its hash.
        apart: the largest relative difference of a tensor (Frobenius), where the old files are at
            hand and differ.
    """

    format: str
    then: str | None
    now: str
    apart: float | None = None

    @property
    def same(self) -> bool:
        """Whether every byte of the weights is as the record says, where it says anything."""
        return self.then in (None, self.now)


@dataclass(frozen=True)
class Reproduction:
    """Result of rebuilding; `left_out` are formats on the record that are not rebuilt."""

    trial: int
    rebuilt: tuple[Rebuilt, ...]
    differences: tuple[Difference, ...]
    left_out: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether all that was rebuilt is byte for byte what the record tells of."""
        return all(one.same for one in self.rebuilt)

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        if all(one.then is None for one in self.rebuilt):
            return f"trial {self.trial}: rebuilt; the record has no export of it to compare with"
        if self.same:
            return f"trial {self.trial}: rebuilt, byte for byte the weights of the record"
        far = max((one.apart or 0.0 for one in self.rebuilt), default=0.0)
        how = f", apart by at most {far:.2g} of a tensor's norm" if far else ""
        known = [d.what for d in self.differences if d.matters]
        why = f"; what can explain it: {', '.join(known)}" if known else "; nothing explains it"
        return f"trial {self.trial}: rebuilt, with other weights than the record's{how}{why}"


def reproduce(
    path: Path,
    out: Path | None = None,
    *,
    trial: int | None = None,
    sets: Sequence[str] = (),
    on_event: OnEvent = ignore,
) -> Reproduction:
    """Rebuild one trial of a record; by default the selected one.

    Args:
        path: a `record.json`, or the folder that holds it.
        out: keep what is rebuilt in this new folder; else it is removed again.
        trial: its number.
        sets: `a.b=c` settings in place of the record's: where a model or a prompt file is now.
        on_event: told of progress.

    Raises:
        RunStateError: no such record or trial. ConfigError: a setting that does not fit.
        PromptError, ModelError: prompts or model are not where the record says.
        OutputError: `out` exists.
    """
    record = read_record(path)
    shown = record.chosen() if trial is None else record.trial(trial)
    config = load_config(flags=_without_code(record.config), sets=tuple(sets))
    if out is not None:
        check_destination(out)
    made = [a for a in record.artifacts if a.trial == shown.number]
    if not shown.params:
        raise ConfigError(f"trial {shown.number} has no parameters: it failed or was cut short")
    with phase("load", on_event):
        prompts, loaded = load_prompt_sets(config.prompts), load(config.model)
    differences = _differences(record, loaded, prompts)
    near = (path if path.is_dir() else path.parent) / "reproduced"
    with _room(out, near, loaded.folder) as room:
        scoring = Scoring(markers_of(config))
        session = setup.open_session(config, loaded, prompts, scoring, on_event)
        made_anew = _edits(setup.open_responses(session), shown.params, room)
        rebuilt = tuple(
            _rebuild(name, known, record, shown, *made_anew, room, near.parent)
            for name, known in _wanted(made).items()
        )
        for file in room.glob("*.safetensors"):  # what the method captured on the way
            file.unlink()
    left = tuple(dict.fromkeys(a.format for a in made if not _rebuilds(a.format)))
    return Reproduction(shown.number, rebuilt, differences, left)


def _without_code(config: dict[str, Any]) -> dict[str, Any]:
    """Revoke a configuration's permission to run code: a record may come from anyone.

    One of a version without a keep set, or prompts to confirm with, has none.
    """
    tree = deepcopy(config)
    if isinstance(tree.get("prompts"), dict):
        tree["prompts"].setdefault("keep", [])
        tree["prompts"].setdefault("confirm_size", 0)
    for section, key in (
        ("model", "trust_remote_code"),
        ("scores", "files"),
        ("export", "llama_cpp"),
    ):
        if isinstance(tree.get(section), dict):
            tree[section].pop(key, None)
    return tree


def _room(out: Path | None, near: Path, source: Path) -> AbstractContextManager[Path]:
    size = sum(path.stat().st_size for path in weight_files(source))
    return scratch(near, size) if out is None else staged(out, size)


def _wanted(made: Sequence[ArtifactRecord]) -> dict[str, ArtifactRecord | None]:
    """List the formats to rebuild, each with its artifact on the record; else a whole model."""
    known = {a.format: a for a in made if _rebuilds(a.format)}
    return {**known} if known else {DEFAULT: None}


def _rebuilds(name: str) -> bool:
    """Return whether the format of this name, which a record may have from elsewhere, can be rebuilt."""
    return name in FORMATS and FORMATS[name].rebuilt


def _edits(
    session: Session, params: dict[str, Any], room: Path
) -> tuple[EditingSession, list[Edit | None]]:
    """Make a trial's edits, with all that its run captured captured anew."""
    check_method(session)
    with phase("capture", session.on_event):
        seen = setup.observe(session)
        directions, separation = setup.find_directions(session, seen)
        save_directions(room / DIRECTIONS, directions, separation, session.sets.opening)
        prepared = setup.prepare(session, directions, room, seen)
        return setup.own_edits(prepared, params, room)


def _rebuild(
    name: str,
    known: ArtifactRecord | None,
    record: Record,
    trial: TrialRecord,
    session: EditingSession,
    edits: Sequence[Edit | None],
    room: Path,
    beside: Path,
) -> Rebuilt:
    card = {CARD: model_card(record, artifact_format=name, trial=trial.number)}
    to = room / FORMATS[name].folder
    section = load_config(flags=_as_written(known)).export
    with phase("export", session.on_event):
        edited = EditedModel.of(record, session.loaded, session.writers, edits)
        made = exporter(name, section).write(edited, to, card, session.on_event)
    then = None if known is None else known.sha256
    apart = None
    if known is not None and then != made.sha256:
        apart = _apart(beside / known.path, to)
    return Rebuilt(name, then, made.sha256, apart)


def _as_written(known: ArtifactRecord | None) -> dict[str, Any]:
    """Return the settings that an export was written with, as far as its bytes depend on them."""
    if known is None:
        return {}
    if "rank" not in known.details:
        return {"export.unpack": "packed" not in known.details}
    form = str(known.details.get("form", "LoRA")).lower()
    return {"export.adapter_rank": known.details["rank"], "export.adapter_form": form}


def _apart(old: Path, new: Path) -> float | None:
    """Return the largest relative difference of a tensor of the two folders; None if one is unreadable."""
    largest = 0.0
    try:
        for file in sorted(new.glob("*.safetensors")):
            with safe_open(old / file.name, "pt") as then, safe_open(file, "pt") as now:
                for key in now.keys():  # noqa: SIM118 (not a dict)
                    before, after = then.get_tensor(key).double(), now.get_tensor(key).double()
                    if not torch.equal(before, after):
                        change = (after - before).norm() / before.norm().clamp_min(1e-12)
                        largest = max(largest, float(change))
    except (OSError, SafetensorError, RuntimeError):
        return None
    return largest


def _differences(record: Record, loaded: Loaded, prompts: PromptSets) -> tuple[Difference, ...]:
    """List where software, model and prompts are not those of the record."""
    found = []
    now = versions()
    for name in sorted(record.versions.keys() | now.keys()):
        pair = (record.versions.get(name, "none"), now.get(name, "none"))
        if pair[0] != pair[1]:
            found.append(Difference(name, *pair, name in _COMPUTING))
    model = model_record(loaded)
    parts: dict[str, tuple[Any, Any]] = {
        "source model's configuration": (record.model.config_sha256, model.config_sha256),
        "source model's files": (record.model.fingerprint, model.fingerprint),
        "dtype": (record.model.dtype, model.dtype),
        "device": (record.model.device, model.device),
    }
    for name, (then, is_now) in parts.items():
        if then is not None and then != is_now:
            found.append(Difference(name, str(then)[:12], str(is_now)[:12], True))
    for one in prompts.all():
        known = record.prompts.get(one.role)
        then = known.sha256 if known is not None else None
        if then is not None and then != one.sha256:
            matters = one.role in _SETS
            found.append(Difference(f"{one.role} prompts", then[:12], one.sha256[:12], matters))
    return tuple(found)
