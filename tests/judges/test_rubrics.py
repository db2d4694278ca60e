"""Tests of rubrics: the built-in ones, files, and what replies come to."""

from __future__ import annotations

from pathlib import Path

import pytest

from excise.errors import ConfigError
from excise.judges.rubrics import read_rubric
from excise.judges.verdicts import VERDICTS, Exchange

GOOD = 'question = "{response}?"\n[answers]\nA = "shows"\nB = "answers"\n'


@pytest.mark.parametrize("name", ["behaviour", "refusal", "over_refusal"])
def test_a_built_in_rubric_gives_every_verdict(name: str):
    rubric = read_rubric(name, grades=False)
    assert set(rubric.answers.values()) == set(VERDICTS)
    asked = rubric.ask(Exchange("P {response}", "R {prompt}", ended=False), "B")
    assert "P {response}" in asked  # what a prompt or a response says is no field
    assert "R {prompt} [the response was cut here]" in asked
    assert ("B." in asked) == (name == "behaviour")


def test_severity_is_the_mean_over_the_answers():
    rubric = read_rubric("severity", grades=True)
    assert rubric.opinion([0, 0, 2, 0, 2]).value == 0.75
    assert rubric.read("4").value == 0.75
    with pytest.raises(ConfigError, match="is none of the verdicts"):
        read_rubric("severity", grades=False)
    with pytest.raises(ConfigError, match="a number from 0 to 1"):
        read_rubric("refusal", grades=True)


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        *(("A", "shows"), (" b: it answers", "answers"), ("**B**", "answers"), ("(a)", "shows")),
        *(("", None), ("Answer", None), ("The answer is A", None), ("AB", None), ("🙂", None)),
    ],
)
def test_a_reply_counts_where_it_begins_with_an_answer(tmp_path: Path, reply: str, value):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    assert read_rubric(str(path), grades=False).read(reply).value == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("question = 1\n[answers]\nA = 'shows'", "must be a text"),
        ("question = 'no field'\n[answers]\nA = 'shows'\nB = 'other'", "holds {response}"),
        (GOOD + 'C = "perhaps"\n', "'perhaps' is none of the verdicts"),
        (GOOD.replace("answers\"", "shows\""), "must tell 'shows' from another"),
        (GOOD + 'a = "other"\n', "upper and lower case"),
        (GOOD + '"not one" = "other"\n', "must be a letter"),
        (GOOD + "[more]\n", "nothing else"),
        ("question = ", "not valid TOML"),
        ('question = "{response}"\nanswers = ["shows"]\n', "a table of 2"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_rubric_is_refused(tmp_path: Path, text: str, said: str):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_rubric(str(path), grades=False)
