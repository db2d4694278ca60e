"""Conversations: what each column has heard and said, and how it is put to the model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from excise.chat.conversation import Chat, Manner
from excise.chat.opened_run import Point, default_points, open_run, points_of
from excise.chat.run_so_far import run_so_far
from excise.chat.sampling import Sampling
from excise.engine.requests import Responses
from excise.engine.stacking import ORIGINAL
from excise.errors import ModelError, PromptError, RunStateError

SHORT = Manner(sampling=Sampling(limit=4))


@pytest.fixture(scope="module")
def run(tiny_run):
    return open_run(tiny_run, run_so_far(tiny_run))


@pytest.fixture
def chat(run):
    with Chat(run, [Point(), Point(2), Point(7)], SHORT) as chat:
        yield chat


def heard(chat, message):
    *_, last = chat.say(message)
    return last


def test_points_say_what_the_search_heard(run, chat):
    """The same prompts, edits and weights as of the search's engine, so the same responses."""
    prompts = run.session.sets.part("search")["target"].prompts[:3]
    engine = run.session.engine("search", run_plan(run))
    edits = [ORIGINAL, run.edits(Point(2)), run.edits(Point(7))]
    evidence = engine.measure(edits, [Responses("target")], {"target": 3})
    for number, prompt in enumerate(prompts):
        chat.clear()
        expected = [one.responses["target"][number].text for one in evidence]
        assert [reply.text for reply in heard(chat, prompt.text)] == expected


def run_plan(run):
    from excise.engine.batch_sizing import from_dict

    return from_dict(run.record.engine).plan


def test_each_column_hears_its_own_answers(chat, run):
    first = heard(chat, "who made the orb")
    second = heard(chat, "and the kettle?")
    assert [turn.message for turn in chat.turns] == ["who made the orb", "and the kettle?"]
    tokenizer = run.session.loaded.tokenizer
    for point, before, after in zip(chat.points, first, second, strict=True):
        messages = [
            {"role": "user", "content": "who made the orb"},
            {"role": "assistant", "content": before.text},
            {"role": "user", "content": "and the kettle?"},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        with Chat(run, [point], SHORT) as alone:
            opening = run.session.sets.opening.ids
            ids = (*tokenizer(text, add_special_tokens=False)["input_ids"], *opening)
            *_, ((answer,)) = alone.columns.answer([ids], SHORT.sampling, 1)
        assert after.tokens == len(answer.tokens)
        assert after.first[0][1] == pytest.approx(answer.first[0][1], rel=1e-3)


def test_the_last_message_once_more(chat):
    cold = heard(chat, "who made the orb")
    *_, again = chat.again()
    assert [reply.text for reply in again] == [reply.text for reply in cold]  # greedy
    assert len(chat.turns) == 1
    chat.manner = replace(SHORT, sampling=Sampling(temperature=2.0, limit=4))
    *_, third = chat.again()
    *_, fourth = chat.again()
    assert len({tuple(reply.text for reply in said) for said in (third, fourth, cold)}) == 3
    chat.clear()
    with pytest.raises(PromptError, match="nothing was said"):
        chat.again()


def test_a_stopped_reply_is_kept_as_far_as_it_came(chat):
    stream = chat.say("who made the orb")
    replies = next(stream)
    assert replies[0].open
    stream.close()
    ((turn),) = chat.turns
    assert [reply.tokens for reply in turn.replies] == [reply.tokens for reply in replies]
    assert not any(reply.open for reply in turn.replies)
    assert heard(chat, "go on")


def test_another_manner_counts_from_the_next_message_on(chat):
    heard(chat, "who made the orb")
    chat.manner = replace(chat.manner, system="be brief")
    changed = heard(chat, "who made the orb")
    assert chat.turns[0].manner.system is None
    assert chat.turns[1].as_dict()["system"] == "be brief"
    chat.clear()
    chat.manner = SHORT
    assert [r.first for r in heard(chat, "who made the orb")] != [r.first for r in changed]


def test_what_was_said_as_lines_of_json(chat, tmp_path):
    for message in ("who made the orb", "wo steht die Lampe?\n\ud83d"):  # half of a character
        heard(chat, message)
    chat.save(tmp_path / "talk.jsonl")
    lines = (tmp_path / "talk.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [turn.as_dict() for turn in chat.turns]
    first = json.loads(lines[0])
    assert {"message", "replies", "system", "thinking", "temperature", "limit", "seed"} == set(
        first
    )
    assert [reply["trial"] for reply in first["replies"]] == [None, 2, 7]
    shares = [entry["probability"] for entry in first["replies"][0]["first"]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 1.001


def test_messages_that_cannot_be_put(chat, run, monkeypatch):
    with pytest.raises(PromptError, match="empty"):
        heard(chat, " \n")
    text = run.session.loaded.model.config.get_text_config()
    monkeypatch.setattr(text, "max_position_embeddings", 12)
    with pytest.raises(PromptError, match="begin a new one"):
        heard(chat, "who made the orb " * 9)
    monkeypatch.undo()
    assert not chat.turns
    tokenizer = run.session.loaded.tokenizer
    refusing = "{% if messages|length > 1 %}{{ raise_exception('one question only') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", refusing + tokenizer.chat_template)
    with Chat(run, [Point()], SHORT) as strict:
        heard(strict, "who made the orb")
        with pytest.raises(ModelError, match="one question only"):
            heard(strict, "and the kettle")
        assert len(strict.turns) == 1


def test_other_points_begin_a_new_conversation(chat, run):
    heard(chat, "who made the orb")
    chat.choose([Point(5)])
    assert not chat.turns
    assert [reply.name for reply in heard(chat, "who made the orb")] == ["trial 5"]
    with pytest.raises(RunStateError, match="no trial 99"):
        chat.choose([Point(99)])


def test_points_that_are_asked_for(run):
    record = run.record
    assert (
        points_of(record, [], base=False)
        == default_points(record)
        == [Point(), Point(record.selected)]
    )
    assert points_of(record, [3, 1, 3], base=True) == [Point(), Point(3), Point(1)]
    assert points_of(record, [], base=True) == [Point()]
    with pytest.raises(RunStateError, match="no trial -1"):
        points_of(record, [-1], base=False)


def test_a_run_that_is_still_searched_can_be_talked_to(tiny_run, tmp_path, run):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / "record.json").unlink()
    before = sorted(path.name for path in folder.iterdir())
    opened = open_run(folder, run_so_far(folder))
    pairs = zip(opened.edits(Point(2)), run.edits(Point(2)), strict=True)
    assert all(a is b or bool((a.left == b.left).all()) for a, b in pairs)
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("name", ["directions.safetensors", "config.toml"])
def test_a_run_whose_files_have_changed_is_refused(tiny_run, tmp_path, name):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / name).write_bytes(b"another")
    with pytest.raises(RunStateError, match=name):
        open_run(folder, run_so_far(folder))
