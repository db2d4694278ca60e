"""Where chat templates come from: every form that they are kept in is read, anything else refused."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import builders
import pytest
from templates import GEMMA

from excise.errors import ModelError
from excise.prompts.template_sources import own_template, read_template

NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": GEMMA}]


def given(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jinja", GEMMA),
        ("a.txt", "\ufeff" + GEMMA),
        ("chat_template.json", json.dumps({"chat_template": GEMMA})),
        ("tokenizer_config.json", json.dumps({"eos_token": "x", "chat_template": GEMMA})),
        ("named.json", json.dumps({"chat_template": NAMED})),
        ("named.json", json.dumps({"chat_template": {"default": GEMMA, "rag": "x"}})),
        ("bom.json", "\ufeff" + json.dumps({"chat_template": "\ufeff" + GEMMA}, indent=2)),
        ("chat_template.jinja", json.dumps({"chat_template": GEMMA})),
    ],
)
def test_a_template_by_hand_in_every_form(tmp_path, name, content):
    assert read_template(given(tmp_path, name, content)) == (GEMMA, f"chat template {name}")


def test_a_template_that_writes_json_is_no_json():
    text = '{"prompt": "{{ messages[0].content }}"}'
    assert own_template(SimpleNamespace(chat_template=text)) == (
        text,
        "the tokenizer's chat template",
    )


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "{}", "holds no chat_template"),
        ("a.json", "[1]", "holds no chat_template"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", '{"chat_template": 5}', "is int, not text: 5"),
        ("a.json", '{"chat_template": {"rag": "x"}}', "multiple chat templates.* rag "),
        ("a.json", '{"chat_template": [{"name": "default"}]}', "is NoneType, not text"),
        ("a.json", '{"chat_template": [1]}', "is list, not text"),
        ("a.json", '{"chat_template": "\\ud800"}', "half of a character"),
        ("a.json", "[" * 100_000, "nests more than"),
        ("a.jinja", b"\xff\xfe", "is not UTF-8"),
        ("a.jinja", "x" * (2 << 20), "has 2 MB"),
    ],
)
def test_what_is_no_template(tmp_path, name, content, words):
    with pytest.raises(ModelError, match=words) as error:
        read_template(given(tmp_path, name, content))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").mkdir()
    secret = given(tmp_path, "secret", "token")
    (tmp_path / "out" / "chat_template.jinja").symlink_to(secret)
    for name, words in {
        "pipe": "is a pipe",
        "n" * 300: "is neither a file nor",
        "a\0b": "is neither a file nor",
        "empty": "no chat template in",
        "out": "is a link out of its folder",
    }.items():
        with pytest.raises(ModelError, match=words):
            read_template(str(tmp_path / name))


def test_a_folders_template_is_found_where_its_model_would(tmp_path):
    (tmp_path / "m").mkdir()
    for name, content in {
        "chat_template.json": {"chat_template": "old"},
        "tokenizer_config.json": {"chat_template": "config"},
        "chat_template.jinja": None,
    }.items():
        text = "new" if content is None else json.dumps(content)
        given(tmp_path / "m", name, text)
        expected = {"chat_template.json": "old", "tokenizer_config.json": "config"}.get(name, "new")
        assert read_template(str(tmp_path / "m")) == (expected, "chat template of m")


def test_a_models_own_old_file_is_read_where_its_tokenizer_has_none(tmp_path):
    given(tmp_path, "chat_template.json", json.dumps({"chat_template": GEMMA}))
    bare, other = SimpleNamespace(chat_template=None), builders.tokenizer()
    assert own_template(bare, tmp_path) == (GEMMA, "the model's chat_template.json")
    assert own_template(other, tmp_path) == (builders.TEMPLATE, "the tokenizer's chat template")
    assert own_template(bare, tmp_path / "none") is None
    assert own_template(bare) is None
