"""Check which settings may have changed when something goes on with a run.

A run folder may come from others, and its config.toml may have been edited. Code that it names runs
only where the caller trusts it, and settings that decide a run's figures must be those of its trials.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from excise.config import Config, load_config, validate
from excise.errors import ConfigError, RunStateError
from excise.reading import read_toml

CONFIG = "config.toml"
# Settings that may be others when a run goes on: they decide no figure, or what they lead to (a model,
# prompts, markers, a template, scorers) is part of the study's identity and is compared as it is found.
_FREE = (
    *("behaviour", "description", "export.", "engine.memory_fraction"),
    *("search.trials", "search.time", "search.select", "scores.final", "scores.show"),
    *("model.source", "model.revision", "model.gguf_file", "model.device_map"),
    *("scores.files", "scores.markers", "scores.judge.", "prompts.chat_template", "prompts.keep"),
    *("prompts.confirm_size", "prompts.borderline"),
    *(
        f"prompts.{side}{part}."
        for side in ("target", "contrast")
        for part in ("", "_eval", "_holdout")
    ),
)
_ANOTHER = (
    "go on with the version of Excise that wrote it, or start a run of its own with a new --out"
)
# Settings that name code, and what runs it.
_CODE = {
    "scores.files": "scorers of your own",
    "model.trust_remote_code": "the code beside the model",
    "export.llama_cpp": "that checkout's converter",
}


def read_settings(
    folder: Path,
    *,
    trust: bool = False,
    unused: Collection[str] = (),
    trials: int | None = None,
    time: str | None = None,
) -> Config:
    """Read the configuration of a run folder, for a command that goes on with it.

    Args:
        folder: the run's.
        trust: whether the caller lets code run that the folder names.
        unused: settings of `_CODE` that the command has no use for, or was given by the caller.
        trials: how many in all, in place of what the folder says.
        time: how long the search takes in all, such as "1h30m", in place of what the folder says.

    Raises:
        RunStateError: it names code and is not trusted, or cannot be read.
    """
    flags: dict[str, Any] = {}
    if trials is not None:
        flags |= {"search.trials": trials, "search.time": None}
    if time is not None:
        flags["search.time"] = time
    try:
        known = read_toml(folder / CONFIG, "configuration file", ConfigError).get("prompts")
        if isinstance(known, dict) and "keep" not in known:  # written before there was a keep set
            flags["prompts.keep"] = []
        if isinstance(known, dict) and "confirm_size" not in known:  # nor this part of the prompts
            flags["prompts.confirm_size"] = 0
        config = load_config(file=folder / CONFIG, flags=flags)
    except ConfigError as error:
        raise RunStateError(f"{folder / CONFIG}: {error}. Set it back; else {_ANOTHER}") from None
    settings = _flat(config)
    named = [key for key in _CODE if key not in unused and settings[key]]
    if named and not trust:
        words = "; ".join(f"{_CODE[key]} ({key} = {_shown(settings[key])})" for key in named)
        raise RunStateError(
            f"{folder / CONFIG} names code that would run: {words}. Where it is yours, or you have read "
            "it, add --trust-run"
        )
    return config


def check_settings(folder: Path, config: Config, known: Mapping[str, Any]) -> Config:
    """Return `config` with its open settings as they were; refuse a setting that has changed.

    Args:
        folder: the run's.
        config: its configuration now.
        known: the one that its trials were measured with, of its record or study.

    Raises:
        RunStateError: one that decides figures differs, or the known one cannot be read.
    """
    try:
        before = validate(dict(known))
    except ConfigError as error:
        raise RunStateError(
            f"the trials in {folder} were measured with other settings than there are: {error}. You can "
            f"look at it with `excise front` and `excise report`; to add to it, {_ANOTHER}"
        ) from None
    if config.method is None:
        config = config.model_copy(update={"method": before.method})
    if config.model.dtype == "auto":
        model = config.model.model_copy(update={"dtype": before.model.dtype})
        config = config.model_copy(update={"model": model})
    then, now = _flat(before), _flat(config)
    keys = [key for key in dict.fromkeys([*then, *now]) if not key.startswith(_FREE)]
    changed = [key for key in keys if then.get(key) != now.get(key)]
    if changed:
        words = "; ".join(
            f"{key} is {_shown(now.get(key))} now and was {_shown(then.get(key))}"
            for key in changed[:3]
        )
        raise RunStateError(
            f"{folder / CONFIG} belongs to another run than the trials in its folder: {words}. Set it "
            "back, or start a run of its own with a new --out"
        )
    return config


def _flat(config: Config) -> dict[str, Any]:
    """Flatten every setting to its dotted key."""
    flat: dict[str, Any] = {}
    level = [("", config.model_dump(mode="json"))]
    while level:
        path, table = level.pop()
        for key, value in table.items():
            if isinstance(value, dict):
                level.append((f"{path}{key}.", value))
            else:
                flat[f"{path}{key}"] = value
    return flat


def _shown(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 200 and text.isprintable() else f"{text!r:.200}..."
