"""What scorers are told of a GGUF: which distributions are compared, where, and which way round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from excise.engine.requests import Divergence, Responses
from excise.engine.stacking import ORIGINAL
from excise.events import Event, OnEvent, Progress, ignore
from excise.gguf.engine import GgufEngine

VOCABULARY = 7


class Spoken:
    """In place of a GGUF: logits are a function of the tokens so far, different for every `seed`."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.asked: list[tuple[list[int], int]] = []

    def logits(self, ids: Sequence[int]) -> Tensor:
        draw = torch.Generator().manual_seed(hash((self.seed, *ids)) % (1 << 31))
        return 2 * torch.randn(VOCABULARY, generator=draw)

    def read(self, ids: Sequence[int], keep: int) -> Tensor:
        self.asked.append((list(ids), keep))
        return torch.stack([self.logits(ids[: n + 1]) for n in range(len(ids) - keep, len(ids))])

    def greedy(self, ids: Sequence[int], ends: frozenset[int], limit: int) -> tuple[int, ...]:
        out: list[int] = []
        while len(out) < limit and not ends & set(out[-1:]):
            out.append(int(self.logits([*ids, *out]).argmax()))
        return tuple(out)


class Words:
    """In place of a tokenizer."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(map(str, ids))


PROMPTS = {"target": [[1, 2], [3]], "contrast": [[4, 5, 6], [2, 2]]}


def engine(
    model: Any, reference: GgufEngine | None = None, limit: int = 5, on_event: OnEvent = ignore
) -> GgufEngine:
    return GgufEngine(
        model,
        PROMPTS,
        Words(),
        ends=frozenset({0}),
        limit=limit,
        spoken=(6,),
        reference=reference,
        on_event=on_event,
    )


def test_measuring_a_file_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("excise.gguf.engine.EVENT_EVERY", 0.0)
    said: list[Event] = []
    one = engine(Spoken(1), on_event=said.append)
    one.measure([ORIGINAL], [Responses("target"), Divergence("contrast")])
    count = [Progress("responses", n, 2) for n in (1, 2)]
    assert said == [*count, *count, Progress("passes", 1, 2), Progress("passes", 2, 2)]


def test_divergence_is_of_the_edited_file_from_the_original_at_the_originals_responses() -> None:
    original, edited = Spoken(1), Spoken(2)
    before = engine(original)
    (evidence,) = engine(edited, before).measure([ORIGINAL], [Divergence("contrast")])
    for ids, found in zip(PROMPTS["contrast"], evidence.divergence["contrast"], strict=True):
        said = original.greedy(ids, frozenset({0}), 5)
        assert len(found) == len(said)
        for n, value in enumerate(found):
            so_far = [*ids, *said[:n]]
            p, q = (m.logits(so_far).double().log_softmax(0) for m in (original, edited))
            forward, backward = (p.exp() * (p - q)).sum(), (q.exp() * (q - p)).sum()
            assert abs(forward - backward) > 1e-3 * forward  # the two directions can be told apart
            assert float(value) == pytest.approx(float(forward), rel=1e-4)
    (own,) = before.measure([ORIGINAL], [Divergence("contrast")])
    assert all(float(row.abs().max()) < 1e-9 for row in own.divergence["contrast"])


def test_responses_are_the_files_own_and_made_once() -> None:
    model = Spoken(3)
    edited = engine(model, engine(Spoken(4)))
    (evidence,) = edited.measure([ORIGINAL], [Responses("target")])
    for ids, response in zip(PROMPTS["target"], evidence.responses["target"], strict=True):
        assert response.tokens == model.greedy(ids, frozenset({0}), 5)
        assert response.text == " ".join(map(str, (6, *response.tokens)))
        assert response.ended == (response.tokens[-1] == 0)
    model.greedy = None  # type: ignore[assignment, method-assign]
    assert edited.responses("target") == evidence.responses["target"]
