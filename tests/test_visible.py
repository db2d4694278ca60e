"""Text of others: nothing that a terminal obeys or hides, and every letter as it was."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excise.visible import one_line, visible


@given(st.text(st.characters()))
def test_nothing_is_left_that_a_terminal_obeys_or_hides(text: str) -> None:
    for lines in (False, True):
        shown = visible(text, lines=lines)
        kinds = {unicodedata.category(c) for c in shown if not (lines and c == "\n")}
        assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    shown = visible(text)
    assert visible(shown) == shown


@pytest.mark.parametrize(
    "text",
    ["", "où – naïve", "日本語　の", "१२३ ßÄ", "a [b] \\ c", "no\u00a0break", "e\u0301", "😀"],
)
def test_letters_signs_and_spaces_stay(text: str) -> None:
    assert visible(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;t\x07", "\\x1b]0;t\\x07"),
        ("a\rb\tc\nd", "a\\rb\\tc\\nd"),
        ("\x7f\x85\x9b", "\\x7f\\x85\\x9b"),
        ("\u202e\u2066\u200f\u061c", "\\u202e\\u2066\\u200f\\u061c"),
        ("\u200b\u2060\ufeff\u00ad", "\\u200b\\u2060\\ufeff\\xad"),
        ("\u2028\u2029", "\\u2028\\u2029"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_the_rest_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_an_error_is_one_line_of_bounded_length_with_its_end() -> None:
    text = one_line("first\n  second\n" + "x" * 5000 + " is wrong: do this instead")
    assert text.startswith("first second xxx")
    assert text.endswith(" is wrong: do this instead")
    assert len(text) <= 500
    assert "\n" not in text
