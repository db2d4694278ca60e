"""How prompts are put to models of several kinds: templates written small, in each family's manner."""

from __future__ import annotations

import datetime
import json

import builders
import pytest
from templates import GEMMA, GPT_OSS, PARTS, QWEN3, QWEN3_THINKING, R1

from excise.config import PromptSection
from excise.errors import ModelError
from excise.prompts.chat_template import ChatFormat, after_thinking, choose_format, close_thinking
from excise.prompts.template_rendering import Renderer
from excise.prompts.template_sources import read_template


@pytest.fixture(scope="module")
def renderer():
    with Renderer() as one:
        yield one


@pytest.fixture(scope="module")
def put(renderer):
    """Renders a prompt with a tokenizer that has a template; gives the chat_format as well."""

    def render(template, text="orb", **section):
        tokenizer = builders.tokenizer()
        tokenizer.chat_template = template
        chat_format = choose_format(tokenizer, PromptSection(**section), renderer)
        return chat_format.render(renderer, [text])[0], chat_format

    return render


def test_qwen3_thinking_is_switched_off_by_the_templates_own_variable(put):
    text, chat_format = put(QWEN3)
    assert text == "<|im_start|>user\norb<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert chat_format.variables == {"enable_thinking": False}
    assert chat_format.header == ""
    assert "enable_thinking=false" in chat_format.notes[0]
    text, chat_format = put(QWEN3, thinking=True)
    assert text.endswith("<|im_start|>assistant\n")
    assert chat_format.variables == {"enable_thinking": True}


@pytest.mark.parametrize(
    ("line", "variables"),
    [
        (
            "{% if not thinking is defined %}{% set thinking = true %}{% endif %}",
            {"thinking": False},
        ),
        ("{% set enable_thinking = enable_thinking | default(true) %}", {"enable_thinking": False}),
        ("{% if thinking_budget is defined %}{% endif %}", {"thinking_budget": 0}),
        ("{% if reasoning_effort == 'none' %}{% endif %}", {"reasoning_effort": "none"}),
        ("{% if reasoning_effort in ['none', 'high'] %}{% endif %}", {"reasoning_effort": "none"}),
        ("{% if reasoning_effort == 'low' %}{% endif %}", {}),
        ("{% set thinking = true %}", {}),  # the template's own, not ours to set
        ("{% for m in messages %}{{ m.thinking }}{% endfor %}", {}),
        ("{% for m in messages %}{% generation %}{% endgeneration %}{% break %}{% endfor %}", {}),
    ],
)
def test_which_variables_are_switches(put, line, variables):
    assert put(line + builders.TEMPLATE)[1].variables == variables


def test_a_template_that_opens_a_thinking_block_has_it_closed(put):
    text, chat_format = put(R1)
    assert text == "<bos><|User|>orb<|Assistant|><think>\n\n</think>\n\n"
    assert chat_format.header == "\n</think>\n\n"
    assert "</think>" in chat_format.notes[0]
    text, chat_format = put(R1, thinking=True)
    assert text.endswith("<|Assistant|><think>\n")
    assert (chat_format.header, chat_format.notes) == ("", ())


def test_a_template_that_shows_how_its_block_is_closed_is_followed(put):
    text, chat_format = put(QWEN3_THINKING)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert chat_format.header == "\n</think>\n\n"


def test_channels_begin_in_the_final_one_and_the_clock_stands_still(put):
    text, chat_format = put(GPT_OSS, date="2024-02-29")
    assert text.endswith("<|end|><|start|>assistant<|channel|>final<|message|>")
    assert text.startswith("<|start|>system<|message|>Current date: 2024-02-29\nReasoning: medium")
    assert chat_format.header == "<|channel|>final<|message|>"
    assert chat_format.variables == {}  # no effort of its switches thinking off
    assert any("2024-02-29" in note for note in chat_format.notes)
    today = put(GPT_OSS.replace('strftime_now("%Y-%m-%d")', '"%d" + strftime_now("%d %B %Y")'))[0]
    assert "Current date: %d01 January 2025" in today
    assert put(GPT_OSS, thinking=True)[0].endswith("<|start|>assistant")


