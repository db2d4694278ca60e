"""Odd settings, in a file and by `--set`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from random import Random
from typing import Any

from fuzz import readers
from fuzz.case import Case, Place
from fuzz.harmless import commented, reedited
from fuzz.mutations import change_toml
from fuzz.values import odd, shown, to_toml, toml_value

_SETTINGS: dict[str, list[Any]] = {
    "seed": [0, 1, 2**31, 2**63, -1, 1.5, "x"],
    "method": ["ridge", "directional", "subspace", "ara", "none", 7],
    "goal": ["strengthen", "remove", "x"],
    "description": ["", "\x1b[2J", "x" * 99_999, "<script>", "[bold]x[/bold]", "a\nb"],
    "model.dtype": ["float16", "bfloat16", "float64", "auto"], "model.device_map": ["cpu", "auto",
        "no_such", "cuda:9", ""],
    "model.revision": ["x", "../..", ""], "model.gguf_file": ["none.gguf", "../x.gguf", ""],
    "model.trust_remote_code": [True, "yes"], "model.source": ["none", "", "/dev/zero", "a/b",
        "x" * 5000, "\x00"],
    "prompts.prefix": ["", "x ", "\x1b[2J", "e" * 3000], "prompts.suffix": [" ?", "\x00"],
    "prompts.system": ["Be kind.", "", "\u202e"], "prompts.response_prefix": ["e", "<eos>", "x" * 500],
    "prompts.thinking": [True, 1, "x"], "prompts.date": ["2024-02-30", "2024-01-01", 7, "0001-01-01"],
    "prompts.direction_size": [1, 2, 0, 10**9, 15, 16, -1], "prompts.eval_size": [1, 0, 10**9, 2],
    "prompts.holdout_size": [1, 0, 10**9], "prompts.chat_template": ["none", "", "/dev/zero", "a/b"],
    "prompts.target.column": ["x", "", "group"], "prompts.target.group_column": ["group", "x", "text"],
    "prompts.target.answer_column": ["group", "x"], "prompts.target_eval": ["x", {},
        {"source": "none.txt"}],
    "directions.winsor": [0.9, 0.5, 1.0, 1.1, "x"], "directions.projected": [True, "x"],
    "directions.center": ["geometric_median", "mean", "x"],
    "edit.components": [["attn.o_proj"], ["mlp.down_proj"], [], ["x"], "attn.o_proj",
        ["attn.o_proj", "attn.o_proj"]],
    "edit.row_norms": ["none", "pre", "full", "x"], "edit.post_norms": [False, "x"],
    "ridge.rank": [1, 64, 10**9, 0], "ridge.basis": [16, 15, 10**9], "ridge.neighbours": [1, 10**9, 0],
    "subspace.rank": [1, 8, 9], "ara.iterations": [1, 10**9],
    "scores.objectives": [["drift"], ["drift", "drift"], [], ["x"], ["behaviour_rate"], ["kept"],
        ["drift", "false_rate", "behaviour_rate"]],
    "scores.report": [[], ["drift"], ["drift_first", "drift_first"], ["restored"], ["x"],
        ["false_rate"]],
    "scores.final": [["false_rate"], ["x"], ["drift", "drift"], ["restored"]],
    "scores.files": [["none.py"], ["/dev/zero"], [""], "x"], "scores.markers": [["e"], [""],
        ["x" * 9999], []],
    "scores.markers_file": ["none", "/dev/zero", ""], "scores.max_new_tokens": [1, 0, 40, 10**12],
    "scores.show": [[], ["target"], ["x"], ["target", "target"]],
    "search.trials": [1, 2, 7, 0, "x"], "search.startup_trials": [1, 10**9, 0], "search.batch": [0,
        1, 64, 10**9],
    "search.ei_candidates": [1, 10**7, 0],
    "search.select": ["knee", "drift<=0", "drift<=1", "rate<=0.5", "rate<=", "drift<=nan", "x",
        "drift<=1e999", "drift<=-1", "rate<=x\x1b"],
    "engine.rows": [0, 1, 10**9], "engine.reuse": [False], "engine.memory_fraction": [0.01, 1.0, 0, 2],
    "export.formats": [["adapter"], ["safetensors", "adapter"], [], ["safetensors", "safetensors"],
        ["x"], "safetensors", ["gguf-adapter"]],
    "export.adapter_rank": [1, 64, 10**9, 0], "export.adapter_error": [0.5, 0, 1],
    "export.quantize": [["x"], [""], ["Q8_0"]],
    "export.llama_cpp": ["none", "/"], "export.from_gguf": ["none", "/dev/zero"],
}  # fmt: skip
# What the judge would have to know more of a run for; it only looks whether they arrived.
_DEEP = ("model.", "prompts.", "scores.", "goal", "search.batch", "engine.rows", "search.trials")
_SHALLOW = ("prompts.prefix", "prompts.suffix", "scores.show", "scores.final", "scores.report")


def settings(place: Place) -> Case:
    """A file of settings."""
    path = place.copied("settings.toml")

    def known(data: bytes, draw: Random) -> tuple[bytes, str]:
        key = draw.choice(list(_SETTINGS))
        value = draw.choice(_SETTINGS[key])
        return _with(tomllib.loads(data.decode()), key, value), f"{key} = {shown(value)}"

    place.change(path, change_toml, known, known, harmless=[reedited, commented])
    return _settled(place, ("--config", str(path)), _values(path))


def _with(tree: dict[str, Any], key: str, value: Any) -> bytes:
    section, _, name = key.rpartition(".")
    holder = tree
    for part in filter(None, section.split(".")):
        holder = holder.setdefault(part, {})
    holder[name] = value
    return to_toml(tree).encode("utf-8", "surrogatepass")


def _values(path: Path) -> dict[str, Any]:
    """The settings of a file by their dotted keys; nothing of what is no TOML."""
    try:
        tree = (
            tomllib.loads(path.read_bytes()[: 10**7].decode("utf-8-sig")) if path.is_file() else {}
        )
    except (OSError, ValueError, RecursionError):
        return {}
    found: dict[str, Any] = {}
    waiting: list[tuple[str, Any]] = list(tree.items())
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{key}.{name}", one) for name, one in value.items()]
        else:
            found[key] = value
    return found


def flags(place: Place) -> Case:
    """`--set`, one to three of them, and odd flags."""
    said: list[str] = []
    expected: dict[str, Any] = {}
    for _ in range(0 if place.sound else place.draw.choice([1, 1, 1, 2, 3])):
        key = place.draw.choice(list(_SETTINGS))
        value = place.draw.choice([*_SETTINGS[key], *_SETTINGS[key], odd(place.draw)])
        text = toml_value(value) if place.draw.random() < 0.85 else str(value)
        key = (
            key
            if place.draw.random() < 0.93
            else place.draw.choice([key[:-1], key.upper(), "", key + ".x", "a" * 300])
        )
        text = f"{key}={text}".replace("\0", "\\u0000")[:100_000]
        said += ["--set", text]
        expected[key] = readers.set_value(text)
        place.said.append(shown(text))
    return _settled(place, tuple(said), expected)


def _settled(place: Place, more: tuple[str, ...], given: dict[str, Any]) -> Case:
    same = {  # what the flags of the job say wins over a file
        "prompts.direction_size",
        "prompts.eval_size",
        "scores.markers",
        "scores.markers_file",
        "scores.max_new_tokens",
        "search.trials",
        "search.startup_trials",
        "search.batch",
        "engine.rows",
        "prompts.response_prefix",
    }
    file = more[:1] == ("--config",)
    replaced = (
        "prompts.target.",
        "prompts.contrast.",
    )  # a file that a flag names has its own columns
    expected = {
        k: _plain(v)
        for k, v in given.items()
        if not (file and (k in same or k.startswith(replaced)))
    }
    setup = place.setup(more=more, expected=expected)
    deep = any(k.startswith(_DEEP) and k not in _SHALLOW for k in expected)
    return place.job(setup) if not deep else place.unmeasured(setup)


def _plain(value: Any) -> Any:
    return value.isoformat() if hasattr(value, "isoformat") else value
