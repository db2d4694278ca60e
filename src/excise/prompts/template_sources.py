"""Find a chat template: in the model's own files, in a file that the user gives, or in another model.

Knows in which files and forms templates are kept; renders nothing.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from excise.errors import ModelError, first_line
from excise.folders import check_inside
from excise.reading import is_file, is_folder, is_unicode, parse_json, read_text

LARGEST = 1 << 20  # characters of a template
_TEMPLATE, _CONFIG, _OLD = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"


def own_template(tokenizer: Any, folder: Path | None = None) -> tuple[str, str] | None:
    """Return a model's own chat template and its name in words; None where it has none.

    It is the tokenizer's, or else that of chat_template.json, which Transformers reads for processors only.

    Args:
        tokenizer: the model's.
        folder: the model's, where it has one.

    Raises:
        ModelError: it is of no form that templates have.
    """
    what, value = "the tokenizer's chat template", getattr(tokenizer, "chat_template", None)
    if value:
        return _unpack(value, what), what
    file = None if folder is None else folder / _OLD
    if file is None or not is_file(file):
        return None
    return _from_file(file), f"the model's {_OLD}"


def read_template(source: str) -> tuple[str, str]:
    """Read a chat template from a file, or from another model's folder or Hub id; name it in words.

    A file is a template, or JSON that holds one under `chat_template`.

    Raises:
        ModelError: there is none.
    """
    path = Path(source)
    if is_folder(path):
        return _from_folder(path, source), f"chat template of {path.name}"
    if os.path.exists(path):  # noqa: PTH110 (Path's raises on long names)
        return _from_file(path), f"chat template {path.name}"
    if path.is_absolute() or source.count("/") != 1:
        raise ModelError(
            f"chat template {source!r:.200} is neither a file nor a model's folder or id"
        )
    return _from_folder(_download(source), source), f"chat template of {source}"


def _download(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(source, allow_patterns=[_TEMPLATE, _CONFIG, _OLD]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = first_line(error)
        raise ModelError(f"no chat template in {source}: {reason:.200}") from None


def _from_folder(folder: Path, source: str) -> str:
    for name in (_TEMPLATE, _CONFIG, _OLD):
        file = folder / name
        if os.path.lexists(file):
            check_inside(file, folder, ModelError)
            if name != _CONFIG or _value(file) is not None:
                return _from_file(file)
    raise ModelError(f"no chat template in {source}: no {_TEMPLATE}, and none in {_CONFIG}")


def _from_file(path: Path) -> str:
    what = f"chat template {path}"
    text = read_text(path, "chat template", ModelError, LARGEST)
    if path.suffix.lower() != ".json":
        return _unpack(text, what)
    value = _value(path)
    if value is None:
        raise ModelError(f"{what} holds no chat_template: is it the right file?")
    return _unpack(value, what)


def _value(path: Path) -> Any:
    """Return what stands under `chat_template` in a JSON file; None where nothing does."""
    text = read_text(path, "chat template", ModelError, LARGEST)
    data = parse_json(text, f"chat template {path}", ModelError)
    return data.get("chat_template") if isinstance(data, dict) else None


def _unpack(value: Any, what: str) -> str:
    """Return the template from any form that it is kept in: text, JSON within text, or several by name."""
    if isinstance(value, str):
        value = _inner(value.removeprefix("\ufeff"))
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        value = {str(one.get("name")): one.get("template") for one in value}
    if isinstance(value, dict):
        if "default" not in value:
            names = " ".join(", ".join(map(str, value)).split())
            raise ModelError(
                f"{what}: there are multiple chat templates, and none is the default: write one of "
                f"{names:.100} to a file, and give that with --chat-template"
            )
        value = value["default"]
    if not isinstance(value, str):
        raise ModelError(f"{what} is {type(value).__name__}, not text: {value!r:.60}")
    if len(value) > LARGEST or not is_unicode(value):
        fault = (
            f"has {len(value):,} characters" if is_unicode(value) else "holds half of a character"
        )
        raise ModelError(f"{what} {fault}: it cannot be meant")
    return value


def _inner(text: str) -> Any:
    """Return what stands under `chat_template` in a text that is JSON; else the text itself."""
    if not text.lstrip().startswith('{"'):  # templates begin with {{ and {%
        return text
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return data.get("chat_template", text) if isinstance(data, dict) else text
