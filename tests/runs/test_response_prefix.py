"""What responses begin with: the majority's beginning, on a model that has one."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import builders
import pytest
import torch
from conftest import job
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import AddedToken

from excise.checkpoints.loading import Loaded
from excise.cli import main as cli
from excise.model.anatomy import describe
from excise.prompts.measured_sets import LONGEST, Opening
from excise.runs import response_prefix
from excise.runs.response_prefix import (
    find_opening,
    given_opening,
    shared_beginning,
    spoken_part,
)
from excise.runs.run_folder import read_opening

STEADY = settings(derandomize=True, deadline=None)
ROWS = st.lists(st.lists(st.integers(0, 2), max_size=6).map(tuple), min_size=1, max_size=8)


@STEADY
@given(ROWS, ROWS)
def test_the_beginning_is_the_longest_that_a_majority_of_each_side_shares(target, contrast):
    found = tuple(shared_beginning({"target": target, "contrast": contrast}, frozenset()))

    def shared(start):
        sides = (target, contrast)
        return all(2 * sum(r[: len(start)] == start for r in rows) > len(rows) for rows in sides)

    assert shared(found)
    assert not any(shared((*found, token)) for token in range(3))


def test_a_beginning_holds_no_end_token_and_is_no_one_sided_habit():
    rows = [(5, 1)] * 4
    assert shared_beginning({"target": rows, "contrast": rows}, frozenset({1})) == [5]
    sorry, plain = [(7, 8, 9)] * 4, [(5, 6)] * 4
    assert shared_beginning({"target": sorry, "contrast": plain}, frozenset()) == []
    half = [(7, 8), (7, 8), (5,), (6,)]
    assert shared_beginning({"target": half, "contrast": half}, frozenset()) == []


# -- a model whose responses begin with what it is told to -----------------------------------------


def thinking_tokenizer():
    tokenizer = builders.tokenizer()
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    return tokenizer


def habitual(*texts: str, seed: int = 1) -> Loaded:
    """A random Qwen3 that begins its responses with these tokens, in this order, whatever it reads.

    The head is made to follow each of them with the next; what comes after the last one depends on
    the prompt.
    """
    tokenizer = thinking_tokenizer()
    model = builders.model("qwen3", seed, vocab_size=len(tokenizer), tie_word_embeddings=False)
    chain = [tokenizer.convert_tokens_to_ids("<|assistant|>")]
    for text in texts:
        chain += tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(set(chain)) == len(chain), "a token can have one successor only"
    table = model.model.embed_tokens.weight
    for token in chain[:-1]:
        table[token] = table[token] / table[token].norm() * 200  # outweighs what the layers add
    gain = model.model.norm.weight
    for token, successor in pairwise(chain):
        model.lm_head.weight[successor] = 100 * table[token] / table[token].norm() / gain
    return Loaded(model, tokenizer, describe(model), "habit", None, Path(), torch.float32)


def prompts(loaded, count=12):
    end = loaded.tokenizer.convert_tokens_to_ids("<|assistant|>")
    rows = [[*row, end] for row in builders.token_ids(2 * count)]
    return {"target": rows[:count], "contrast": rows[count:]}


def found(loaded, thinking=False, shows=lambda text: False):
    return find_opening(loaded, prompts(loaded), thinking=thinking, shows=shows)


def spell(loaded, ids):
    return loaded.tokenizer.decode(ids)


def test_an_empty_thinking_block_is_found_and_is_not_part_of_the_answer():
    loaded = habitual("<think>", "</think>")
    opening = found(loaded)
    assert spell(loaded, opening.ids) == "<think></think>"
    assert opening.spoken == ()
    assert opening.shares == {"target": 1.0, "contrast": 1.0}
    assert "100 % of target and 100 % of contrast" in opening.note
    assert Opening.from_dict(json.loads(json.dumps(opening.as_dict()))) == opening


def test_words_that_all_responses_begin_with_are_judged_with_them():
    loaded = habitual("I am")
    opening = found(loaded)
    assert spell(loaded, opening.ids).startswith("I am")
    assert opening.spoken == opening.ids
    assert "I am" not in opening.note  # a response's text is not for records


def test_what_shows_the_behaviour_is_left_in_the_responses():
    loaded = habitual("<think>", "</think>", "I am")
    opening = found(loaded, shows=lambda text: "I am" in text)
    assert spell(loaded, opening.ids) == "<think></think>I a"
    assert spell(loaded, opening.spoken) == "I a"


def test_a_block_that_most_responses_open_is_closed():
    loaded = habitual("<think>", "so it")
    opening = found(loaded)
    assert spell(loaded, opening.ids).startswith("<think>\n\n</think>\n\n")
    assert "close the thinking block" in opening.note
    kept = found(loaded, thinking=True)
    assert spell(loaded, kept.ids) == "<think>so it"


@pytest.mark.parametrize(("text", "looks"), [("I am", [8]), ("abcdefghijklm", [8, LONGEST])])
def test_more_tokens_are_decoded_only_where_the_first_are_all_shared(text, looks, monkeypatch):
    limits, begin = [], response_prefix._begin

    def beginning(loaded, prompts, ids, limit):
        limits.append(limit)
        return begin(loaded, prompts, ids, limit)

    monkeypatch.setattr(response_prefix, "_begin", beginning)
    loaded = habitual(text)
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert list(found(loaded).ids[: len(ids)]) == ids
    assert limits == looks
    monkeypatch.setattr(response_prefix, "_FIRST", LONGEST)
    whole = found(loaded)
    monkeypatch.undo()
    assert found(loaded) == whole


def test_responses_that_never_differ_have_no_beginning():
    loaded = habitual("abcdefghijklmnopqrstuvwxyzABCDE")
    assert len(loaded.tokenizer("abcdefghijklmnopqrstuvwxyzABCDE")["input_ids"]) > LONGEST
    assert found(loaded) == Opening()


def test_the_opening_by_hand():
    tokenizer = thinking_tokenizer()
    opening = given_opening(tokenizer, "<think></think>Well")
    assert tokenizer.decode(opening.ids) == "<think></think>Well"
    assert tokenizer.decode(opening.spoken) == "Well"
    assert given_opening(tokenizer, "") == Opening()


def test_a_thinking_tag_in_plain_tokens_is_markup_too():
    tokenizer = builders.tokenizer()
    ids = tokenizer("<think>\n\n</think>\n\nWell", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(spoken_part(tokenizer, ids)).strip() == "Well"
    assert spoken_part(tokenizer, ids[: -len("Well")]) == ()


# -- whole runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def habit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("habit")
    loaded = habitual("<think>", "</think>", "I")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def run_job(tiny, out, model, *more):
    arguments = job(tiny, out, *more)
    arguments[1] = str(model)
    assert cli.main(arguments) == 0
    return json.loads((out / "record.json").read_text())


def test_a_run_measures_after_the_opening_and_its_export_too(tiny, habit, tmp_path, capsys):
    out = tmp_path / "run"
    record = run_job(tiny, out, habit)
    opening = record["formatting"]["opening"]
    tokenizer = thinking_tokenizer()
    assert tokenizer.decode(opening["ids"]).startswith("<think></think>I")
    spoken = tokenizer.decode(opening["spoken"])
    assert tokenizer.decode(opening["ids"]) == f"<think></think>{spoken}"
    assert all(sample["before"].startswith(spoken) for sample in record["samples"])
    assert read_opening(out / "directions.safetensors").ids == tuple(opening["ids"])
    (artifact,) = record["artifacts"]
    for name, score in artifact["expected"].items():
        assert artifact["measured"][name]["value"] == pytest.approx(score["value"], abs=0.02)
    capsys.readouterr()
    assert cli.main(["resume", str(out), "--trials", "16", "--quiet"]) == 0
    again = tmp_path / "again"
    assert cli.main(["export", str(out), "--to", str(again), "--quiet"]) == 0
    assert "end every prompt" in (again / "README.md").read_text()
    assert "end every prompt" in (out / "report.html").read_text()
    with safe_open(out / "directions.safetensors", framework="pt") as file:
        unit = file.get_tensor("unit")
    bare = tmp_path / "bare"
    run_job(tiny, bare, habit, "--set", 'prompts.response_prefix=""')
    with safe_open(bare / "directions.safetensors", framework="pt") as file:
        assert not torch.allclose(unit, file.get_tensor("unit"))


def test_a_resume_with_another_template_is_refused(tiny, habit, tmp_path, capsys):
    out = tmp_path / "run"
    file = tmp_path / "template.jinja"
    file.write_text(builders.TEMPLATE)
    run_job(tiny, out, habit, "--chat-template", str(file), "--set", "export.formats=[]")
    file.write_text(builders.TEMPLATE + " ")
    capsys.readouterr()
    assert cli.main(["resume", str(out), "--trials", "16", "--quiet"]) == 2
    assert "template differ" in capsys.readouterr().err


def test_evaluate_measures_after_the_opening_of_the_base(tiny, habit, tmp_path, capsys):
    edited = Path(shutil.copytree(habit, tmp_path / "edited"))
    arguments = job(tiny, tmp_path)[4:14]
    assert cli.main(["evaluate", str(habit), str(edited), *arguments, "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["search"]["edited"]["drift"]["value"] == pytest.approx(0, abs=1e-6)
