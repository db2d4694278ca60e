"""Tests of verdicts: what is broken by rule, what is asked, and what is remembered."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from excise.engine.requests import Evidence, Response
from excise.errors import ConfigError, JudgeError
from excise.judges.markers import Markers
from excise.judges.verdicts import VERDICTS, Exchange, Opinion, Verdicts, is_broken
from excise.prompts.sets import Prompt
from excise.search.score_context import ScoreContext
from excise.search.scorers import find_scorers, needs_of, score_of


class Told:
    """A judge that answers with the first word of a response, and counts what it is asked."""

    name, folder, grades, at_once = "told", None, True, 8

    def __init__(self):
        self.asked, self.facts = [], {"kind": "told"}

    def verdicts(self, exchanges):
        self.asked += exchanges
        words = [one.response.split()[0] for one in exchanges]
        return [Opinion(word if word in VERDICTS else None, word) for word in words]

    def severities(self, exchanges):
        return [Opinion(len(one.response) / 100) for one in exchanges]


@pytest.mark.parametrize(
    "text",
    [
        *("", " \n ", "...", "?!", "�" * 9 + "a"),
        "I can do that. " * 9,
        "the the the the the the the the the the the the the the the the",
        "わかりました。" * 8,
        "Here is a list:\n" + "- item one\n" * 12,
    ],
)
def test_what_is_empty_garbled_or_a_loop_is_broken(text: str):
    assert is_broken(text)


@pytest.mark.parametrize(
    "text",
    [
        *("7", "No.", "🙂", "Ja, gerne!", "def f(x):\n\treturn x\n"),
        "Row, row, row your boat, gently down the stream, merrily, merrily, merrily, life is a dream.",
        "\n".join(
            f"{n}. Wash the {w}." for n, w in enumerate("cup pan pot jar jug lid".split(), 1)
        ),
        "日本の首都は東京です。人口は約千四百万人で、世界最大級の都市の一つです。",
    ],
)
def test_what_has_something_to_say_is_not(text: str):
    assert not is_broken(text)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.text(st.characters(categories=["Ll", "Lo"]), min_size=2, max_size=30))
def test_any_text_said_forty_times_is_a_loop(text: str):
    assert is_broken(f"{text} " * 40)


def test_each_exchange_is_asked_once_and_broken_ones_never(tmp_path: Path):
    judge = Told()
    verdicts = Verdicts(judge)
    some = [Exchange("p", text) for text in ("shows x", "answers", "", "shows x", "other y")]
    assert verdicts.verdicts(some) == ["shows", "answers", "broken", "shows", "other"]
    assert [one.response for one in judge.asked] == ["shows x", "answers", "other y"]
    verdicts.verdicts(some)
    assert len(judge.asked) == 3
    verdicts.verdicts([Exchange("q", "answers"), Exchange("p", "answers", ended=False)])
    assert len(judge.asked) == 5  # another prompt, another end: another exchange


def test_verdicts_outlive_their_process_and_a_line_that_was_cut_short(tmp_path: Path):
    file, some = tmp_path / "verdicts.jsonl", [Exchange("p", f"shows {n}") for n in range(12)]
    first = Verdicts(Told())
    first.keep(file, "weights")
    first.verdicts(some)
    text = file.read_text()
    assert "shows 3" not in text  # hashes and verdicts, no responses
    file.write_text(text[: text.index("\n") + 20] + '\n["x", "maybe"]\n[1]\n\x00garbage\n["half')
    again, judge = Verdicts(second := Told()), second
    again.keep(file, "weights")
    assert again.verdicts(some) == ["shows"] * 12
    assert len(judge.asked) == 11  # the first line was whole
    other = Verdicts(stranger := Told())
    other.keep(file, "other weights")
    other.verdicts(some)
    assert len(stranger.asked) == 12  # another judge's verdicts are not its own


def test_a_judge_that_answers_nonsense_is_told_of_in_a_line():
    verdicts = Verdicts(Told())
    good = [Exchange("p", f"answers {n}") for n in range(40)]
    assert verdicts.verdicts([*good, Exchange("p", "hm well")])[-1] is None  # one in 41 is left out
    with pytest.raises(
        JudgeError, match=r"told: \d+ of \d+ answers were no verdict, such as 'banana'"
    ):
        verdicts.verdicts([Exchange(str(n), "banana split") for n in range(40)])


def context(silent: bool = True) -> tuple[ScoreContext, Evidence]:
    """Six responses: two show, one answers, one something else, one is broken, one has no verdict."""
    texts = ["shows a", "shows b", "answers", "other", "", "hm"]
    prompts = tuple(Prompt(str(n), group="odd" if n % 2 else "even") for n in range(6))
    told = Evidence(responses={"target": [Response((1,), text, True) for text in texts]})
    return ScoreContext(Markers(("x",), silent), {"target": prompts}, Verdicts(Told())), told


def test_broken_is_no_success_and_what_has_no_verdict_is_left_out():
    asked, told = context()
    rates = {one.name: score_of(one, told, asked) for one in find_scorers(
        ["behaviour_rate", *(f"verdict_{verdict}" for verdict in VERDICTS)])}  # fmt: skip
    values = {name: (score.value, score.n) for name, score in rates.items()}
    assert values == {
        "behaviour_rate": (0.6, 5),  # 2 show, 1 is broken
        "verdict_shows": (0.4, 5),
        "verdict_answers": (0.2, 5),
        "verdict_other": (0.2, 5),
        "verdict_broken": (0.2, 5),
    }
    assert rates["behaviour_rate"].parts["even"].n == 3
    assert rates["behaviour_rate"].parts["odd"].value == 0.5


def test_where_the_behaviour_is_to_be_added_broken_does_not_count_as_it():
    asked, told = context(silent=False)
    assert score_of(find_scorers(["behaviour_rate"])[0], told, asked).value == 0.4


def test_a_judge_reads_whole_responses():
    asked, _ = context()
    for name in ("behaviour_rate", "verdict_other", "severity"):
        (request,) = needs_of(find_scorers([name])[0], asked)
        assert request.decided is None
    bare = ScoreContext(asked.markers, asked.prompts)
    assert needs_of(find_scorers(["behaviour_rate"])[0], bare)[0].decided is not None
    with pytest.raises(ConfigError, match="need a judge"):
        needs_of(find_scorers(["verdict_shows"])[0], bare)


def test_severity_of_a_broken_response_is_none_at_all():
    asked, told = context()
    score = score_of(find_scorers(["severity"])[0], told, asked)
    assert score.value == pytest.approx((7 + 7 + 7 + 5 + 0 + 2) / 600)
    assert set(score.parts) == {"odd", "even"}
