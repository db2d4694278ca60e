"""The licence is read of any card that a model comes with, within bounds, and never in the way."""

from __future__ import annotations

import time

import pytest

from excise.checkpoints.licence import licence_of, stated_in


def card(matter: str) -> str:
    return f"---\n{matter}\n---\n\n# A model\n"


@pytest.mark.parametrize(
    ("matter", "licence"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("\nlanguage: [en]\nlicense:   'mit'\ntags:\n- a", "mit"),
        ("license:\n- apache-2.0\n- mit", "apache-2.0, mit"),
        ("license: [cc-by-4.0, gfdl]", "cc-by-4.0, gfdl"),
        ("model-index:\n- name: a\n  license: gpl-3.0", None),
        ("model:\n  license: gpl-3.0\nlicense: mit", "mit"),
        ("license: null", None),
        ("license: ''", None),
        ("license: {name: mit}", None),
        ("license: [[mit]]", None),
        ("license: *a", None),
        ("license: mit\nbroken: [", "mit"),
        ("license: mit\nlicense: other", "other"),
        ("license: mit\nlicense: {a: b}", "mit"),
        ("broken: [\nlicense: mit", None),
        ("a: b: c\nlicense: mit", None),
        ("license: " + "x" * 500, None),
        ('license: "a\\u0000b"', None),
        ("license: !!python/object/apply:os.system ['true']", "true"),
        ("- license: mit", None),
        ("license", None),
        ("? [license]\n: mit", None),
        ("", None),
    ],
)
def test_what_a_card_states(matter, licence):
    assert stated_in(card(matter)) == licence


@pytest.mark.parametrize("text", ["", "# A model\nlicense: mit\n", "---", "---\nlicense: mit"])
def test_a_card_without_front_matter(text):
    assert stated_in(text) in (None, "mit")


def bomb() -> str:
    """Aliases of aliases: a hundred bytes a line, nine times the lines before it each."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    return "\n".join([*lines, "license: *a11"])


@pytest.mark.parametrize(
    "matter", [bomb(), "[" * 100_000, "a:\n" + "- " * 60_000, "{a: " * 40_000, "k: v\n" * 300_000]
)
def test_a_card_made_to_take_long_does_not(matter):
    begun = time.perf_counter()
    assert stated_in(card(matter)) is None
    assert time.perf_counter() - begun < 20


def test_cards_that_cannot_be_read(tmp_path):
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").mkdir()
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").rmdir()
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\xff\n---\n")
    assert licence_of(tmp_path) == "mit\ufffd"


def test_a_card_is_read_to_its_bound(tmp_path):
    text = "---\nlicense: mit\n" + "tag: x\n" * 500_000
    (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path) == "mit"
