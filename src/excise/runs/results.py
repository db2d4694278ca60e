"""Measure the chosen edit after the search: holdout figures, samples, and the record of it all."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from excise.checkpoints.licence import licence_of
from excise.checkpoints.loading import Loaded
from excise.checkpoints.model_folder import read_config, read_generation
from excise.engine.engine import Engine
from excise.engine.requests import Responses
from excise.engine.stacking import ORIGINAL, CandidateEdits
from excise.folders import commit_of
from excise.judges.certificate import certify
from excise.judges.labelled import read_labelled
from excise.judges.verdicts import FILE as VERDICTS_FILE
from excise.named_models import NAMED
from excise.reading import replace_surrogates
from excise.record import (
    CoverageRecord,
    JudgeRecord,
    ModelRecord,
    PromptRecord,
    Record,
    Sample,
)
from excise.runs.session import EditingSession, Session
from excise.runs.study_identity import digests, fingerprint, weights_of
from excise.search.loop import Search, importance
from excise.search.scoring import Scoring

_SAMPLES = 3
_MOST_SAMPLING = 1e9  # a setting of sampling that is larger, or no number, says nothing
_PACKAGES = ("excise", "torch", "transformers", "optuna", "peft", "safetensors", "tokenizers")


def final_figures(session: EditingSession, engine: Engine, edits: CandidateEdits) -> dict[str, Any]:
    """Measure original and chosen edit beside each other: final scorers, the holdout, a few responses.

    Args:
        session: the run's.
        engine: its engine on the search prompts.
        edits: the chosen ones.

    Returns:
        What the record says of it, by the record's names.
    """
    scoring, out = session.scoring, dict[str, Any]()
    if scoring.final:
        panel = session.panel(engine, "search", scoring.final)
        before, after = panel.measure([ORIGINAL, edits])
        out |= {"final_baseline": before.scores, "final": after.scores}
    out["samples"] = _samples(session, engine, edits)
    if all(map(len, session.sets.part("holdout").values())):
        held = session.engine("holdout", engine.fitted_plan)
        panel = session.panel(held, "holdout", scoring.every_trial + scoring.final)
        before, after = panel.measure([ORIGINAL, edits])
        out |= {"holdout_baseline": before.scores, "holdout": after.scores}
    return out


def _samples(session: EditingSession, engine: Engine, edits: CandidateEdits) -> list[Sample]:
    """Sample responses before and after. A side that must not be shown is not even asked for."""
    out = []
    for side, prompts in session.sets.part("search").items():
        if side not in session.config.scores.show:
            continue
        count = _SAMPLES if side == "target" else 1
        request = [Responses(side)]
        before, after = engine.measure([ORIGINAL, edits], request, {side: count})
        pairs = zip(before.responses[side], after.responses[side], strict=True)
        for prompt, both in zip(prompts.prompts, pairs, strict=False):  # of the first few prompts
            texts = [replace_surrogates(one.text) for one in both]
            out.append(
                Sample.model_validate(
                    {
                        "side": side,
                        "prompt": prompt.text,
                        "before": texts[0],
                        "after": texts[1],
                        "answer": prompt.answer,
                    }
                )
            )
    return out


def keep_verdicts(scoring: Scoring, folder: Path) -> None:
    """Keep the judge's verdicts in a run folder, so that nothing is asked twice."""
    if scoring.judge is not None:
        scoring.judge.keep(folder / VERDICTS_FILE, weights_of(scoring.judge.judge))


def judge_record(session: Session) -> JudgeRecord | None:
    """Describe the judge for the record, certified where the configuration says on what.

    Raises:
        JudgeError: it cannot be asked.
    """
    verdicts, labelled = session.scoring.judge, session.config.scores.judge.labelled
    if verdicts is None:
        return None
    certificate = None if labelled is None else certify(verdicts, read_labelled(labelled))
    return JudgeRecord(
        name=verdicts.name,
        facts=verdicts.judge.facts,
        scores=session.scoring.judged,
        certificate=certificate,
    )


def build_record(session: EditingSession, search: Search, **found: Any) -> Record:
    """Build the record of a run; `found` is what was measured and chosen, by the record's names."""
    config, method = session.config, session.method
    coverage = session.loaded.anatomy.coverage(config.edit.components)
    goals, facts = search.objectives, search.study.user_attrs
    told = config.model_dump(mode="json", exclude_none=True)
    # A total below one that was asked for before takes no trials away.
    told["search"]["trials"] = search.asked
    return Record.model_validate(
        {
            "schema": 1,
            "behaviour": config.behaviour,
            "description": config.description,
            "method": config.method,
            "versions": versions(),
            "seed": config.seed,
            "config": told,
            "prompts": {
                role: PromptRecord(
                    source=_shown(one.source),
                    sha256=one.sha256,
                    n=len(one),
                    labels_sha256=one.labels_sha256,
                )
                for role, one in session.sets.items()
                if len(one)
            },
            "formatting": session.sets.as_dict(),
            "objectives": [goal.name for goal in goals],
            "goals": ["minimize" if goal.sign > 0 else "maximize" for goal in goals],
            "selection": config.search.select,
            "coverage": CoverageRecord(
                edited=list(coverage.edited), not_edited=[*coverage.not_edited, *method.notes]
            ),
            "search": search.facts(),
            "importance": importance(search.study, goals),
            "files": facts.get("files", {}),
            "identity": digests(facts["identity"]),
            **found,
        }
    )


def versions() -> dict[str, str]:
    """Return the versions of the software that the figures were made with."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def _shown(source: str) -> str:
    """Name a prompt source by its file name or id: no path of the user's machine."""
    path = Path(source)
    return path.name if path.is_absolute() else source


def model_record(loaded: Loaded) -> ModelRecord:
    """Describe the source model for the record."""
    config = json.dumps(read_config(loaded.folder), sort_keys=True)
    return ModelRecord(
        source=public_name(loaded),
        revision=loaded.revision or commit_of(loaded.folder),
        model_type=loaded.anatomy.model_type,
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=loaded.device.type,
        layers=len(loaded.anatomy.layers),
        width=loaded.anatomy.width,
        parameters=int(loaded.model.num_parameters()),
        config_sha256=hashlib.sha256(config.encode()).hexdigest(),
        license=licence_of(loaded.folder),
        multimodal=loaded.anatomy.tower,
        sampling=_sampling(loaded.folder),
        fingerprint=fingerprint(loaded.folder),
        notes=loaded.notes,
    )


def public_name(loaded: Loaded) -> str:
    """Name the source for the record: a name or Hub id as it is, a folder in full: none is mistaken."""
    return loaded.source if loaded.source in NAMED else loaded.place


def _sampling(folder: Path) -> dict[str, Any]:
    """Read the sampling settings of the generation config."""
    config = read_generation(folder)
    names = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    found = {name: config.get(name) for name in names}
    return {
        k: v for k, v in found.items() if isinstance(v, int | float) and abs(v) < _MOST_SAMPLING
    }
