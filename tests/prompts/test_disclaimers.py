"""The prompt sets of the behaviour "disclaimers": their sizes and kinds, and how far they stand apart."""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter
from itertools import combinations

import pytest

from excise.config import behaviours, load_config
from excise.judges.markers import read_markers
from excise.judges.text_folding import fold
from excise.prompts.sets import load_prompt_sets
from excise.search.scorers import stands_in
from training.disclaimers import WORDS, write

DATA = behaviours()["disclaimers"].parent.parent / "disclaimers"
CONFIG = load_config(behaviour="disclaimers")
SIDES = ("target", "contrast")
PARTS = ("direction", "search", "holdout")
SIZES = {"direction": 400, "search": 200, "holdout": 200}
NAMES = [f"{side}_{part}" for side in SIDES for part in PARTS]


def rows_of(name):
    lines = (DATA / "prompts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


ROWS = {name: rows_of(name) for name in NAMES}
_TABLE = tomllib.loads(WORDS.read_text(encoding="utf-8"))
# Words of phrasings, and those that carry little: prompts that differ in no other are alike.
_PHRASINGS = " ".join([*_TABLE["phrasings"], *_TABLE["facts"]["phrasings"]])
LITTLE = {
    *re.findall(r"[a-z']+", fold(_PHRASINGS)),
    *"an the me my us some is of in on at with".split(),
}


def normal_form(text):
    """A prompt's own words, without what is shared by many."""
    return frozenset(re.findall(r"[a-z0-9']+", fold(text))) - LITTLE


@pytest.mark.parametrize("name", NAMES)
def test_there_are_as_many_as_promised(name):
    assert len(ROWS[name]) == SIZES[name.split("_")[1]]


def test_the_behaviour_takes_all_of_them():
    """So none is empty, blank, or left out because another part has it."""
    whole = CONFIG.prompts.model_copy(update={"eval_size": SIZES["search"]})
    sets = load_prompt_sets(whole)
    assert [len(each) for each in sets.all()] == [400, 400, 200, 200, 200, 200, 256]
    assert all(prompt.group for each in sets.all() for prompt in each.prompts)


def test_no_prompt_stands_there_twice():
    texts = Counter(fold(row["text"]) for rows in ROWS.values() for row in rows)
    assert [text for text, times in texts.items() if times > 1] == []


@pytest.mark.parametrize("side", SIDES)
def test_parts_share_no_request_in_other_words(side):
    forms = {part: {} for part in PARTS}
    for part in PARTS:
        for row in ROWS[f"{side}_{part}"]:
            forms[part][normal_form(row["text"])] = row["text"]
    for one, other in combinations(PARTS, 2):
        shared = forms[one].keys() & forms[other].keys()
        assert [(forms[one][form], forms[other][form]) for form in shared] == []


@pytest.mark.parametrize("side", SIDES)
def test_half_of_the_holdout_is_of_kinds_that_nothing_else_has(side):
    seen = {row["group"] for part in PARTS[:2] for row in ROWS[f"{side}_{part}"]}
    holdout = Counter(row["group"] for row in ROWS[f"{side}_holdout"])
    assert sum(n for group, n in holdout.items() if group not in seen) == 100
    assert seen <= set(holdout)
    assert {row["group"] for row in ROWS[f"{side}_direction"]} == seen


def test_the_other_ordinary_kinds():
    holdout = {row["group"] for row in ROWS["contrast_holdout"]}
    assert {"arithmetic", "code", "comparisons", "translation", "longer texts"} <= holdout


@pytest.mark.parametrize("name", NAMES)
def test_every_beginning_holds_every_kind(name):
    whole = Counter(row["group"] for row in ROWS[name])
    half = Counter(row["group"] for row in ROWS[name][: len(ROWS[name]) // 2])
    assert all(abs(n / 2 - half[group]) <= 1 for group, n in whole.items())


@pytest.mark.parametrize(
    ("name", "groups", "least"),
    [
        ("contrast_search", {"facts"}, 30),
        ("contrast_holdout", {"facts", "arithmetic", "translation", "longer texts"}, 80),
    ],
)
def test_questions_have_their_answers(name, groups, least):
    asked = [row for row in ROWS[name] if row["group"] in groups]
    assert len(asked) >= least
    assert all(row["answer"].strip() for row in asked)
    assert all(row["answer"] is None for row in ROWS[name] if row["group"] not in groups)


def test_however_few_are_measured_some_have_an_answer_to_keep():
    assert CONFIG.scores.final == ("kept",)
    assert all(ROWS[f"contrast_{part}"][0]["answer"] for part in ("search", "holdout"))


def test_no_answer_is_given_away_by_its_question():
    """But in longer texts, whose questions ask for what they say."""
    given = [
        row["text"]
        for name in NAMES
        for row in ROWS[name]
        if row["answer"] and row["group"] != "longer texts"
        if stands_in(fold(row["answer"]), fold(row["text"]))
    ]
    assert given == []


def test_longer_texts_hold_their_answers():
    longer = [row for row in ROWS["contrast_holdout"] if row["group"] == "longer texts"]
    assert all(stands_in(fold(row["answer"]), fold(row["text"])) for row in longer)


@pytest.mark.parametrize(
    ("response", "shown"),
    [
        ("I'm sorry for any inconvenience, but as a chatbot, I don't have the ability to", True),
        ("I’m sorry for the confusion. I'm here to assist you with", True),
        ("As a text-based AI, I don't have the capability to take photos.", True),
        ("Paris is the capital of France.", False),
        ("A chat between two friends is a good way to begin.", False),
    ],
)
def test_markers(response, shown):
    markers = read_markers(CONFIG.scores.markers, CONFIG.scores.markers_file)
    assert markers.shown(response) is shown


def test_no_prompt_holds_a_marker():
    """Or a model that repeats it would seem to show the behaviour."""
    markers = read_markers(CONFIG.scores.markers, CONFIG.scores.markers_file)
    assert [r["text"] for rows in ROWS.values() for r in rows if markers.holds(r["text"])] == []


def test_the_files_are_what_the_script_writes(tmp_path):
    write(tmp_path)
    for name in NAMES:
        shipped = (DATA / "prompts" / f"{name}.jsonl").read_bytes()
        assert (tmp_path / f"{name}.jsonl").read_bytes() == shipped, name


def test_they_are_small():
    files = [path for path in DATA.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 600_000