def test_a_template_that_refuses_a_system_role_gets_it_in_the_users_turn(put):
    assert put(GEMMA)[0] == "<bos><start_of_turn>user\norb<end_of_turn>\n<start_of_turn>model\n"
    text, chat_format = put(GEMMA, system="be brief")
    assert text == (
        "<bos><start_of_turn>user\nbe brief\n\norb<end_of_turn>\n<start_of_turn>model\n"
    )
    assert chat_format.folded
    assert "no system turn" in chat_format.notes[0]
    assert "be brief" not in str(chat_format.as_dict())


def test_a_template_that_drops_a_system_role_in_silence_gets_it_in_the_users_turn(put):
    silent = "{% for m in messages if m.role != 'system' %}{{ m.content }}>{% endfor %}"
    assert put(silent, system="be brief")[0] == "be brief\n\norb>"


def test_a_template_that_wants_parts_gets_them(put):
    text, chat_format = put(PARTS, system="be brief")
    assert text == "<system>be brief<user>orb<assistant>"
    assert chat_format.listed


NEEDS_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + builders.TEMPLATE
)


def test_a_template_that_needs_a_system_turn_is_given_one(put):
    assert put(NEEDS_SYSTEM, system="be brief")[0] == "<|system|>be brief<|user|>orb<|assistant|>"
    with pytest.raises(ModelError, match=r"needs a system turn: give one, --set prompts\.system"):
        put(NEEDS_SYSTEM)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 'always the same' }}", "leaves out the text of prompts"),
        ("{{ messages | length }}", "leaves out the text of prompts"),
        ("{{ messages[0].content | upper }}", "leaves out the text of prompts"),
        # one that does well on short prompts
        ("{{ messages[0].content[:40] }}", "leaves out the text of prompt 1, 'what colour is the"),
    ],
)
def test_a_template_that_leaves_out_the_prompt_is_refused(put, template, words):
    with pytest.raises(ModelError, match=words):
        put(template, text="what colour is the kettle " * 5)


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        ("[{{ messages[0].content | trim }}]", "[a <b>  'c'\n\"d\" ü]"),
        ("[{{ messages[0].content.split() | join(' ') }}]", "[a <b> 'c' \"d\" ü]"),
        ("[{{ messages[0].content | e }}]", "[ a &lt;b&gt;  &#39;c&#39;\n&#34;d&#34; ü ]"),
        ("{{ messages[0].content | tojson }}", '" a <b>  \'c\'\\n\\"d\\" ü "'),
    ],
)
def test_a_template_may_trim_and_escape(put, template, rendered):
    assert put(template, text=" a <b>  'c'\n\"d\" ü ")[0] == rendered


def test_the_clocks_formats_may_be_of_no_kind(put):
    text = "{{ strftime_now('%') }}{{ strftime_now('\\ud800') }}{{ strftime_now('a\\0') }}!"
    assert "!" in put(text + builders.TEMPLATE)[0]


def test_a_header_of_white_space_only_is_left_to_the_model(put):
    template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert put(template)[0] == "[user] orb[assistant]"


def test_a_template_from_a_file_and_from_other_models(renderer, tmp_path):
    tokenizer = builders.tokenizer()
    file = tmp_path / "gemma.jinja"
    file.write_text(GEMMA)
    chat_format = choose_format(tokenizer, PromptSection(chat_template=str(file)), renderer)
    assert chat_format.render(renderer, ["orb"])[0].startswith("<bos><start_of_turn>user")
    assert chat_format.origin == "chat template gemma.jinja"
    assert "gemma.jinja" in chat_format.notes[0]
    assert str(tmp_path) not in str(chat_format.as_dict())
    for name in ("whole", "bare"):
        folder = tmp_path / name
        tokenizer.chat_template = R1
        tokenizer.save_pretrained(folder)
        if name == "bare":
            for other in folder.iterdir():
                if other.suffix != ".jinja":
                    other.unlink()
        assert read_template(str(folder)) == (R1, f"chat template of {name}")


