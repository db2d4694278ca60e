"""Explain how the files of an export are named, loaded and sampled from: the practical half of its card."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, StrictUndefined

from excise.formats import FORMATS
from excise.record import ArtifactRecord, Record, ScoreRecord
from excise.report import formatting
from excise.report.markdown import bullets, code, fence, plain, table

_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top-p",
    "top_k": "top-k",
    "min_p": "min-p",
    "repetition_penalty": "repetition penalty",
}


def _word(name: str) -> str:
    """Quote a name as one word of a shell's line that is no option."""
    return shlex.quote(f"./{name}" if name.startswith("-") else name)


_CODE = Environment(
    trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined, autoescape=False
)
_CODE.filters |= {"json": json.dumps, "word": _word}


def loading(
    record: Record, artifact_format: str, artifact: ArtifactRecord | None, repo: str | None
) -> str:
    """Return the section with code that loads this format; `repo` is where it is published, if it is."""
    files = files_of(artifact)
    names = [str(one.get("file")) for one in files if one.get("part") != "projector"]
    kind = "ImageTextToText" if record.model.multimodal else "CausalLM"
    values = {
        "repo": repo,
        "base": formatting.hub_id(record.model.source) or "path/or/hub-id/of/the/base/model",
        "auto_class": f"AutoModelFor{kind}",
        "file": names[0] if names else "FILE.gguf",
        "kind": str(files[0].get("type")) if files else "Q4_K_M",
        "projector": next(
            (str(f.get("file")) for f in files if f.get("part") == "projector"), None
        ),
    }
    parts = ["## How to load it"]
    for way in FORMATS[artifact_format].usage:
        parts.append(way.words)
        if way.code:
            parts.append(fence(_CODE.from_string(way.code).render(values), way.language))
    return "\n\n".join(parts)


def files_of(artifact: ArtifactRecord | None) -> list[dict[str, Any]]:
    """List the files of a GGUF export, from its details."""
    found = artifact.details.get("files") if artifact is not None else None
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def files_section(artifact: ArtifactRecord | None) -> str:
    """List every file with its type and size, and its figures beside its unedited counterpart's."""
    files = files_of(artifact)
    if not files:
        return ""
    rows = []
    for one in files:
        kind = "projector" if one.get("part") == "projector" else str(one.get("type"))
        rows.append(
            (
                code(str(one.get("file"))),
                code(kind),
                formatting.size(int(one.get("bytes") or 0)),
                *(
                    _figure(one, "original", "behaviour_rate"),
                    _figure(one, "edited", "behaviour_rate"),
                ),
                *(_figure(one, "edited", "drift"), _figure(one, "edited", "drift_first")),
            )
        )
    head = (
        "File", "Type", "Size", "Behaviour rate, unedited", "Behaviour rate", "Drift (nats/token)",
        "Drift, first token",
    )  # fmt: skip
    measured = any("edited" in one for one in files)
    words = (
        "Each file was run with llama.cpp on the search prompts, beside the unedited model in the "
        "same type: drift here is the edit's, without what quantisation does to both."
        if measured
        else "These files were not run: their figures are not known."
    )
    return "\n\n".join(["## Files", words, table(head, rows, "llrrrrr")])


def _figure(one: Mapping[str, Any], which: str, name: str) -> str:
    scores = one.get(which)
    if not isinstance(scores, dict) or name not in scores:
        return formatting.MISSING
    return formatting.measured(name, ScoreRecord.model_validate(scores[name]))


def sampling_section(record: Record) -> str:
    """Return the sampling that the base model's generation config asks for."""
    found = record.model.sampling
    rows = [
        f"{_SAMPLING[name]}: {code(format(value, 'g'))}"
        for name, value in found.items()
        if name in _SAMPLING
    ]
    if found.get("do_sample") is False:
        rows.append("the base model asks for greedy decoding")
    if not rows:
        return ""
    return "\n\n".join(
        [
            "## Recommended sampling",
            "From the base model's generation config. The figures on this card are of greedy "
            "decoding.",
            bullets(rows),
        ]
    )


def credits_section(record: Record, artifact_format: str) -> str:
    """Say whose work this is, and under which licence."""
    base = plain(formatting.public_source(record.model.source))
    licence = plain(record.model.license or "not stated in its files: see its own page")
    lines = [
        f"Base model: {base}, by its authors. Its licence ({licence}) holds for this model as well.",
        "The edit: found, measured and written by Excise, with Transformers, PyTorch and Optuna.",
    ]
    return "## Credits and licence\n\n" + bullets([*lines, *FORMATS[artifact_format].credits])
