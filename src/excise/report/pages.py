"""The pages of a run: its report, and a card in the folder of every export, written from the record."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from excise.errors import PageError, first_line
from excise.files import CARD, write_text
from excise.reading import is_folder
from excise.record import Record
from excise.report.card import card_of
from excise.report.html import html_report

REPORT = "report.html"


def write_pages(out: Path, record: Record, made: Collection[str] = ()) -> None:
    """Write the report beside the record, and a card in the folder of every export within the run's.

    Args:
        out: the run folder.
        record: its record.
        made: paths of exports elsewhere that were written just now.

    Others have the one that they were written with: what a record says of places elsewhere may be
    old, or not be ours. The record must be on the disk; each page that can be written is written.

    Raises:
        PageError: one could not be made or written.
    """
    failed = [_page(out / REPORT, partial(html_report, record))]
    for artifact in record.artifacts:
        folder = (out / artifact.path).resolve()
        inside = folder.is_relative_to(out.resolve()) and folder != out.resolve()
        if is_folder(folder) and inside:
            failed.append(_page(folder / CARD, partial(card_of, record, artifact)))
        elif artifact.path in made:  # a second look at one that could not be made
            failed.append(_fault(CARD, partial(card_of, record, artifact)))
    reasons = [reason for reason in failed if reason is not None]
    if reasons:
        raise PageError(
            f"record and exports in {out} are there, and pages are not: {'; '.join(reasons)}. `excise "
            f"report {out}` writes them again"
        )


def _page(path: Path, make: Callable[[], str]) -> str | None:
    """Write a page; why it could not be, if so."""
    return _fault(path.name, lambda: write_text(path, make()))


def _fault(name: str, act: Callable[[], object]) -> str | None:
    try:
        act()
    except Exception as error:  # noqa: BLE001 (a fault of a page takes nothing measured with it)
        return f"{name} ({type(error).__name__}: {first_line(error):.200})"
    return None
