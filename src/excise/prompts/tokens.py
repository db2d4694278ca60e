"""Tokenise prompts once, and batch token ids with left padding by similar length.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

import torch
from torch import Tensor

from excise.config import PromptSection
from excise.errors import ModelError, PromptError
from excise.prompts.chat_template import ChatFormat
from excise.prompts.sets import PromptSet
from excise.prompts.template_rendering import Renderer

_BATCH_TOKENS = 2**15  # of a batch, padding included


def beginning(prompts: Sequence[list[int]]) -> tuple[int, ...]:
    """Return the longest common token prefix, at most one token shorter than the shortest prompt.

    Empty for a single prompt.
    """
    if len(prompts) < 2:
        return ()
    first, last = min(prompts), max(prompts)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return tuple(token for token, _ in same)[: min(map(len, prompts)) - 1]


@dataclass(frozen=True)
class Batch:
    """Left-padded token ids; `rows` are the positions of its rows in the list they came from."""

    rows: Tensor  # (B,)
    ids: Tensor  # (B, T)
    mask: Tensor  # (B, T) 1 where a token is real

    @property
    def size(self) -> int:
        """Number of its tokens, padding included."""
        return self.ids.numel()

    @property
    def positions(self) -> Tensor:
        """Position ids (B, T); padding sits at 0."""
        return (self.mask.cumsum(-1) - 1).clamp_min(0)

    def part(self, start: int, stop: int) -> Batch:
        """Select some of the rows, without the padding that all of them have."""
        rows, ids, mask = self.rows[start:stop], self.ids[start:stop], self.mask[start:stop]
        spare = int((mask.sum(0) == 0).sum())  # padding is on the left
        return Batch(rows, ids[:, spare:], mask[:, spare:])

    def halves(self) -> tuple[Batch, Batch]:
        """Split the rows into two batches."""
        n = len(self.rows) // 2
        return self.part(0, n), self.part(n, len(self.rows))


def encode(
    tokenizer: Any,
    prompts: PromptSet,
    section: PromptSection,
    chat_format: ChatFormat,
    renderer: Renderer,
) -> list[list[int]]:
    """Tokenise every prompt as the model expects it, up to where its answer begins.

    Raises:
        ModelError: the chat template cannot render a prompt, or leaves its text out.
        PromptError: a prompt has no tokens.
    """
    ids = token_ids(tokenizer, prompts, section, chat_format, renderer)
    if any(not row for row in ids):
        raise PromptError(
            f"a prompt of {prompts.source} has no tokens: are the model's tokenizer files there?"
        )
    return ids


def token_ids(
    tokenizer: Any,
    prompts: PromptSet,
    section: PromptSection,
    chat_format: ChatFormat,
    renderer: Renderer,
) -> list[list[int]]:
    """Tokenise as `encode` does; a prompt may have no tokens.

    Raises:
        ModelError: the chat template cannot render a prompt, or leaves its text out.
    """
    texts = [f"{section.prefix}{prompt.text}{section.suffix}" for prompt in prompts.prompts]
    return rendered_ids(tokenizer, chat_format.render(renderer, texts), chat_format)


def rendered_ids(
    tokenizer: Any, rendered: Sequence[str], chat_format: ChatFormat
) -> list[list[int]]:
    """Tokenise what a chat format has rendered."""
    # The template writes its own <bos>; adding another would change every position.
    special = chat_format.template is None
    # Not `verbose`: texts that are too long are said, or left out, by whoever reads them.
    ids = tokenizer(list(rendered), add_special_tokens=special, verbose=False)["input_ids"]
    if special:
        ids = [_unended(tokenizer, text, row) for text, row in zip(rendered, ids, strict=True)]
    return [list(map(int, row)) for row in ids]


def check_known(tokenizer: Any, rows: Sequence[Sequence[int]], size: int) -> None:
    """Refuse tokens without an embedding, as where tokens were added to the tokenizer alone.

    Raises:
        ModelError: an id is `size`, the size of the vocabulary, or more.
    """
    highest = max((token for row in rows for token in row), default=0)
    if highest >= size:
        raise ModelError(
            f"the tokenizer gives token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r:.60}), and "
            f"the model has {size} token ids: its embedding was not resized when tokens were added"
        )


def _unended(tokenizer: Any, text: str, row: list[int]) -> list[int]:
    """Drop the end token that some tokenizers add to a prompt: nothing would be left to say."""
    end = tokenizer.eos_token_id
    added = end is not None and row[-1:] == [end] and not text.endswith(tokenizer.eos_token)
    return row[:-1] if added else row


def vocabulary(model: Any) -> int:
    """Return the size of the model's vocabulary."""
    return int(model.config.get_text_config().vocab_size)


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Collect the end tokens that the generation config and the tokenizer name.

    Raises:
        ModelError: as `named_ends`.
    """
    named = getattr(model.generation_config, "eos_token_id", None)
    return named_ends(named, tokenizer.eos_token_id, vocabulary(model))


def named_ends(generation: Any, own: Any, size: int) -> frozenset[int]:
    """Collect every end token of a model with `size` token ids; leave out ids beyond the vocabulary.

    Args:
        generation: the generation config's `eos_token_id`, as it stands there.
        own: the tokenizer's.
        size: the size of the vocabulary.

    Raises:
        ModelError: neither names one that the model has, or one of them is something else than ids.
    """
    found = [*_ids(generation, "generation config"), *_ids(own, "tokenizer")]
    ends = frozenset(number for number in found if 0 <= number < size)
    if not ends:
        beyond = f": {found[:5]} are none of its {size} token ids" if found else ""
        raise ModelError(
            "neither the generation config nor the tokenizer names an end token that the model has"
            f"{beyond}"
        )
    return ends


def _ids(value: Any, whose: str) -> list[int]:
    ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(type(number) is int for number in ids):
        raise ModelError(
            f"the {whose}'s eos_token_id must be a token id or a list of them, and is {value!r:.60}"
        )
    return list(ids)


def unnamed_end(tokenizer: Any, after: str, ends: frozenset[int]) -> str:
    """Return a note where the special token that a template writes after a response is no end token.

    Such responses are measured as they are generated elsewhere: up to an end token that is named.
    """
    first = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
    if not first or first[0] in ends or first[0] not in tokenizer.all_special_ids:
        return ""
    text = tokenizer.convert_ids_to_tokens(first[0])
    return (
        f"The template closes a response with {text!r}, which neither the generation config nor the "
        "tokenizer names as an end token: responses may run on past it."
    )


def pad_token(model: Any, tokenizer: Any) -> int:
    """Return the padding id; padding is masked, so any id of the vocabulary will do."""
    pad = tokenizer.pad_token_id
    known = pad is not None and 0 <= pad < vocabulary(model)
    return int(pad) if known else min(end_tokens(model, tokenizer))


def batches(
    rows: Sequence[Sequence[int]],
    size: int,
    pad: int,
    device: torch.device,
    *,
    padding: bool = True,
) -> list[Batch]:
    """Make batches of at most `size` rows of similar length, longest first.

    Fewer rows where they are long, so that one long text does not inflate a whole batch. Without
    `padding`, only rows of the same length share one.
    """
    lengths = [len(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (-lengths[i], i))
    out = []
    for group in [order] if padding else same_length(order, lengths):
        while group:
            most = min(size, max(1, _BATCH_TOKENS // lengths[group[0]]))
            some, group = group[:most], group[most:]
            out.append(left_pad([rows[i] for i in some], some, pad, device))
    return out


def same_length(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Split numbers that are sorted by their lengths into runs of equal length."""
    return [list(run) for _, run in groupby(order, key=lambda number: lengths[number])]


def left_pad(
    rows: Sequence[Sequence[int]], numbers: Sequence[int], pad: int, device: torch.device
) -> Batch:
    """Make one left-padded batch of these rows."""
    width = max(map(len, rows))
    pads = [width - len(row) for row in rows]
    ids = [[*[pad] * n, *row] for n, row in zip(pads, rows, strict=True)]
    mask = [[*[0] * n, *[1] * len(row)] for n, row in zip(pads, rows, strict=True)]
    return Batch(torch.tensor(numbers), *(torch.tensor(part).to(device) for part in (ids, mask)))
