"""How the files of an export are loaded: the code on its card, from the table of formats."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

from jinja2 import Environment, StrictUndefined

from excise.formats import FORMATS, Usage
from excise.record import ArtifactRecord, FileRecord, Record
from excise.report import formatting
from excise.report.markdown import Markdown


def _word(name: str) -> str:
    """Return a name as one word of a shell's line, and no option."""
    return shlex.quote(f"./{name}" if name.startswith("-") else name)


_CODE = Environment(
    trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined, autoescape=False
)
_CODE.filters |= {"json": json.dumps, "word": _word}


def usages(
    record: Record, artifact_format: str, artifact: ArtifactRecord | None, repo: str | None
) -> list[Usage]:
    """Return the ways to load an export, their code filled in.

    Args:
        record: of the run.
        artifact_format: one of `formats.FORMATS`.
        artifact: the export, where there is one.
        repo: the Hub id that it is published under, where that is known.
    """
    files = files_of(artifact)
    names = [one.file for one in files if one.part != "projector"]
    kind = "ImageTextToText" if record.model.multimodal else "CausalLM"
    values = {
        "repo": repo,
        "base": formatting.hub_id(record.model.source) or "path/or/hub-id/of/the/base/model",
        "auto_class": f"AutoModelFor{kind}",
        "file": names[0] if names else "FILE.gguf",
        "kind": files[0].type if files else "Q4_K_M",
        "form": artifact.details.get("form", "LoRA") if artifact is not None else "",
        "projector": next((one.file for one in files if one.part == "projector"), None),
    }
    return [
        replace(
            way,
            words=Markdown(_CODE.from_string(way.words).render(values)),  # ours, and no names in it
            code=_CODE.from_string(way.code).render(values),
        )
        for way in FORMATS[artifact_format].usage
    ]


def files_of(artifact: ArtifactRecord | None) -> list[FileRecord]:
    """Return the files of a GGUF export, as its details list them."""
    found = artifact.details.get("files", []) if artifact is not None else []
    return [FileRecord.model_validate(one) for one in found]
