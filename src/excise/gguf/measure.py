"""Measure exported GGUF files, each beside its own unedited counterpart of the same type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from excise.checkpoints.gguf_header import shard_names
from excise.events import Notice, OnEvent, phase
from excise.export.exporter import Exported, Measurement
from excise.files import scratch
from excise.gguf import engine
from excise.gguf.engine import GgufEngine, GgufModel
from excise.gguf.export import GgufPlan, convert_all, own_type
from excise.gguf.ggml import GET_LLAMA_CPP
from excise.gguf.joining import text_part
from excise.gguf.llamacpp import plain_copy
from excise.prompts.tokens import end_tokens
from excise.record import Scores


def measure_gguf(
    made: Exported, plan: GgufPlan, by: Measurement, on_event: OnEvent, *, adapter: bool = False
) -> tuple[Exported, Scores]:
    """Measure every file of a GGUF export; figures are added to its `details`.

    Args:
        made: what was written.
        plan: what it was written with.
        by: the search's prompts and scorers.
        on_event: told of the steps.
        adapter: whether the files are adapters on a base, rather than whole models.

    Returns:
        The export, and the scores of its first file; none where llama.cpp is not here to run it.
    """
    if not engine.available():
        on_event(Notice(f"{made.format}: not measured, for want of llama.cpp ({GET_LLAMA_CPP})"))
        return made, {}
    files = [dict(one) for one in made.details["files"]]
    models = [one for one in files if one["part"] == "model" and not _later_shard(one["file"])]
    if adapter and plan.base is None and plan.tools is None:
        on_event(
            Notice(f"{made.format}: not measured, for want of a base: name one by --from-gguf")
        )
        return made, {}
    wanted = [own_type(by.loaded.folder)] if adapter else [one["type"] for one in models]
    first: Scores = {}
    for kind, base in _originals(wanted, plan, by.loaded.folder, made.path, on_event):
        for one in models:
            if not adapter and plan.base is None and one["type"] != kind:
                continue
            file = made.path / one["file"]
            with (
                phase(f"measure {kind if adapter else one['type']}", on_event),
                _runnable(file, bool(made.details.get("joined"))) as path,
            ):
                edited, lora = (base, path) if adapter else (path, None)
                before, after = _measure_pair(base, edited, lora, by, on_event)
            one["original"] = {
                name: score.model_dump(mode="json") for name, score in before.items()
            }
            one["edited"] = {name: score.model_dump(mode="json") for name, score in after.items()}
            if one is models[0]:
                first = after
    return replace(made, details={**made.details, "files": files}), first


@contextmanager
def _runnable(file: Path, joined: bool) -> Iterator[Path]:
    """Give a file that llama.cpp runs: of a joined one the language model, as long as it is needed."""
    if not joined:
        yield file
        return
    with scratch(file.parent, file.stat().st_size) as room:
        text_part(file, room / file.name)
        yield room / file.name


def _originals(
    kinds: list[str], plan: GgufPlan, source: Path, near: Path, on_event: OnEvent
) -> Iterator[tuple[str, Path]]:
    """Yield (type, unedited GGUF) for every type; make and remove those that are not at hand."""
    if plan.base is not None:
        yield kinds[0], plan.base
        return
    assert plan.tools is not None
    size = 2 * sum(path.stat().st_size for path in source.glob("*.safetensors"))
    with scratch(near, size) as room:
        plain = plain_copy(source, room / "plain")
        yield from convert_all(plan.tools, plain, room, kinds, "original", on_event)


def _measure_pair(
    original: Path, edited: Path, adapter: Path | None, by: Measurement, on_event: OnEvent
) -> tuple[Scores, Scores]:
    """Score the original file and the edited one, the latter's drift against the original's responses."""
    searched = by.engine
    longest = max(len(ids) for rows in searched.prompts.values() for ids in rows) + searched.limit
    with GgufModel(original, longest) as one, GgufModel(edited, longest, adapter) as other:
        before = _engine(one, by, None, on_event)
        after = _engine(other, by, before, on_event)
        return by.scores(before), by.scores(after)


def _engine(
    model: GgufModel, by: Measurement, reference: GgufEngine | None, on_event: OnEvent
) -> GgufEngine:
    return GgufEngine(
        model,
        by.engine.prompts,
        by.loaded.tokenizer,
        ends=end_tokens(by.loaded.model, by.loaded.tokenizer),
        limit=by.engine.limit,
        spoken=by.engine.spoken,
        reference=reference,
        on_event=on_event,
    )


def _later_shard(name: str) -> bool:
    """Return whether a file is a later part of a split model: such a model is loaded by its first part."""
    return name != shard_names(name)[0]
