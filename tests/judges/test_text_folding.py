"""One form for texts that are compared: theorems over every character, and over how texts grow."""

from __future__ import annotations

import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from excise.judges.text_folding import fold, settled

STEADY = settings(derandomize=True, deadline=None, max_examples=300)

# Letters, accents of several classes, parts of Korean syllables, half-width signs, what is left out.
ODD = (
    "eEtT\u00e9\u0149\u0130\u00b4\u1ffd\u0301\u0323\u0345\u0338\u03b1\u03a3\u09c7\u09be\u1100\u1161\u11a8"
    "\uac00\uff76\uff9e\u3131\uff21\u00ad\u200b\u200d\ufe0f\u115f*_`\uff0a\u2019\u201d\u2011 \n.\ufffd"
)
TEXT = st.one_of(st.text(st.sampled_from(ODD), max_size=12), st.text(max_size=12))


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("\u201cStraße\u201d\n  **Über**  `x`", '"strasse" über x'),
        ("cafe\u0301", "caf\u00e9"),
        ("ＣＡＦＥ\u0301", "caf\u00e9"),
        ("im\u00adpos\u200bsi\u2060ble\ufe0f", "impossible"),
        ("e*\u0301*", "\u00e9"),
        ("can\u00b4t", "can't"),
        ("non\u2011native", "non-native"),
        ("\u0149", "'n"),
        ("\u1112\u1161\u11ab", "\ud55c"),
        ("ﬁne \u2460", "fine 1"),
    ],
)
def test_folding_by_example(text, folded):
    assert fold(text) == folded


@STEADY
@given(TEXT)
def test_folding_twice_is_folding_once(text):
    once = fold(text)
    assert fold(once) == once
    assert not set(once) & set("*_`\u2018\u2019\u201c\u201d\t\n\u00ad\u200b\u200d\ufe0f\ufeff")


@STEADY
@given(TEXT)
def test_a_texts_composed_and_decomposed_forms_are_alike(text):
    assert fold(unicodedata.normalize("NFC", text)) == fold(unicodedata.normalize("NFD", text))


def test_every_character_folds_to_what_folds_to_itself_whatever_its_form():
    every = (chr(number) for number in range(sys.maxunicode + 1))
    kinds = [(c, unicodedata.normalize("NFKD", c), unicodedata.normalize("NFD", c)) for c in every]
    changed = [(c, form) for c, plain, form in kinds if plain != c or c.casefold() != c]
    assert len(changed) > 10_000
    for character, form in changed:
        assert fold(fold(character)) == fold(character) == fold(form)


@STEADY
@given(TEXT, TEXT)
def test_what_is_settled_begins_all_that_a_text_can_become(text, more):
    assert text.startswith(settled(text))
    assert settled(text + more).startswith(settled(text))
    assert fold(text + more).startswith(fold(settled(text)))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("I can't", "I can'"),
        ("I can't.", "I can't"),
        ("I can't.**", "I can't"),
        ("e\u0301", ""),
        ("ae\u0301", "a"),
        ("ab\ufffd", "a"),
        ("", ""),
    ],
)
def test_all_but_a_texts_last_letter_is_settled(text, part):
    assert settled(text) == part
