"""A text classifier as a judge: any `AutoModelForSequenceClassification`, on prompt and response.

Shapes: B exchanges of a batch, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from excise.checkpoints.model_folder import check_folder, check_loaded, library_errors, read_config
from excise.checkpoints.tokenizer import load_tokenizer
from excise.config import JudgeSection
from excise.errors import ConfigError, JudgeError
from excise.judges.verdicts import ANSWERS, OTHER, SHOWS, VERDICTS, Exchange, Opinion
from excise.model.devices import accelerator

# What labels of published classifiers are called, beside the verdicts' own names.
_KNOWN = {
    **{verdict: verdict for verdict in VERDICTS},
    **dict.fromkeys(("refusal", "refused", "refuse", "rejection", "rejected"), SHOWS),
    **dict.fromkeys(("compliance", "complied", "normal", "answer", "no_refusal"), ANSWERS),
    **dict.fromkeys(("off_topic", "off-topic"), OTHER),
}
_MOST_TOKENS = 8192  # of one text, where the model names no limit


class Classifier:
    """A loaded classifier."""

    folder: Path | None
    grades, at_once = False, 256

    def __init__(self, section: JudgeSection, folder: Path, name: str) -> None:
        """Load it.

        Raises:
            ModelError: it cannot be loaded.
            ConfigError: what its labels mean is not known.
        """
        from transformers import AutoModelForSequenceClassification

        check_folder(folder)
        self.name, self.folder = name, folder
        self._tokenizer = load_tokenizer(folder, name)
        with library_errors(f"judge {name}"):
            self._model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
                ignore_mismatched_sizes=True,  # said by our own check
            )  # fmt: skip
        check_loaded(info, f"judge {name}")
        self._device = _device(section)
        self._model.to(self._device).eval().requires_grad_(False)
        labels = self._model.config.id2label
        self._verdicts = _meanings(name, [str(labels[n]) for n in sorted(labels)], section.labels)
        self._section = section
        self._limit = _limit(self._model, self._tokenizer)
        self.facts = {
            "kind": "classifier",
            "labels": self._verdicts,
            "reads": section.reads,
        }

    def verdicts(self, exchanges: Sequence[Exchange]) -> list[Opinion]:
        """Return the most likely verdict on each response.

        Raises:
            JudgeError: the model fails on a text.
        """
        order = sorted(range(len(exchanges)), key=lambda n: -len(exchanges[n].response))
        found: dict[int, Opinion] = {}
        size = self._section.batch
        for start in range(0, len(order), size):
            some = order[start : start + size]
            try:
                best = self._best([exchanges[n] for n in some])
            except (RuntimeError, IndexError, ValueError) as error:
                raise JudgeError(f"judge {self.name} cannot be run: {error!s:.200}") from error
            found |= {n: Opinion(verdict) for n, verdict in zip(some, best, strict=True)}
        return [found[n] for n in range(len(exchanges))]

    def severities(self, _: Sequence[Exchange]) -> list[Opinion]:
        """Raise: a classifier has no severity."""
        raise JudgeError(f"judge {self.name} is a classifier, which has no severity")

    @torch.inference_mode()
    def _best(self, exchanges: Sequence[Exchange]) -> list[str]:
        responses = [one.response for one in exchanges]
        texts = [responses]
        if self._section.reads == "pair":
            texts = [[one.prompt for one in exchanges], responses]
        # Of a pair that is too long, the longer text loses its end first.
        batch = self._tokenizer(
            *texts, padding=True, truncation=True, max_length=self._limit, return_tensors="pt"
        ).to(self._device)
        logits = self._model(**batch).logits  # (B, K)
        # Labels of one verdict are one: their probabilities add up.
        shares = logits.float().softmax(-1)
        kinds = list(dict.fromkeys(self._verdicts))
        sums = torch.stack(
            [shares[:, [v == kind for v in self._verdicts]].sum(-1) for kind in kinds], dim=-1
        )
        return [kinds[n] for n in sums.argmax(-1).tolist()]


def _meanings(name: str, labels: Sequence[str], given: Sequence[str]) -> list[str]:
    """Return the verdict of each label.

    Raises:
        ConfigError: one is not known, or there are not two.
    """
    told = dict(one.rpartition("=")[::2] for one in given)
    stray = next((label for label in told if label not in labels), None)
    if stray is not None:
        raise ConfigError(
            f"scores.judge.labels: judge {name} has no label {stray!r:.60}; it has {', '.join(labels):.200}"
        )
    found = [told.get(label) or _KNOWN.get(label.casefold().replace(" ", "_")) for label in labels]
    if None in found or SHOWS not in found or len(set(found)) < 2:
        raise ConfigError(
            f"judge {name} has the labels {', '.join(labels):.200}: say what each means, such as --set "
            f"'scores.judge.labels=[\"{labels[0]}=shows\"]' ({', '.join(VERDICTS)})"
        )
    return [str(verdict) for verdict in found]


def is_classifier(folder: Path) -> bool:
    """Return whether a checkpoint is of a class for sequence classification."""
    names = read_config(folder).get("architectures") or [""]
    return str(names[0]).endswith("ForSequenceClassification")


def _limit(model: Any, tokenizer: Any) -> int:
    """Return the most tokens that the model reads."""
    found = int(getattr(model.config, "max_position_embeddings", None) or _MOST_TOKENS)
    if found % 64 == 2:  # RoBERTa and its kin count positions from above the padding: 512 of 514
        found -= 2
    return max(1, min(found, int(tokenizer.model_max_length), _MOST_TOKENS))


def _device(section: JudgeSection) -> torch.device:
    return torch.device(section.device or accelerator() or "cpu")
