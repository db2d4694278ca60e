"""Streamed answers against the engine's, from caches and without, alone and beside others."""

from __future__ import annotations

import builders
import pytest
import torch

from excise.chat.columns import Columns
from excise.chat.sampling import Sampling
from excise.engine.engine import Engine
from excise.engine.requests import Responses
from excise.engine.stacking import ORIGINAL
from excise.errors import MeasurementError, MemoryExhausted

SAMPLING = Sampling(limit=10)
PROMPT = tuple(range(20, 32))


@pytest.fixture(scope="module", params=builders.FAMILIES)
def model(request):
    """(model, writers, edits of the original and two trials)."""
    loaded = builders.loaded(request.param)
    method = builders.method(loaded)
    edits = [method.edits(candidate) for candidate in builders.candidates(2)]
    return loaded, method.writers, [ORIGINAL, *edits]


def said(columns, texts, sampling=SAMPLING, number=0):
    """The tokens of all answers, at their end."""
    *_, last = columns.answer(texts, sampling, number)
    return [list(answer.tokens) for answer in last]


def test_answers_are_the_engines_responses(model):
    loaded, writers, edits = model
    engine = Engine(loaded, writers, {"target": [list(PROMPT)]}, max_new_tokens=10)
    expected = [e.responses["target"][0] for e in engine.measure(edits, [Responses("target")])]
    answers = said(Columns(loaded, writers, edits), [PROMPT] * 3)
    for answer, response in zip(answers, expected, strict=True):
        assert answer == list(response.tokens)[: -1 if response.ended else None]


def test_later_texts_go_on_from_the_cache(model):
    loaded, writers, edits = model
    columns = Columns(loaded, writers, edits)
    texts = [PROMPT] * 3
    for more in ([40, 41], [42], [43, 44, 45, 46, 47]):  # of unequal lengths
        answers = said(columns, texts)
        texts = [
            (*t, *a, *more[: n + 1]) for n, (t, a) in enumerate(zip(texts, answers, strict=True))
        ]
    fresh = Columns(loaded, writers, edits)
    assert said(columns, texts) == said(fresh, texts)
    assert columns.read <= 6 < fresh.read == max(map(len, texts))
    # What was said is dropped again, or was another text: never more than what is the same is kept.
    other = [(*PROMPT[:5], 90 + n, 91) for n in range(3)]
    assert said(columns, other) == said(Columns(loaded, writers, edits), other)
    assert columns.read == 2


def test_an_answer_that_was_stopped_goes_on_from_where_it_was(model):
    loaded, writers, edits = model
    columns = Columns(loaded, writers, edits)
    stream = columns.answer([PROMPT] * 3, SAMPLING, 0)
    next(stream)
    cut = [list(answer.tokens) for answer in next(stream)]
    stream.close()
    texts = [(*PROMPT, *tokens, 50) for tokens in cut]
    assert said(columns, texts) == said(Columns(loaded, writers, edits), texts)
    assert columns.read < len(PROMPT)


def test_a_column_does_not_depend_on_those_beside_it(model):
    loaded, writers, edits = model
    warm = Sampling(temperature=1.2, limit=8, seed=5)
    together = said(Columns(loaded, writers, edits), [PROMPT] * 3, warm, 1)
    alone = [said(Columns(loaded, writers, [one]), [PROMPT], warm, 1)[0] for one in edits]
    assert together == alone
    twice = said(Columns(loaded, writers, [ORIGINAL] * 2), [PROMPT] * 2, warm, 1)
    assert twice[0] == twice[1] == alone[0]
    assert said(Columns(loaded, writers, [ORIGINAL]), [PROMPT], warm, 2)[0] != alone[0]


def test_the_model_is_untouched_between_two_tokens(model):
    loaded, writers, edits = model
    for _ in Columns(loaded, writers, edits).answer([PROMPT] * 3, Sampling(limit=3), 0):
        assert not any(writer.module._forward_hooks for writer in writers)
        assert not torch.is_inference_mode_enabled()


def test_columns_that_padding_would_change_are_read_apart(model):
    loaded, writers, edits = model
    columns = Columns(loaded, writers, edits)
    columns._padding = False  # as of models whose convolutions read padding
    texts = [PROMPT, PROMPT[:7], PROMPT]
    assert said(columns, texts) == said(Columns(loaded, writers, edits), texts)


def test_failures_are_said_in_a_line(model, monkeypatch):
    loaded, writers, edits = model
    columns = Columns(loaded, writers, edits)
    logits = columns._forward.logits
    monkeypatch.setattr(columns._forward, "logits", lambda hidden: logits(hidden) * float("nan"))
    with pytest.raises(MeasurementError, match="not finite"):
        said(columns, [PROMPT] * 3)

    def full(hidden):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(columns._forward, "logits", full)
    with pytest.raises(MemoryExhausted, match="fewer points"):
        said(columns, [PROMPT] * 3)
    monkeypatch.undo()
    assert said(columns, [PROMPT] * 3) == said(Columns(loaded, writers, edits), [PROMPT] * 3)
