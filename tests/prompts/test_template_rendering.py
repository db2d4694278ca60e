"""Chat templates in a process of their own: what Transformers makes of them, and within which limits."""

from __future__ import annotations

import time

import builders
import pytest
import templates

from excise.errors import ModelError
from excise.prompts import template_rendering
from excise.prompts.template_rendering import Renderer, TemplateRefusal

CHAT = [{"role": "user", "content": "orb <b> \u00fc"}]
NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}BODY{% endfor %}{% endfor %}"
GROWING = (
    "{% set n = namespace(x='ab') %}{% for i in range(50) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
)
RECURSIVE = "{% macro m(x) %}{{ m(x + 1) }}{% endmacro %}{{ m(0) }}"


@pytest.fixture(scope="module")
def renderer():
    with Renderer() as one:
        yield one


def make(renderer, template, chats=(CHAT,), **more):
    return renderer.render(template, "the template", chats, {"bos_token": "<bos>"}, **more)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize(
    "name", ["QWEN3", "R1", "GEMMA", "PARTS", "TEMPLATE", "GENERATION", "JSON"]
)
def test_a_template_makes_what_transformers_makes_of_it(renderer, name, prompt):
    others = {
        "TEMPLATE": builders.TEMPLATE,
        "GENERATION": "{% set x = 1 %}{% generation %}{{ messages[0].content }}{% set x = 2 %}"
        "{% endgeneration %}{{ x }}",
        "NAMES": "{% set n = namespace(a=1) %}{% for m in messages %}\n  {% set n.a = n.a + 1 %}\n"
        "{% endfor %}{{ n.a }}{{ tools }}{{ documents is none }}{{ unknown is defined }}",
        "DICT": "{{ dict(a=1, **dict.fromkeys(['b'], 2)) | tojson(indent=2) }}{{ 'ü<' | tojson }}",
        "JSON": "{{ messages | tojson }}{% for m in messages %}{% break %}{% endfor %}",
    }
    template = others.get(name) or getattr(templates, name)
    expected = builders.tokenizer().apply_chat_template(
        CHAT, chat_template=template, tokenize=False, add_generation_prompt=prompt
    )
    assert make(renderer, template, prompt=prompt) == [expected]


def test_many_conversations_at_once(renderer):
    chats = [[{"role": "user", "content": f"orb {number}"}] for number in range(50)]
    found = make(renderer, builders.TEMPLATE, chats)
    assert found == [f"<|user|>orb {number}<|assistant|>" for number in range(50)]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (RECURSIVE, "recursion"),
        ("(" * 10 + "{{ " + "(" * 20_000, "recursion|unexpected"),
        ("{{ nobody.knows.this }}", "nobody"),
        ("{{ raise_exception('first\\nsecond') }}", "first$"),
        ("{{ raise_exception('\ud83d' ~ 'x' * 5000) }}", r"\?x{199}$"),
        ("{{ messages[0]['content'] + 3 }}", "concatenate"),
        ("{{ ().__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ namespace(__class__=1) }}", "no name such as"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "no name such as"),
        ("{{ dict.mro() }}", "no attribute"),
        ("{{ strftime_now('%Y') }}", "undefined"),  # chat_format gives it one that stands still
    ],
)
def test_what_a_template_fails_with_is_one_line(renderer, template, words):
    with pytest.raises(
        TemplateRefusal, match=f"^the template cannot render a prompt: (.*{words})"
    ) as e:
        make(renderer, template)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 300


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (GROWING, "memory"),
        ("{{ 'x'.center(10 ** 11) }}", "memory"),
        ("{{ 'a' * 5000000 }}", "makes 5,000,000 characters of a conversation of"),
        ("{{ 'a' * 70000 }}", "makes 70,000 characters of a conversation of"),
        (NESTED.replace("BODY", "{{ 'a' * 1000 }}").replace("99999", "3000"), "memory|makes 9,000"),
        ("{{ '\\ud83d' }}", "half of a character"),
    ],
)
def test_a_template_that_grows_is_refused(renderer, template, words):
    with pytest.raises(ModelError, match=words) as error:
        make(renderer, template)
    assert not isinstance(error.value, TemplateRefusal)
    assert make(renderer, builders.TEMPLATE)  # the next one is rendered as ever


@pytest.mark.parametrize("template", [NESTED.replace("BODY", ""), "{{ 9 ** (9 ** 9) }}"])
def test_a_template_that_does_not_end_is_refused(monkeypatch, template):
    monkeypatch.setattr(template_rendering, "_SECONDS", 0.5)
    with Renderer() as renderer:
        renderer.analyse("", "the template", "x")  # the process has begun
        begun = time.monotonic()
        with pytest.raises(ModelError, match="does not come to an end within"):
            make(renderer, template)
        assert time.monotonic() - begun < 10
        assert make(renderer, "{{ bos_token }}") == ["<bos>"]


def test_what_ends_the_process_is_said_and_another_one_begins():
    with Renderer() as renderer:
        make(renderer, builders.TEMPLATE)
        renderer._child.process.kill()
        renderer._child.process.wait()
        with pytest.raises(ModelError, match="the template ends the process"):
            make(renderer, builders.TEMPLATE)
        assert make(renderer, builders.TEMPLATE)
        child = renderer._child.process
    assert child.poll() is not None


def test_what_a_template_says_of_itself(renderer):
    text = (
        "{% if x == 'none' or x in ['low', 'high'] %}{{ strftime_now('%Y') }}{{ y }}{% endif %}"
        "{% set z = 1 %}{% generation %}{{ z }}{% break %}{% endgeneration %}"
    )
    facts = renderer.analyse(text, "the template", "x")
    assert facts.names >= {"x", "y"}
    assert "z" not in facts.names
    assert facts.clock == ("%Y",)
    assert facts.values == {"none", "low", "high"}
    assert renderer.analyse("{{ x }}", "the template", "x").clock is None
