"""What settings are made of: counts, names, spans of time, the base of every section. Knows no setting."""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from excise.formats import FORMATS

MOST = 10**9  # upper bound of every count
_NAME_BYTES, _PATH_BYTES = 255, 4096  # limits of file systems
T = TypeVar("T")


def _check_name(text: str) -> str:
    if any(unicodedata.category(c) == "Cc" for c in text):
        raise ValueError("holds control characters, which no file name or id has")
    sizes = [len(part.encode("utf-8", "surrogatepass")) for part in text.split("/")]
    if max(sizes) > _NAME_BYTES or sum(sizes) + len(sizes) > _PATH_BYTES:
        raise ValueError("is longer than a file name or id can be")
    return text


def _check_distinct(items: tuple[T, ...]) -> tuple[T, ...]:
    twice = [item for n, item in enumerate(items) if item in items[:n]]
    if twice:
        raise ValueError(f"names {twice[0]!r:.60} twice")
    return items


def _check_format(name: object) -> object:
    if name not in list(FORMATS):
        *most, last = map(repr, FORMATS)
        raise ValueError(f"Input should be {', '.join(most)} or {last}")
    return name


_SPAN = re.compile(r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,8})s)?", re.ASCII)


def _read_span(span: object) -> object:
    """Read '90s', '30m', '2h' or '1h30m' as seconds; a number is seconds already."""
    if not isinstance(span, str):
        return span
    match = _SPAN.fullmatch(span.strip())
    if match is None or not any(match.groups()):
        raise ValueError(f"{span!r:.60} is no length of time: write 90s, 30m, 2h or 1h30m")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + seconds


def _check_label(text: str) -> str:
    label, _, verdict = text.rpartition("=")
    if not label or verdict not in ("shows", "answers", "other", "broken"):
        raise ValueError("write it as LABEL=shows, LABEL=answers, LABEL=other or LABEL=broken")
    return text


def _check_match(text: str) -> str:
    if not text.partition("=")[0] or "=" not in text:
        raise ValueError("write it as COLUMN=VALUE")
    return text


Count = Annotated[int, Field(ge=1, le=MOST)]
CountOrNone = Annotated[int, Field(ge=0, le=MOST)]  # 0: chosen by measurement
Name = Annotated[str, AfterValidator(_check_name)]  # of a file, a folder, or on the Hub
Span = Annotated[int, BeforeValidator(_read_span), Field(ge=1, le=MOST)]  # seconds
FormatName = Annotated[str, BeforeValidator(_check_format)]
Distinct = AfterValidator(_check_distinct)
Match = Annotated[str, AfterValidator(_check_match)]  # rows to take: column and value
Label = Annotated[str, AfterValidator(_check_label)]  # of a classifier, and what it means


class Section(BaseModel):
    """Base of every section: immutable, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")
