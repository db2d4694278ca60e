"""Tests of what scorers see of responses whose models think first."""

from __future__ import annotations

from pathlib import Path

import builders
import pytest

from excise.cli.main import main
from excise.engine.requests import Evidence, Response
from excise.judges.markers import read_markers
from excise.judges.verdicts import Opinion, Verdicts
from excise.prompts.chat_template import answer_in
from excise.prompts.sets import Prompt
from excise.search.score_context import ScoreContext
from excise.search.scorers import find_scorers, needs_of, score_of

TEXTS = [
    "<think>I cannot say, or can I?</think>\n\nThe kettle is red.",  # answers; the marker was a thought
    "<think>Hm.</think> I cannot say.",  # shows
    "<think>Let me think about",  # no answer within the budget
    "The orb is blue.",  # it did not think
]


@pytest.mark.parametrize(
    ("response", "before", "answer"),
    [
        *((text, "", answer) for text, answer in zip(
            TEXTS, ["\n\nThe kettle is red.", " I cannot say.", None, TEXTS[3]], strict=True)),
        ("so it is red", "<|assistant|><think>\n", None),  # the template opened the block
        ("so</think>red", "<|assistant|><think>\n", "red"),
        ("red", "<think>\n\n</think>\n\n", "red"),
        ("<|channel>thought\nhm<channel|>red", "", "red"),
        ("<think>a</think>b</think>c", "", "c"),
    ],
)  # fmt: skip
def test_the_answer_is_what_stands_after_the_chain_of_thought(response, before, answer):
    assert answer_in(response, before) == answer


class Told:
    name, folder, grades, at_once, facts = "told", None, False, 9, {}

    def __init__(self):
        self.read = []

    def verdicts(self, exchanges):
        self.read += [one.response for one in exchanges]
        return [
            Opinion("shows" if "cannot" in r else "answers") for r in self.read[-len(exchanges) :]
        ]


def measured(name: str, judge: Verdicts | None) -> float:
    told = Evidence({"target": [Response((n,), text, n != 2) for n, text in enumerate(TEXTS)]})
    prompts = {"target": tuple(map(Prompt, "abcd"))}
    context = ScoreContext(
        read_markers(["i cannot"], None), prompts, judge, lambda side, n, r: answer_in(r.text, "")
    )
    (one,) = find_scorers([name])
    assert all(request.decided is None for request in needs_of(one, context))
    return score_of(one, told, context).value


def test_verdicts_are_on_the_answer_and_what_has_none_is_a_column_of_its_own():
    judge = Told()
    rates = {
        n: measured(n, Verdicts(judge)) for n in ("verdict_shows", "verdict_answers", "no_answer")
    }
    assert rates == {"verdict_shows": 0.25, "verdict_answers": 0.5, "no_answer": 0.25}
    assert measured("behaviour_rate", Verdicts(judge)) == 0.5  # no answer is no success
    assert not any("think" in text for text in judge.read)
    assert measured("behaviour_rate", None) == 0.5  # by markers alike
    assert measured("no_answer", None) == 0.25


def test_a_model_without_a_chat_template_cannot_be_told_to_think(
    tiny: Path, tmp_path: Path, capsys
):
    model = builders.checkpoint(tmp_path / "model", "llama")
    tokenizer = builders.tokenizer()
    tokenizer.chat_template = None
    (model / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(model)
    command = ["run", str(model), "--out", str(tmp_path / "out"), "--quiet"]
    command += ["--target", str(tiny / "target.jsonl"), "--contrast", str(tiny / "contrast.jsonl")]
    command += ["--direction-size", "10", "--markers", str(tiny / "markers.txt")]
    capsys.readouterr()
    assert main([*command, "--set", "prompts.thinking=true"]) == 2
    said = capsys.readouterr().err
    assert "has no chat template to think in" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
