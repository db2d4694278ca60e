"""Prompt sets with their token ids: made once, before anything is written, and kept together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Any, Literal

from excise.checkpoints.loading import Loaded
from excise.config import Config
from excise.errors import ModelError, PromptError
from excise.prompts.chat_template import ChatFormat, after_answer, choose_format
from excise.prompts.sets import PromptSet, PromptSets
from excise.prompts.template_rendering import Renderer
from excise.prompts.tokens import (
    check_known,
    encode,
    end_tokens,
    token_ids,
    unnamed_end,
    vocabulary,
)

Part = Literal["search", "confirm", "holdout"]  # what candidates are measured on
LONGEST = 24  # tokens of an opening: what responses share for longer than this is not a beginning

_SUFFIX = {"search": "eval", "confirm": "confirm", "holdout": "holdout"}  # of the part's roles


@dataclass(frozen=True)
class Opening:
    """Tokens that every response begins with.

    Attributes:
        ids: the tokens, appended to every prompt.
        spoken: those of them that belong to the answer's text, and so are judged and shown with it.
        shares: side -> share of its responses that begin so, where they were measured.
        note: the same in a sentence; "" where there is nothing to say.
    """

    ids: tuple[int, ...] = ()
    spoken: tuple[int, ...] = ()
    shares: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return asdict(self) | {"ids": list(self.ids), "spoken": list(self.spoken)}

    @classmethod
    def from_dict(cls, known: dict[str, Any]) -> Opening:
        """Return the opening that `as_dict` gave."""
        ids, spoken = tuple(known["ids"]), tuple(known["spoken"])
        return cls(ids, spoken, dict(known["shares"]), str(known["note"]))


@dataclass(frozen=True)
class MeasuredSet(PromptSet):
    """Prompt set as the model reads it: the token ids of each prompt, up to where its response begins."""

    ids: list[list[int]]


@dataclass(frozen=True)
class MeasuredSets(Mapping[str, MeasuredSet]):
    """All prompt sets of a run by their roles, and how prompts are put to the model."""

    sets: dict[str, MeasuredSet]
    chat_format: ChatFormat
    opening: Opening = field(default_factory=Opening)

    def __getitem__(self, role: str) -> MeasuredSet:
        return self.sets[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sets)

    def __len__(self) -> int:
        return len(self.sets)

    def part(self, part: Part) -> dict[str, MeasuredSet]:
        """Return the sets that candidates are measured on, by side; there may be none to confirm with."""
        if part == "confirm" and "target_confirm" not in self.sets:
            return {}
        found = {side: self.sets[f"{side}_{_SUFFIX[part]}"] for side in ("target", "contrast")}
        borderline = f"borderline_{'holdout' if part == 'holdout' else 'eval'}"
        if borderline in self.sets:
            found["borderline"] = self.sets[borderline]
        return found

    def opened(self, opening: Opening) -> MeasuredSets:
        """Return the same sets with `opening` at the end of every prompt."""
        sets = {
            role: replace(one, ids=[[*row, *opening.ids] for row in one.ids])
            for role, one in self.sets.items()
        }
        return replace(self, sets=sets, opening=opening)

    def as_dict(self) -> dict[str, Any]:
        """Return how prompts are put to the model, JSON-ready, for the study and the record."""
        return {**self.chat_format.as_dict(), "opening": self.opening.as_dict()}

    @property
    def notes(self) -> list[str]:
        """Sentences on how prompts are put to the model."""
        return [note for note in (*self.chat_format.notes, self.opening.note) if note]


def tokenise(loaded: Loaded, sets: PromptSets, config: Config) -> MeasuredSets:
    """Apply the chat template and tokenise the prompts of every role.

    What cannot be read of the keep set is no error: `keep_set` leaves it out.

    Raises:
        ModelError: the chat template cannot render a prompt, there is none and thinking is on, or no token
            ends a response.
        PromptError: prompts and responses are longer than the model has positions.
    """
    section = config.prompts
    ends, tokenizer = end_tokens(loaded.model, loaded.tokenizer), loaded.tokenizer
    with Renderer() as renderer:
        chat_format = choose_format(tokenizer, section, renderer, loaded.folder)
        if section.thinking and chat_format.template is None:
            raise ModelError(
                "prompts.thinking is on, and this model has no chat template to think in: give one with "
                "--chat-template, or leave thinking off"
            )
        note = unnamed_end(tokenizer, after_answer(chat_format, renderer), ends)
        ids = {
            s.role: encode(tokenizer, s, section, chat_format, renderer) if len(s) else []
            for s in sets.all()
            if s.role != "keep"
        }
        for rows in ids.values():
            check_known(tokenizer, rows, vocabulary(loaded.model))
        _check_positions(loaded, ids, config)
        if len(sets.keep):
            ids["keep"] = token_ids(tokenizer, sets.keep, section, chat_format, renderer)
    notes = (*chat_format.notes, *filter(None, (note,)))
    measured = {
        s.role: MeasuredSet(**vars(s), ids=ids[s.role]) for s in sets.all() if s.role in ids
    }
    return MeasuredSets(measured, replace(chat_format, notes=notes))


def learned_positions(model: Any) -> int | None:
    """Return how many positions a model has learned a vector for; None where it works with any."""
    text = model.config.get_text_config()
    most: int | None = getattr(text, "max_position_embeddings", None)
    return None if getattr(text, "rope_parameters", None) else most


def _check_positions(loaded: Loaded, ids: dict[str, list[list[int]]], config: Config) -> None:
    """Refuse prompts longer than the positions of models that learn a vector for each."""
    most = learned_positions(loaded.model)
    if most is None:
        return
    prompt, new = max(map(len, chain(*ids.values()))), max(config.scores.max_new_tokens, LONGEST)
    if prompt + new > most:
        raise PromptError(
            f"the longest prompt has {prompt} tokens, and {new} more do not fit the {most} positions "
            "that this model has: give shorter prompts, or lower --max-new-tokens"
        )
