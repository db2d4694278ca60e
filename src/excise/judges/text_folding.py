"""Normalise texts before they are compared: markers, answers and responses. Knows characters only."""

from __future__ import annotations

import re
import unicodedata

_ALIKE = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u02bc\u00b4\u1ffd", "'"),
        **dict.fromkeys("\u201c\u201d", '"'),
        **dict.fromkeys("\u2010\u2011", "-"),
    }
)
# Unicode's Default_Ignorable_Code_Point: soft hyphens, joiners, zero-width spaces, variation selectors.
_IGNORABLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]+"
)
_EMPHASIS = re.compile(r"[*_`]+")
_SPACE = re.compile(r"\s+")
_JAMO = re.compile("[\u1100-\u11ff\ua960-\ua97f\ud7b0-\ud7ff]")  # parts of Korean syllables
_UNKNOWN = "\ufffd"  # shown for an incomplete UTF-8 sequence


def fold(text: str) -> str:
    """Fold letter case, compatibility forms, typographic quotes, emphasis and white space.

    Default-ignorable code points are left out. Idempotent.
    """
    folded = _fold(text)
    # A code point that was left out may have stood between a letter and its accent.
    while not folded.isascii() and (again := _fold(folded)) != folded:
        folded = again
    return folded


def _fold(text: str) -> str:
    if not text.isascii():
        one = unicodedata.normalize("NFKC", _IGNORABLE.sub("", text.translate(_ALIKE)))
        # A second time: casefolding splits some composed letters.
        text = unicodedata.normalize("NFKC", one.casefold()).translate(_ALIKE)
    return _SPACE.sub(" ", _EMPHASIS.sub("", text.casefold()))


def settled(text: str) -> str:
    """Return the part of a growing text whose folded form no longer changes as the text grows.

    The last letter is not part of it: an accent may follow, and compose with it.
    """
    last = len(text) - 1
    while last >= 0 and not _begins_anew(text[last]):
        last -= 1
    return text[: max(last, 0)]


def _begins_anew(character: str) -> bool:
    """Return whether nothing from this character on can change the folding of what stands before it."""
    folded = unicodedata.normalize("NFD", fold(character))
    if not folded or folded[0] == _UNKNOWN or _JAMO.match(folded):
        return False
    # Both: Greek has an accent whose capital is a letter.
    return not any(unicodedata.category(c).startswith("M") for c in (character, folded[0]))
