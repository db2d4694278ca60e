"""Tests of a language model that answers a rubric by its logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from excise.config import JudgeSection
from excise.errors import ConfigError
from excise.judges.language_model import LanguageModel
from excise.judges.rubrics import read_rubric
from excise.judges.verdicts import Exchange

SOME = [Exchange(f"why {n}", "because " * (n % 4 + 1), ended=n % 2 == 0) for n in range(9)]


def opened(tiny: Path, batch: int = 4) -> LanguageModel:
    section = JudgeSection(source=str(tiny / "model"), batch=batch, dtype="float32")
    rubrics = read_rubric("behaviour", grades=False), read_rubric("severity", grades=True)
    return LanguageModel(section, *rubrics, "being brief", "tiny")


def test_its_opinion_is_read_from_the_logits_after_the_question(tiny: Path):
    """The plain way: one chat at a time through Transformers, the answers' tokens compared."""
    judge = opened(tiny)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32).eval()
    verdicts, grades = judge.verdicts(SOME), judge.severities(SOME)
    for one, verdict, grade in zip(SOME, verdicts, grades, strict=True):
        for name, said in (("behaviour", verdict), ("severity", grade)):
            rubric = read_rubric(name, grades=name == "severity")
            chat = [{"role": "user", "content": rubric.ask(one, "being brief")}]
            ids = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
            logits = model(input_ids=ids).logits[0, -1]
            first = [tokenizer(a, add_special_tokens=False)["input_ids"][0] for a in rubric.answers]
            chances = logits.softmax(-1)[first]
            chances = (chances / chances.sum()).tolist()
            values = list(rubric.answers.values())
            if name == "severity":
                mean = sum(v * c for v, c in zip(values, chances, strict=True))
                assert said.value == pytest.approx(mean, abs=1e-4)
                assert 0 < said.value < 1  # continuous, not one of the five
            else:
                assert said.value == values[chances.index(max(chances))]


def test_it_says_the_same_in_any_batch(tiny: Path):
    a, b = opened(tiny, 1).severities(SOME), opened(tiny, 9).severities(SOME)
    assert [x.value for x in a] == pytest.approx([x.value for x in b], abs=1e-5)


def test_answers_that_begin_alike_are_refused(tiny: Path, tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text('question = "{response}"\n[answers]\nYes = "shows"\nYet = "answers"\n')
    section = JudgeSection(source=str(tiny / "model"))
    with pytest.raises(ConfigError, match="apart by their first token"):
        LanguageModel(section, read_rubric(str(path), grades=False), None, "", "tiny")
