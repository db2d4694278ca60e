"""After the search: holdout figures, samples, the record, exports measured again, card and report."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from excise.checkpoints.licence import licence_of
from excise.checkpoints.loading import DEMO, Loaded
from excise.checkpoints.model_folder import read_config, read_generation
from excise.config import Config
from excise.engine.batch_sizing import Sizing
from excise.engine.engine import Engine
from excise.engine.requests import Responses
from excise.folders import commit_of
from excise.model.edits import Edit
from excise.prompts.sets import PromptSet, PromptSets
from excise.reading import whole_text
from excise.record import CoverageRecord, ModelRecord, PromptRecord, Record, Sample
from excise.runs import setup
from excise.runs.study_identity import digests, fingerprint
from excise.search.evaluation import Panel
from excise.search.loop import Search, importance

_SAMPLES = 3
_MOST_SAMPLING = 1e9  # a setting of sampling that is larger, or no number, says nothing
_PACKAGES = ("excise", "torch", "transformers", "optuna", "peft", "safetensors", "tokenizers")


def final_figures(
    engine: Engine,
    loaded: Loaded,
    edits: Sequence[Edit | None],
    sets: PromptSets,
    tokens: setup.Tokens,
    config: Config,
    scoring: setup.Scoring,
) -> dict[str, Any]:
    """Original and chosen edit beside each other: final scorers, the holdout, and a few responses."""
    bare: list[Edit | None] = [None] * len(edits)
    search_sets = (sets.target_eval, sets.contrast_eval)
    out: dict[str, Any] = {}
    if scoring.final:
        panel = Panel(engine, scoring.final, scoring.context(*search_sets))
        before, after = panel.measure([bare, edits])
        out |= {"final_baseline": before.scores, "final": after.scores}
    out["samples"] = _samples(engine, edits, search_sets, config)
    holdout = (sets.target_holdout, sets.contrast_holdout)
    if all(len(prompts) for prompts in holdout):
        held = setup.engine_for(loaded, engine.writers, tokens, "holdout", config, engine.plan)
        scorers = scoring.every_trial + scoring.final
        panel = Panel(held, scorers, scoring.context(*holdout))
        before, after = panel.measure([bare, edits])
        out |= {"holdout_baseline": before.scores, "holdout": after.scores}
    return out


def _samples(
    engine: Engine,
    edits: Sequence[Edit | None],
    sets: tuple[PromptSet, PromptSet],
    config: Config,
) -> list[Sample]:
    """Responses before and after. A side that must not be shown is not even asked for."""
    out = []
    for prompts, side in zip(sets, ("target", "contrast"), strict=True):
        if side not in config.scores.show:
            continue
        count = _SAMPLES if side == "target" else 1
        bare: list[Edit | None] = [None] * len(edits)
        request = [Responses(side)]
        before, after = engine.measure([bare, edits], request, {side: count})
        for number in range(min(count, len(prompts))):
            prompt = prompts.prompts[number]
            texts = [whole_text(one.responses[side][number].text) for one in (before, after)]
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


def summary(
    config: Config,
    source: ModelRecord,
    loaded: Loaded,
    sets: PromptSets,
    sizing: Sizing,
    search: Search,
    seconds: dict[str, float],
    notes: Sequence[str] = (),
) -> Record:
    """The record of what was set up and searched; figures and choice are filled in by the caller.

    `notes` say what the method leaves alone beside what no component names.
    """
    coverage = loaded.anatomy.coverage(config.edit.components)
    goals, facts = search.objectives, search.study.user_attrs
    # A total below one that was asked for before takes no trials away.
    asked = config.search.model_copy(update={"trials": search.asked})
    config = config.model_copy(update={"search": asked})
    return Record.model_validate(
        {
            "schema": 1,
            "behaviour": config.behaviour,
            "description": config.description,
            "method": config.method,
            "model": source,
            "versions": versions(),
            "seed": config.seed,
            "config": config.model_dump(mode="json", exclude_none=True),
            "prompts": {
                s.role: PromptRecord(
                    source=_shown(s.source),
                    sha256=s.sha256,
                    n=len(s),
                    labels_sha256=s.labels_sha256,
                )
                for s in sets.all()
                if len(s)
            },
            "objectives": [goal.name for goal in goals],
            "goals": ["minimize" if goal.sign > 0 else "maximize" for goal in goals],
            "baseline": {},
            "trials": search.records(),
            "front": [],
            "selection": config.search.select,
            "selected": None,
            "coverage": CoverageRecord(
                edited=list(coverage.edited), not_edited=[*coverage.not_edited, *notes]
            ),
            "engine": sizing.as_dict(),
            "importance": importance(search.study, goals),
            "timing": dict(seconds),
            "files": facts.get("files", {}),
            "identity": digests(facts["identity"]),
        }
    )


def versions() -> dict[str, str]:
    """What the figures were made with."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def _shown(source: str) -> str:
    """A prompt source by its file name or id: no path of the user's machine."""
    path = Path(source)
    return path.name if path.is_absolute() else source


def model_record(loaded: Loaded) -> ModelRecord:
    """The source model as a record names it."""
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
    """The source as a record names it: a Hub id as it is, a folder in full, so neither is mistaken."""
    return DEMO if loaded.source == DEMO else loaded.place


def _sampling(folder: Path) -> dict[str, Any]:
    """What the generation config says of sampling."""
    config = read_generation(folder)
    names = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    found = {name: config.get(name) for name in names}
    return {
        k: v for k, v in found.items() if isinstance(v, int | float) and abs(v) < _MOST_SAMPLING
    }
