"""Figures of a model and of what an edit made of it, measured with Transformers alone, one text at a time.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fuzz import readers
from fuzz.ground import NEW_TOKENS, SIDES, Setup

DAY = date(2025, 1, 1)
_TIE = 1e-4  # logits as near as this may be rounded either way


class Unloadable(Exception):
    """Transformers itself cannot load it as it stands, or only with random values in it."""


@dataclass(frozen=True)
class Model:
    """A model and its tokenizer as Transformers gives them."""

    model: Any
    tokenizer: Any
    template: str | None = None

    @property
    def ends(self) -> set[int]:
        """Every token that the generation config or the tokenizer says ends a response."""
        named = getattr(self.model.generation_config, "eos_token_id", None)
        ids = {*(named if isinstance(named, list) else [named]), self.tokenizer.eos_token_id}
        return {int(one) for one in ids if one is not None}

    def ids(
        self, text: str, variables: dict[str, Any], header: str, system: str | None
    ) -> list[int]:
        """A prompt's tokens, up to where its answer begins."""
        template = self.template or getattr(self.tokenizer, "chat_template", None)
        if not template:
            plain = f"Question: {text}\nAnswer:"
            return list(
                self.tokenizer(plain if system is None else f"{system}\n\n{plain}")["input_ids"]
            )
        rendered = self._rendered(text, variables, system)
        if text not in rendered:  # some take a message's content as a list of parts
            rendered = self._rendered([{"type": "text", "text": text}], variables, system)
        return list(self.tokenizer(rendered + header, add_special_tokens=False)["input_ids"])

    def _rendered(self, content: Any, variables: dict[str, Any], system: str | None) -> str:
        turns = [] if system is None else [{"role": "system", "content": system}]
        return str(
            self.tokenizer.apply_chat_template(
                [*turns, {"role": "user", "content": content}],
                chat_template=_dated(
                    # A byte order mark belongs to the file, not to what it says.
                    (self.template or self.tokenizer.get_chat_template()).removeprefix("\ufeff")
                ),
                tokenize=False,
                add_generation_prompt=True,
                **variables,
            )
        )

    def logits(self, ids: list[int]) -> Any:
        """Logits (T, V)."""
        import torch

        with torch.inference_mode():
            return self.model(torch.tensor([ids])).logits[0].double()

    def response(self, ids: list[int]) -> tuple[list[int], bool]:
        """The greedy response, its end token with it, and whether rounding may have chosen it."""
        tokens: list[int] = []
        tie = False
        while len(tokens) < NEW_TOKENS and not (tokens and tokens[-1] in self.ends):
            best = self.logits([*ids, *tokens])[-1].topk(2)
            tie = tie or float(best.values[0] - best.values[1]) < _TIE
            tokens.append(int(best.indices[0]))
        return tokens, tie


def load_source(folder: Path, template: str | None = None) -> Model:
    """As `load`; where the configuration claims a quantisation that the weights do not have, without it.

    Raises:
        Unloadable: as `load`.
    """
    config = {} if folder.is_file() else json.loads((folder / "config.json").read_text("utf-8-sig"))
    if "quantization_config" not in config:
        return load(folder, template)
    with TemporaryDirectory() as plain:
        for path in folder.iterdir():
            (Path(plain) / path.name).symlink_to(path)
        (Path(plain) / "config.json").unlink()
        del config["quantization_config"]
        (Path(plain) / "config.json").write_text(json.dumps(config))
        return load(Path(plain), template)


def load(folder: Path, template: str | None = None) -> Model:
    """A model from its folder, or from a GGUF file.

    Raises:
        Unloadable: it cannot be loaded whole.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    given: dict[str, Any] = {"use_safetensors": True, "dtype": torch.float32}
    if folder.is_file():
        given = {"gguf_file": folder.name, "dtype": torch.bfloat16}
        given["quantization_config"] = GgufConfig(dequantize=True)
    place = folder.parent if folder.is_file() else folder
    named = {"gguf_file": folder.name} if folder.is_file() else {}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True, **given)
        tokenizer = AutoTokenizer.from_pretrained(place, **named)
    except Exception as error:  # noqa: BLE001 (whatever it is, it is no model)
        raise Unloadable(f"{type(error).__name__}: {str(error)[:200]}") from None
    lost = sorted({*map(str, info["missing_keys"]), *map(str, info.get("mismatched_keys", ()))})
    if lost:
        raise Unloadable(f"tensors are missing, such as {lost[0]}")
    return Model(model.float().eval(), tokenizer, template)


@dataclass(frozen=True)
class Figures:
    """What was measured, and how many of each count rounding may decide."""

    before: float
    after: float
    drift: float
    ties: int
    drift_ties: int


def measure(setup: Setup, original: Model, edited: Model, record: dict[str, Any]) -> Figures:
    """Behaviour rate before and after, and the drift, on the search prompts."""
    how = record.get("formatting", {})
    variables, header = how.get("variables", {}), how.get("header", "")
    config = record["config"]["prompts"]
    search = {side: readers.parts(readers.prompts(setup.prompts[side]))[1] for side in SIDES}

    def ids(model: Model, text: str) -> list[int]:
        text = f"{config.get('prefix', '')}{text}{config.get('suffix', '')}"
        return model.ids(text, variables, header, config.get("system"))

    phrases = readers.markers(setup.markers)
    shown: dict[str, int] = {}
    ties = 0
    for name, model in (("before", original), ("after", edited)):
        said = [model.response(ids(original, text)) for text in search["target"]]
        texts = [model.tokenizer.decode(tokens, skip_special_tokens=True) for tokens, _ in said]
        shown[name] = sum(not t.strip() or _found(phrases, t) for t in texts)
        ties += sum(tie for _, tie in said)
    total, count, drift_ties = 0.0, 0, 0
    for text in search["contrast"]:
        prompt = ids(original, text)
        tokens, tie = original.response(prompt)
        total += _divergence(original, edited, prompt, tokens)
        count, drift_ties = count + len(tokens), drift_ties + tie
    n = len(search["target"])
    return Figures(shown["before"] / n, shown["after"] / n, total / count, ties, drift_ties)


def _dated(template: str) -> str:
    """A template with the date written in that a run holds for it: the default of prompts.date."""

    def written(call: re.Match[str]) -> str:
        form = ast.literal_eval(call[1])
        return repr(DAY.strftime(form) if isinstance(form, str) else str(DAY))

    return re.sub(r"strftime_now\((.*?)\)", written, template)


def _found(phrases: list[str], text: str) -> bool:
    return any(phrase in readers.fold(text) for phrase in phrases)


def _divergence(original: Model, edited: Model, prompt: list[int], tokens: list[int]) -> float:
    whole = [*prompt, *tokens[:-1]]
    before, after = (m.logits(whole)[len(prompt) - 1 :].log_softmax(-1) for m in (original, edited))
    return float((before.exp() * (before - after)).sum())


def own_template(path: Path | None) -> str | None:
    """The template that a file holds, as JSON or as text.

    Raises:
        Unreadable: a JSON file without one.
    """
    if path is None:
        return None
    text = path.read_bytes().decode("utf-8-sig")
    try:
        data = json.loads(text)
    except ValueError:
        return text
    if isinstance(data, dict) and isinstance(data.get("chat_template"), str):
        return str(data["chat_template"])
    raise readers.Unreadable("JSON without a template")
