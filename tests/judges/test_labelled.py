"""Tests of labelled files: what they may hold, and the one that ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from excise.errors import PromptError
from excise.judges.labelled import read_labelled
from excise.judges.verdicts import VERDICTS, is_broken

GOOD = {"prompt": "p", "response": "r", "verdict": "shows"}


def written(folder: Path, *rows: object) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_rows_come_with_their_verdicts(tmp_path: Path):
    found = read_labelled(
        written(tmp_path, GOOD, GOOD | {"verdict": "broken", "response": "", "ended": False})
    )
    assert [one.response for one in found.exchanges] == ["r", ""]
    assert [one.ended for one in found.exchanges] == [True, False]
    assert found.verdicts == ("shows", "broken")
    assert found.source == "rows.jsonl"


def test_a_csv_file_will_do(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,response,verdict\np,"a, b",shows\np,,broken\n')
    assert [one.response for one in read_labelled(str(path)).exchanges] == ["a, b", ""]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (GOOD | {"verdict": "maybe"}, "line 2: the verdict 'maybe' is none of shows, answers"),
        (GOOD | {"verdict": None}, "the verdict None is none of"),
        (GOOD | {"verdict": ["shows"]}, "is none of"),
        ({"prompt": "p", "verdict": "shows"}, "no column 'response'"),
        (GOOD | {"response": 7}, "must be texts"),
        (GOOD | {"ended": "no"}, "ended is 'no'"),
        ([1], "not a JSON object"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path: Path, row: object, said: str):
    with pytest.raises(PromptError, match=said) as caught:
        read_labelled(written(tmp_path, GOOD, row))
    assert "\n" not in str(caught.value)


def test_one_verdict_alone_measures_nothing(tmp_path: Path):
    with pytest.raises(PromptError, match="1 verdicts"):
        read_labelled(written(tmp_path, GOOD, GOOD))
    with pytest.raises(PromptError, match="does not exist"):
        read_labelled(str(tmp_path / "none.jsonl"))
    with pytest.raises(PromptError, match=r"labelled file .* is a folder"):
        read_labelled(str(tmp_path))
    other = tmp_path / "rows.md"
    other.write_text("hello\n")
    with pytest.raises(PromptError, match=r"labelled file .*: use one of \.txt"):
        read_labelled(str(other))
    text = tmp_path / "rows.txt"
    text.write_text("hello\n")
    with pytest.raises(PromptError, match="needs the columns"):
        read_labelled(str(text))


def test_the_set_that_ships_holds_every_verdict():
    """Of the original and of edited models, each row by hand; and nobody labelled the same row twice."""
    found = read_labelled("builtin")
    assert set(found.verdicts) == set(VERDICTS)
    assert len(set(found.exchanges)) == len(found.exchanges)
    broken = [
        is_broken(e.response)
        for e, v in zip(found.exchanges, found.verdicts, strict=True)
        if v == "broken"
    ]
    assert sum(broken) >= 12  # the rest is for a judge to see
    others = [
        is_broken(e.response)
        for e, v in zip(found.exchanges, found.verdicts, strict=True)
        if v != "broken"
    ]
    assert not any(others)
