"""Escape characters of foreign text that a terminal would obey or not show.

Escape sequences move the cursor and overwrite lines, bidirectional controls reorder letters, and
zero-width characters hide. All of these become escapes; letters, signs and spaces stay as they are.
"""

from __future__ import annotations

import unicodedata

_LONGEST = 500  # characters of an error's line
_TAIL = 160  # of these from its end, where it says what to do


def visible(text: str, *, lines: bool = False) -> str:
    r"""Return `text` with every character that is no letter, sign or space escaped: `\x1b`, `\u202e`.

    Args:
        text: from anywhere.
        lines: leave line breaks alone.
    """
    if text.isprintable():
        return text
    return "".join(c if _is_shown(c) or (lines and c == "\n") else _escape(c) for c in text)


def one_line(text: str, longest: int = _LONGEST) -> str:
    """Put `text` on one line of bounded length: its beginning and its end."""
    text = visible(" ".join(part for line in text.split("\n") if (part := line.strip())))
    if len(text) <= longest:
        return text
    return f"{text[: longest - _TAIL - 3]} … {text[-_TAIL:]}"


def _is_shown(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def _escape(character: str) -> str:
    number = ord(character)
    if character in "\n\r\t":
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}[character]
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
