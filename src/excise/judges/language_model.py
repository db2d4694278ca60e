"""A language model as a judge: it answers a rubric with one token, and its logits are the answer.

Shapes: B questions of a batch, A answers of the rubric, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from excise.checkpoints.loading import Loaded, load
from excise.config import JudgeSection, ModelSection, PromptSection
from excise.errors import ConfigError, JudgeError, is_out_of_memory
from excise.judges.rubrics import Rubric
from excise.judges.verdicts import Exchange, Opinion
from excise.prompts.chat_template import choose_format
from excise.prompts.sets import Prompt, PromptSet
from excise.prompts.template_rendering import Renderer
from excise.prompts.tokens import batches, pad_token, token_ids


class LanguageModel:
    """A loaded language model, asked by a rubric for verdicts and, if it is to grade, one for severity."""

    folder: Path | None
    at_once = 64

    def __init__(
        self,
        section: JudgeSection,
        rubric: Rubric,
        severity: Rubric | None,
        behaviour: str,
        name: str,
    ) -> None:
        """Load it.

        Raises:
            ModelError: it cannot be loaded.
            ConfigError: its tokenizer does not tell the answers of a rubric apart.
        """
        source = ModelSection(source=section.source, revision=section.revision, dtype=section.dtype)
        self._loaded: Loaded = load(source)
        self.name, self.folder = name, Path(self._loaded.folder)
        self.grades = severity is not None
        self._rubric, self._severity = rubric, severity
        self._behaviour, self._batch = behaviour, section.batch
        self._answers = {
            one.name: _answer_tokens(self._loaded.tokenizer, one)
            for one in (rubric, severity)
            if one is not None
        }
        self.facts: dict[str, Any] = {
            "kind": "language model",
            "rubric": rubric.facts,
            "severity": severity.facts if severity else None,
            "behaviour": behaviour,
            "dtype": str(self._loaded.dtype).removeprefix("torch."),
        }

    def verdicts(self, exchanges: Sequence[Exchange]) -> list[Opinion]:
        """Return the likeliest answer's verdict on each response.

        Raises:
            JudgeError: the model cannot be run.
        """
        return self._ask(exchanges, self._rubric)

    def severities(self, exchanges: Sequence[Exchange]) -> list[Opinion]:
        """Return the mean severity of each response over the answers' probabilities.

        Raises:
            JudgeError: as `verdicts`.
        """
        assert self._severity is not None
        return self._ask(exchanges, self._severity)

    def _ask(self, exchanges: Sequence[Exchange], rubric: Rubric) -> list[Opinion]:
        loaded, answers = self._loaded, self._answers[rubric.name]
        rows = self._tokens([rubric.ask(one, self._behaviour) for one in exchanges])
        pad = pad_token(loaded.model, loaded.tokenizer)
        padding = loaded.anatomy.padding
        found: dict[int, Opinion] = {}
        for batch in batches(rows, self._batch, pad, loaded.device, padding=padding):
            try:
                logits = self._last(batch.ids, batch.mask, batch.positions)
            except (RuntimeError, MemoryError) as error:
                why = (
                    "out of memory: lower scores.judge.batch" if is_out_of_memory(error) else error
                )
                raise JudgeError(f"judge {self.name} cannot be run: {why!s:.200}") from error
            shares = logits.float().softmax(-1)
            weights = torch.stack(
                [shares[:, tokens].sum(-1) for tokens in answers], dim=-1
            )  # (B, A)
            for number, row in zip(batch.rows.tolist(), weights.tolist(), strict=True):
                found[number] = rubric.opinion(row) if sum(row) > 0 else Opinion(None, "no answer")
        return [found[number] for number in range(len(exchanges))]

    @torch.inference_mode()
    def _last(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Return the logits (B, V) after the last token of each row."""
        out = self._loaded.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
        )  # fmt: skip
        return torch.as_tensor(out.logits[:, -1])

    def _tokens(self, questions: list[str]) -> list[list[int]]:
        section, asked = PromptSection(), PromptSet("judge", "judge", tuple(map(Prompt, questions)))
        loaded = self._loaded
        with Renderer() as renderer:
            chat_format = choose_format(loaded.tokenizer, section, renderer, loaded.folder)
            return token_ids(loaded.tokenizer, asked, section, chat_format, renderer)


def _answer_tokens(tokenizer: Any, rubric: Rubric) -> list[list[int]]:
    """Return the first tokens of each answer, written with and without a space before it.

    Raises:
        ConfigError: two answers begin with the same token.
    """
    found: list[list[int]] = []
    for answer in rubric.answers:
        forms = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (answer, f" {answer}")
        )
        # Where a space is a token of its own, the second form says nothing of the answer.
        firsts = {ids[0] for ids in forms if ids and tokenizer.decode(ids[:1]).strip()}
        found.append(sorted(firsts))
    flat = [token for tokens in found for token in tokens]
    if len(set(flat)) < len(flat) or not all(found):
        raise ConfigError(
            f"rubric {rubric.name}: the judge's tokenizer does not tell its answers "
            f"({', '.join(rubric.answers)}) apart by their first token: use single letters"
        )
    return found
