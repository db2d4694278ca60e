"""The kinds of input, in the order in which they take turns."""

from __future__ import annotations

from collections.abc import Callable

from fuzz import models, runs, settings, texts
from fuzz.case import Case, Place

KINDS: dict[str, Callable[[Place], Case]] = {
    "weights": models.weights,
    "index": models.index,
    "config": models.config,
    "generation": models.generation,
    "tokenizer": models.tokenizer,
    "template": texts.template,
    "gguf": models.gguf,
    "readme": models.readme,
    "folder": models.folder,
    "prompts-txt": texts.prompts_txt,
    "prompts-jsonl": texts.prompts_jsonl,
    "prompts-csv": texts.prompts_csv,
    "prompts-parquet": texts.prompts_parquet,
    "markers": texts.markers,
    "settings": settings.settings,
    "set": settings.flags,
    "record": runs.record,
    "journal": runs.journal,
    "run-config": runs.run_config,
    "captured": runs.captured,
    "from-gguf": runs.from_gguf,
}
