"""Logits of all positions never exist at once: by what is asked of the head, and by resident memory."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import builders
import pytest
import torch

from excise.engine.engine import Engine
from excise.engine.requests import Divergence, Responses
from excise.model.forward import Forward

BENCH = Path(__file__).resolve().parents[2] / "bench"


def test_the_head_is_asked_for_a_chunk_at_a_time(monkeypatch):
    loaded = builders.loaded("gemma4")
    monkeypatch.setattr(Forward, "chunk_bytes", 5 * 12 * builders.VOCABULARY)  # five positions
    asked = []
    logits = Forward.logits
    monkeypatch.setattr(
        Forward, "logits", lambda self, h: (asked.append(len(h)), logits(self, h))[1]
    )
    method = builders.method(loaded)
    edits = [method.edits(c) for c in builders.candidates(3)]
    prompts = {"target": builders.token_ids(9), "contrast": builders.token_ids(9, 1)}
    engine = Engine(loaded, method.writers, prompts, max_new_tokens=6)
    small = engine.measure(edits, [Responses("target"), Divergence("contrast")])
    assert max(asked) <= 5
    monkeypatch.undo()
    engine = Engine(loaded, method.writers, prompts, max_new_tokens=6)
    whole = engine.measure(edits, [Responses("target"), Divergence("contrast")])
    for mine, yours in zip(small, whole, strict=True):
        for a, b in zip(mine.divergence["contrast"], yours.divergence["contrast"], strict=True):
            assert torch.allclose(a, b, atol=1e-9)
        assert [r.tokens for r in mine.responses["target"]] == [
            r.tokens for r in yours.responses["target"]
        ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's high-water mark")
def test_resident_memory_stays_far_below_all_logits():
    measure = runpy.run_path(str(BENCH / "large_vocab.py"))["main"]
    found = measure(vocabulary=65536, prompts=60, candidates=4, length=8, limit=12)
    all_at_once = found["logits_of_all_positions_gigabytes"]
    assert all_at_once > 0.9
    parts = ("capture", "original_responses", "whole_drift", "responses")
    for part in parts:
        # A divergence holds its logits about three times over: all at once would be far above.
        assert found[f"{part}_gigabytes"] < 0.6 * all_at_once, found