def test_a_models_own_template_is_read_however_it_is_kept(renderer, tmp_path):
    bare, section = builders.tokenizer(), PromptSection()
    bare.chat_template = None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": R1}))
    chat_format = choose_format(bare, section, renderer, tmp_path)
    assert chat_format.template == R1
    assert chat_format.origin == "the model's chat_template.json"
    for kept in ("\ufeff" + R1, json.dumps({"chat_template": R1})):
        tokenizer = builders.tokenizer()
        tokenizer.chat_template = kept
        (text,) = choose_format(tokenizer, section, renderer, tmp_path).render(renderer, ["orb"])
        assert text == "<bos><|User|>orb<|Assistant|><think>\n\n</think>\n\n"


def test_a_base_model_can_be_given_a_template(renderer):
    base = builders.tokenizer()
    base.chat_template = None
    plain = choose_format(base, PromptSection(), renderer)
    assert plain.render(renderer, ["orb"]) == ["Question: orb\nAnswer:"]
    assert "plain format" in plain.notes[0]


def test_a_template_that_is_not_there(tmp_path):
    empty = tmp_path / "empty"
    tokenizer = builders.tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(empty)
    binary = tmp_path / "binary.jinja"
    binary.write_bytes(b"\xff\xfe")
    for source, words in (
        (str(tmp_path / "none.jinja"), "neither a file nor"),
        ("none", "neither a file nor"),
        ("nobody/nothing", "no chat template in nobody/nothing"),
        (str(empty), "no chat template in"),
        (str(binary), "is not UTF-8"),
    ):
        with pytest.raises(ModelError, match=words) as error:
            read_template(source)
        assert "\n" not in str(error.value)


def test_several_named_templates(renderer):
    tokenizer = builders.tokenizer()
    tokenizer.chat_template = {"default": builders.TEMPLATE, "tool_use": "tools"}
    chat_format = choose_format(tokenizer, PromptSection(), renderer)
    assert chat_format.render(renderer, ["orb"]) == ["<|user|>orb<|assistant|>"]
    tokenizer.chat_template = {"rag": builders.TEMPLATE}
    with pytest.raises(ModelError, match="multiple chat templates"):
        choose_format(tokenizer, PromptSection(), renderer)


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("<think>", "\n\n</think>\n\n"),
        ("a<think>\n", "\n</think>\n\n"),
        ("<think>\n\n", "</think>\n\n"),
        ("[THINK]", "[/THINK]"),
        ("<|channel>thought", "\n<channel|>"),
        ("<think>\n\n</think>\n\n", ""),
        ("<think>so", ""),
        ("plain", ""),
    ],
)
def test_closing_a_block(text, rest):
    assert close_thinking(text) == rest


def test_what_comes_after_markup():
    assert after_thinking("<think>\n\n</think>\n\nSure") == "\n\nSure"
    assert after_thinking("Sure") == "Sure"


def test_the_date_is_a_date():
    assert PromptSection(date="2024-02-29").date == datetime.date(2024, 2, 29)


def test_a_conversation_in_the_plain_format():
    plain = ChatFormat(None, "plain format", "Be brief.")
    (text,) = plain.conversations(None, [["who made it?", " the smith", "and when?"]])
    assert text == (
        "Be brief.\n\nQuestion: who made it?\nAnswer: the smith\n\nQuestion: and when?\nAnswer:"
    )
    (one,) = plain.conversations(None, [["who made it?"]])
    assert [one] == plain.render(None, ["who made it?"])
