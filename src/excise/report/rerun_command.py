"""The `excise run` command that repeats a record: its settings where they differ from the defaults.

Pure. Paths lose their folders and texts put around prompts are left out, so that the command can be
published; `withheld` says which settings those are.
"""

from __future__ import annotations

import shlex
from typing import Any

from excise.config import (
    Config,
    PromptSource,
    behaviours,
    load_config,
    unknown_settings,
)
from excise.record import Record
from excise.report.formatting import public_source
from excise.trees import toml_value

_FLAGS = {
    "method": "--method",
    "model.quantize": "--quantize",
    "search.trials": "--trials",
    "search.startup_trials": "--startup-trials",
    "seed": "--seed",
    "prompts.target.source": "--target",
    "prompts.contrast.source": "--contrast",
    "prompts.target_eval.source": "--target-eval",
    "prompts.contrast_eval.source": "--contrast-eval",
    "prompts.direction_size": "--direction-size",
    "prompts.eval_size": "--eval-size",
    "prompts.chat_template": "--chat-template",
    "scores.markers_file": "--markers",
    "scores.max_new_tokens": "--max-new-tokens",
}
# The card never holds text that is put to the model.
_WITHHELD = ("prompts.system", "prompts.prefix", "prompts.suffix", "prompts.response_prefix")
_KEEP, _BORDERLINE = "prompts.keep", "prompts.borderline"
_ALWAYS = ("search.trials", "seed")
# Said in a place of their own, or not part of what was measured: how many trials a time allows is.
_ELSEWHERE = ("model.source", "behaviour", "search.time")


def command(record: Record, *, out: str = "DIR") -> str:
    """Return the command in shell syntax, one option a line, without settings that this version lacks."""
    config, base = _flatten(record.config), _base(record)
    config.setdefault("seed", record.seed)
    if record.search is not None:
        config["search.startup_trials"] = record.search.startup_trials
    words = [["excise", "run", public_source(record.model.source)], ["--out", out]]
    if record.behaviour in behaviours():
        words.append(["--behaviour", record.behaviour])
    elif config.get("behaviour"):
        words.append(["--set", f"behaviour={record.behaviour}"])
    unknown = unknown_settings(record.config)  # or the command would be refused
    hidden = tuple(f"{key}." for key in (*_WITHHELD, *_ELSEWHERE, *unknown))
    words += [
        _option(key, value)
        for key, value in sorted(config.items(), key=_order)
        if not f"{key}.".startswith(hidden)
        and (key in _ALWAYS or _public(key, value) != _public(key, base.get(key)))
    ]
    return " \\\n    ".join(shlex.join(word) for word in words)


def withheld(record: Record) -> list[str]:
    """Return settings of the run that `command` leaves out."""
    config = _flatten(record.config)
    return [key for key in _WITHHELD if config.get(key)]


def _base(record: Record) -> dict[str, Any]:
    """Return the settings that hold without any option of the command."""
    builtin = record.behaviour in behaviours()
    config = load_config(behaviour=record.behaviour) if builtin else Config()
    flat = _flatten(config.model_dump(mode="json"))
    fields = PromptSource(source="").model_dump(mode="json", exclude={"source"})
    for role in record.config.get("prompts") or {}:
        for field, value in fields.items():
            flat.setdefault(f"prompts.{role}.{field}", value)
    return flat


def _flatten(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return nested tables as dotted keys, without those that have no value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{path}{key}.")
        elif value is not None:
            flat[f"{path}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _public(key: str, value: Any) -> Any:
    """Return the value as it may be published: names of files without their folders."""
    if key in (_KEEP, _BORDERLINE):
        return [_given(source) for source in value or ()]
    paths: tuple[str, ...]
    paths = (".source", ".files", ".markers_file", ".chat_template", ".llama_cpp", ".from_gguf")
    paths += (".rubric", ".severity", ".labelled")
    if not key.endswith(paths):
        return value
    if isinstance(value, list):
        return [public_source(str(item)) for item in value]
    is_address = isinstance(value, str) and value.startswith(("http://", "https://"))
    return public_source(value) if isinstance(value, str) and not is_address else value


def _given(source: dict[str, Any]) -> dict[str, Any]:
    """Return one source of several, publishable, without its fields that have their defaults."""
    usual = PromptSource(source="").model_dump(mode="json")
    own = {key: value for key, value in source.items() if value != usual.get(key)}
    return {**own, "source": public_source(source["source"])}


def _order(item: tuple[str, Any]) -> tuple[int, str]:
    flags = list(_FLAGS)
    return (flags.index(item[0]) if item[0] in flags else len(flags), item[0])


def _option(key: str, value: Any) -> list[str]:
    if key in _FLAGS:
        return [_FLAGS[key], str(_public(key, value))]
    shown = _public(key, value)
    if key == _KEEP and all(len(source) == 1 for source in shown):
        return ["--keep", *(source["source"] for source in shown)] if shown else ["--no-keep"]
    return ["--set", f"{key}={toml_value(shown)}"]
