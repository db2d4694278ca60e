"""Which texts of the keep set a tokenizer knows, and where two sets of projections part."""

from __future__ import annotations

import builders
import pytest
import torch

from excise.capture.directions import boundary_of
from excise.capture.keep_set import Kept, known_texts

PLAIN = ["what colour is the orb", "who made the velm kettle", "where is the tarn lantern"]


def test_a_set_that_the_tokenizer_spells_is_not_known():
    tokenizer = builders.tokenizer()
    assert known_texts(tokenizer, PLAIN, PLAIN, 300) == [True] * 3
    spelled = ["QJX VZ QQ", "XXZJ 9981", "%$~"]  # one token a byte
    assert known_texts(tokenizer, spelled, PLAIN, 300) == [False] * 3
    assert known_texts(tokenizer, spelled, spelled, 300) == [True] * 3  # as the prompts are too
    assert known_texts(tokenizer, PLAIN, PLAIN, 10) == [False] * 3  # ids without an embedding


def test_prompts_of_unknown_words_are_left_out_and_the_set_where_they_are_most():
    class Words:
        unk_token_id = 0

        def __call__(self, texts, *, add_special_tokens, verbose=True):
            assert not add_special_tokens
            return {"input_ids": [[int("x" not in w) for w in t.split()] for t in texts]}

    texts = ["a b c", "a x c", "d e", ""]
    assert known_texts(Words(), texts, ["f g"], 2) == [True, False, True, False]
    assert known_texts(Words(), texts[1:], ["f g"], 2) == [False] * 3


def test_the_boundary_is_halfway_at_the_layer_that_separates_most():
    """In standard deviations, whatever the scale of a layer."""
    target = torch.tensor([[900.0, 3.0, 5.0], [-100.0, 3.2, 1.0]])
    contrast = torch.tensor([[100.0, 1.0, 4.0], [-300.0, 1.2, 0.0]])
    boundary = boundary_of(target, contrast)
    assert boundary.layer == 1
    assert boundary.at == pytest.approx(2.1)


def test_what_was_used_is_said_with_the_reasons():
    kept = Kept([[1], [2]], [[3], [4]], {"unknown": 0, "near_target": 3, "too_long": 1})
    assert kept.as_dict() == {"prompts": 6, "used": 2, "left_out": kept.left_out}
    assert "2 of 6 prompts are used" in kept.note
    assert "3 as they lie nearer to the target prompts" in kept.note
    assert "words" not in kept.note
    assert Kept([[1]], [[2]], {"unknown": 0}).note == ""
