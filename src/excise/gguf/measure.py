"""Exported GGUF files measured again, each beside its own unedited counterpart of the same type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from excise.checkpoints.gguf_header import shard_names
from excise.checkpoints.loading import Loaded
from excise.events import Notice, OnEvent, phase
from excise.export.formats import Exported
from excise.files import scratch
from excise.gguf import engine
from excise.gguf.engine import GgufEngine, GgufModel
from excise.gguf.export import GgufPlan, convert_all, own_type
from excise.gguf.ggml import GET_LLAMA_CPP
from excise.gguf.llamacpp import plain_copy
from excise.prompts.tokens import end_tokens
from excise.record import Scores
from excise.search.evaluation import Panel
from excise.search.scorers import ScoreContext, Scorer


@dataclass(frozen=True)
class GgufJob:
    """What a GGUF is measured on and by: the run's own search prompts and scorers."""

    loaded: Loaded
    prompts: dict[str, list[list[int]]]
    scorers: tuple[Scorer, ...]
    context: ScoreContext
    limit: int
    spoken: tuple[int, ...] = ()


def measure_gguf(
    made: Exported, plan: GgufPlan, job: GgufJob, on_event: OnEvent
) -> tuple[Exported, Scores]:
    """Measure every file of a GGUF export; figures are added to its `details`.

    Returns:
        The export, and the scores of its first file; none where llama.cpp is not here to run it.
    """
    if not engine.available():
        on_event(Notice(f"{made.format}: not measured, for want of llama.cpp ({GET_LLAMA_CPP})"))
        return made, {}
    files = [dict(one) for one in made.details["files"]]
    models = [one for one in files if one["part"] == "model" and not _later_shard(one["file"])]
    adapter = made.format == "gguf-adapter"
    if adapter and plan.base is None and plan.tools is None:
        on_event(Notice("gguf-adapter: not measured, for want of a base: name one by --from-gguf"))
        return made, {}
    wanted = [own_type(job.loaded.folder)] if adapter else [one["type"] for one in models]
    first: Scores = {}
    for kind, base in _originals(wanted, plan, job.loaded.folder, made.path, on_event):
        for one in models:
            if not adapter and plan.base is None and one["type"] != kind:
                continue
            path = made.path / one["file"]
            with phase(f"measure {kind if adapter else one['type']}", on_event):
                edited, lora = (base, path) if adapter else (path, None)
                before, after = _measure_pair(base, edited, lora, job)
            one["original"] = {
                name: score.model_dump(mode="json") for name, score in before.items()
            }
            one["edited"] = {name: score.model_dump(mode="json") for name, score in after.items()}
            if one is models[0]:
                first = after
    return replace(made, details={**made.details, "files": files}), first


def _originals(
    kinds: list[str], plan: GgufPlan, source: Path, near: Path, on_event: OnEvent
) -> Iterator[tuple[str, Path]]:
    """(type, unedited GGUF) for every type; made for the purpose and removed, unless it is at hand."""
    if plan.base is not None:
        yield kinds[0], plan.base
        return
    assert plan.tools is not None
    size = 2 * sum(path.stat().st_size for path in source.glob("*.safetensors"))
    with scratch(near, size) as room:
        plain = plain_copy(source, room / "plain")
        yield from convert_all(plan.tools, plain, room, kinds, "original", on_event)


def _measure_pair(
    original: Path, edited: Path, adapter: Path | None, job: GgufJob
) -> tuple[Scores, Scores]:
    """Scores of the original file and of the edited one, drift against the original's own responses."""
    longest = max(len(ids) for rows in job.prompts.values() for ids in rows) + job.limit
    ends = end_tokens(job.loaded.model, job.loaded.tokenizer)
    with GgufModel(original, longest) as one, GgufModel(edited, longest, adapter) as other:
        before = _engine(one, job, ends, None)
        after = _engine(other, job, ends, before)
        panels = [Panel(e, job.scorers, job.context) for e in (before, after)]
        scores = [panel.measure([[]])[0].scores for panel in panels]
    return scores[0], scores[1]


def _engine(
    model: GgufModel, job: GgufJob, ends: frozenset[int], reference: GgufEngine | None
) -> GgufEngine:
    return GgufEngine(
        model,
        job.prompts,
        job.loaded.tokenizer,
        ends=ends,
        limit=job.limit,
        spoken=job.spoken,
        reference=reference,
    )


def _later_shard(name: str) -> bool:
    """A split file is loaded by its first part."""
    return name != shard_names(name)[0]
