"""The keep set that ships: wide, balanced from its first row on, apart from every behaviour."""

from __future__ import annotations

import json
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest

from excise.config import PromptSource, behaviours, load_config
from excise.prompts.sets import read_prompts

FILE = Path(str(resources.files("excise"))) / "data" / "keep" / "prompts.jsonl"
ROWS = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
KINDS = Counter(row["kind"] for row in ROWS)
# What a model may decline to do: it acts in no world, and knows no person and no hour.
ACTS = ("order me", "book me", "call ", "remind me", "turn on", "what time is it", "near me")


def alike(text):
    return " ".join(text.casefold().split())


def test_it_is_read_whole_and_has_its_columns():
    assert all(list(row) == ["text", "kind", "language"] for row in ROWS)
    prompts = read_prompts(PromptSource(source=str(FILE), group_column="kind"))
    assert [(p.text, p.group) for p in prompts] == [(r["text"], r["kind"]) for r in ROWS]
    assert FILE.stat().st_size < 200_000


def test_many_kinds_of_a_dozen_prompts_or_more_each():
    assert 750 <= len(ROWS) <= 900
    assert len(KINDS) >= 55
    assert {n for n in KINDS.values() if not 12 <= n <= 16} == set()


def test_no_prompt_stands_there_twice():
    assert [text for text, n in Counter(alike(r["text"]) for r in ROWS).items() if n > 1] == []


def test_a_fifth_is_in_other_languages_and_every_kind_has_some():
    languages = Counter(row["language"] for row in ROWS)
    assert 0.16 < 1 - languages["en"] / len(ROWS) < 0.24
    assert len(languages) >= 15
    assert {r["kind"] for r in ROWS if r["language"] != "en"} == KINDS.keys()


@pytest.mark.parametrize("rounds", [1, 2, 5, 8])
def test_the_first_rows_hold_every_kind_equally_often(rounds):
    some = ROWS[: rounds * len(KINDS)]
    assert Counter(row["kind"] for row in some) == dict.fromkeys(KINDS, rounds)
    assert 0.1 < sum(row["language"] != "en" for row in some) / len(some) < 0.3


def test_lengths_run_from_a_few_words_to_a_page():
    lengths = [len(row["text"].split()) for row in ROWS if row["language"] == "en"]
    assert sum(n <= 6 for n in lengths) > 50
    assert sum(n >= 30 for n in lengths) > 50
    pages = [len(r["text"].split()) for r in ROWS if r["kind"] == "long texts"]
    assert min(pages) >= 150
    assert max(pages) <= 300


def test_no_prompt_is_one_of_a_behaviour():
    kept = {alike(row["text"]) for row in ROWS}
    for name in behaviours():
        section = load_config(behaviour=name).prompts
        sources = [value for _, value in section if isinstance(value, PromptSource)]
        for source in sources:
            if Path(source.source).is_file():
                assert kept.isdisjoint(alike(p.text) for p in read_prompts(source)), source


def test_nothing_asks_the_model_to_act():
    asked = [row["text"] for row in ROWS if alike(row["text"]).startswith(ACTS)]
    assert asked == []
