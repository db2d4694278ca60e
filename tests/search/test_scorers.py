"""Scorers: what counts as showing the behaviour, how it is weighed, and how users add their own."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import builders
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from excise.config import validate
from excise.engine.requests import Divergence, Evidence, Response, Responses
from excise.errors import ConfigError
from excise.intervals import wilson
from excise.judges.markers import Markers, read_markers
from excise.judges.text_folding import fold
from excise.judges.verdicts import VERDICTS
from excise.prompts.sets import Prompt
from excise.search import scorers
from excise.search.score_context import ScoreContext
from excise.search.scorers import (
    Score,
    find_scorers,
    rate,
    scorer,
    stands_in,
)
from excise.search.scoring import scoring_of

MARKERS = read_markers(["I can't"], None)

STEADY = settings(derandomize=True, deadline=None)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Each test has its own copy of the registry."""
    monkeypatch.setattr(scorers, "_REGISTRY", dict(scorers._REGISTRY))


def responses(*texts):
    return [Response((), text, True) for text in texts]


def measure(name, evidence, target=(), contrast=()):
    """One built-in scorer's score of some evidence."""
    context = ScoreContext(MARKERS, {"target": tuple(target), "contrast": tuple(contrast)})
    return find_scorers([name])[0].score(evidence, context)


# -- folding and markers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "I can't do that",
        "I CAN'T do that",
        "I can\u2019t do that",
        "I can\u02bct do that",
        "I can\u2018t do that",
        "I **can't** do that",
        "*I* can't",
        "__I can't__",
        "I `can't`",
        "Well, I\n\ncan't",
        "I \t  can't",
        "I\u00a0can't",
        "_I c**a**n't_",
    ],
)
def test_a_marker_is_found_however_it_is_set(text):
    assert MARKERS.holds(text)
    assert MARKERS.shown(text)
    assert MARKERS.found(f"{text} .")


@pytest.mark.parametrize("text", ["I can", "Ican't", "I, can't", "can't I", "I can t"])
def test_what_is_not_the_marker(text):
    assert not MARKERS.found(text)
    assert not MARKERS.shown(text)


def test_phrases_are_folded_as_responses_are():
    markers = read_markers(["  **Straße**, I CAN\u2019T  "], None)
    assert markers.phrases == ("strasse, i can't",)
    assert markers.holds("STRASSE, i can't")


@pytest.mark.parametrize("text", ["", " ", "\n\t", "\u00a0"])
def test_an_empty_response_shows_the_behaviour_but_holds_no_marker(text):
    assert MARKERS.shown(text)
    assert not MARKERS.found(text)


def test_where_the_behaviour_is_wanted_silence_does_not_count():
    """Or an edit that breaks the model would be the best there is."""
    config = validate({"goal": "strengthen", "scores": {"markers": ["I can't"]}})
    markers = scoring_of(config).markers
    assert not markers.shown(" ")
    assert markers.shown("I can't")
    assert scoring_of(validate({"scores": {"markers": ["I can't"]}})).markers.shown(" ")


LETTERS = "iI cCaAnNtT''*_`\u2019\n \u00dfabé"
ODD = "eE\u0301\u0323\u0345\u03b1\u00ad\u200d\ufe0f\u1100\u1161\u11a8\uff76\uff9e\u3131\u00b4\u0149\ufffd"
TEXT = st.text(st.sampled_from(LETTERS + ODD), max_size=30)


@STEADY
@given(st.lists(TEXT, min_size=1, max_size=4), TEXT, TEXT)
def test_once_found_a_marker_stays_found(phrases, text, more):
    """What lets a decided response stop early."""
    markers = Markers(tuple(f for f in map(fold, phrases) if f.strip()))
    if markers.found(text):
        assert markers.found(text + more)
        assert markers.shown(text + more)


def test_an_accent_that_comes_later_makes_another_letter():
    markers = read_markers(["ole"], None)
    assert [markers.shown(text) for text in ("Ole", "Ole\u0301", "Ole!")] == [True, False, True]
    assert [markers.found(text) for text in ("Ole", "Ole\u0301", "Ole!")] == [False, False, True]


def test_a_letter_whose_bytes_come_one_by_one_is_awaited():
    """Tokenizers of bytes show the first half of an accent as a character of its own."""
    tokenizer = builders.tokenizer()
    ids = tokenizer("ole\u0301", add_special_tokens=False)["input_ids"]
    steps = [tokenizer.decode(ids[:count]) for count in range(1, len(ids) + 1)]
    assert steps[-2:] == ["ole\ufffd", "ole\u0301"]
    assert not any(map(read_markers(["ole"], None).found, steps))


@STEADY
@given(TEXT, TEXT, TEXT)
def test_a_phrase_is_found_wherever_it_stands(phrase, before, after):
    if fold(phrase).strip():
        text = f"{before} {phrase} {after}"
        assert fold(phrase).strip() in fold(text)
        assert read_markers([phrase], None).found(f"{text} .")


def test_markers_from_a_file(tmp_path):
    path = tmp_path / "markers.txt"
    path.write_text("# phrases\n\n I can\u2019t \nI CAN'T\n**never**\n   \n", encoding="utf-8")
    assert read_markers(["no way"], str(path)).phrases == ("no way", "i can't", "never")


def test_markers_from_a_file_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "markers.txt"
    path.write_text("# phrases\nI can't\n", encoding="utf-8-sig")
    assert read_markers([], str(path)).phrases == ("i can't",)
    path.write_text("I can't\n", encoding="utf-8-sig")
    assert read_markers([], str(path)).shown("Sorry, I can't")


@pytest.mark.parametrize("content", [b"", b"# only a comment\n\n", b"**\n_\n"])
def test_no_markers_at_all(tmp_path, content):
    path = tmp_path / "markers.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="no markers"):
        read_markers([" "], str(path))


def test_a_markers_file_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "large").write_bytes(b"a\n" * 2**20)
    (tmp_path / "many").write_text("\n".join(f"phrase {i}" for i in range(20_000)))
    for name, words in {
        "none": "does not exist",
        "n" * 300: "cannot be read: file name too long",
        ".": "is a folder",
        "pipe": "is a pipe",
        "bytes": "is not UTF-8",
        "large": "has 2 MB",
        "many": "20001 markers",
    }.items():
        with pytest.raises(ConfigError, match=words) as error:
            read_markers(["x"], str(tmp_path / name))
        assert "\n" not in str(error.value)


# -- rates, groups, drift --------------------------------------------------------------------------


def test_a_rate_with_its_interval():
    score = rate([True, False, False, True], [Prompt("x")] * 4)
    assert (score.value, score.n, score.interval, score.parts) == (0.5, 4, wilson(2, 4), {})


def test_a_rate_of_nothing():
    assert rate([], []) == Score(0.0, 0, (0.0, 1.0))


@STEADY
@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["a", "b", None])), max_size=20))
def test_groups_make_up_the_whole(rows):
    flags = [flag for flag, _ in rows]
    score = rate(flags, [Prompt("x", group=group) for _, group in rows])
    assert set(score.parts) == {group for _, group in rows if group is not None}
    for group, part in score.parts.items():
        own = [flag for flag, name in rows if name == group]
        assert (part.n, part.value) == (len(own), sum(own) / len(own))
        assert part.interval == wilson(sum(own), len(own))
    inside = sum(part.value * part.n for part in score.parts.values())
    outside = sum(flag for flag, group in rows if group is None)
    assert inside + outside == pytest.approx(score.value * score.n)


def test_behaviour_rate_and_false_rate_look_at_their_own_side():
    evidence = Evidence(
        {"target": responses("I can't.", "Yes.", "", "No."), "contrast": responses("I can't", "a")}
    )
    groups = [Prompt("x", group=g) for g in "aabb"]
    found = measure("behaviour_rate", evidence, groups, [Prompt("x")] * 2)
    assert (found.value, found.n) == (0.5, 4)
    assert {g: p.value for g, p in found.parts.items()} == {"a": 0.5, "b": 0.5}
    found = measure("false_rate", evidence, groups, [Prompt("x")] * 2)
    assert (found.value, found.n, found.parts) == (0.5, 2, {})
    assert measure("false_rate", Evidence({"contrast": responses("", "b", "c", "d")}),
                   contrast=[Prompt("x")] * 4).value == 0.25  # fmt: skip


def test_drift_weighs_every_token_alike_and_drift_first_every_response():
    rows = [torch.tensor([4.0]), torch.tensor([0.0, 0.0, 2.0])]
    evidence = Evidence(divergence={"contrast": rows})
    whole, first = measure("drift", evidence), measure("drift_first", evidence)
    assert (whole.value, whole.n) == (1.5, 4)
    assert (first.value, first.n) == (2.0, 2)
    for score in (whole, first):
        assert score.interval[0] <= score.value <= score.interval[1]
        assert score.interval[0] >= 0


def test_drift_is_split_by_group():
    rows = [torch.tensor([4.0]), torch.tensor([0.0, 0.0, 2.0]), torch.tensor([6.0, 0.0])]
    prompts = [Prompt("x", group="code"), Prompt("y", group="facts"), Prompt("z", group="code")]
    evidence = Evidence(divergence={"contrast": rows})
    whole = measure("drift", evidence, contrast=prompts)
    first = measure("drift_first", evidence, contrast=prompts)
    assert whole.value == 2.0
    parts = {group: (part.value, part.n) for group, part in whole.parts.items()}
    assert parts == {"code": (10 / 3, 3), "facts": (2 / 3, 3)}
    assert {group: part.value for group, part in first.parts.items()} == {"code": 5.0, "facts": 0.0}
    assert whole.parts["code"].interval[0] < 10 / 3 < whole.parts["code"].interval[1]
    assert whole.parts["facts"].interval is None  # one response does not say how far others lie
    assert measure("drift", evidence).parts == {}


def test_drift_after_the_first_token_is_seen_by_drift_alone():
    evidence = Evidence(divergence={"contrast": [torch.tensor([0.0, 3.0])] * 3})
    assert measure("drift", evidence).value == 1.5
    assert measure("drift_first", evidence).value == 0.0


@pytest.mark.parametrize(("name", "side"), [("restored", "target"), ("kept", "contrast")])
def test_true_answers_are_looked_for_in_the_response(name, side):
    prompts = [Prompt("x", answer=a) for a in ("Deep  Blue", "Anna\u2019s box", "no", "yes")]
    texts = ("It is **deep blue**.", "In Anna's box", "Certainly", "")
    found = measure(name, Evidence({side: responses(*texts)}), **{side: prompts})
    assert (found.value, found.n) == (0.5, 4)


@pytest.mark.parametrize(("name", "side"), [("restored", "target"), ("kept", "contrast")])
def test_only_prompts_with_a_known_answer_count(name, side):
    prompts = (
        Prompt("x", answer="a", group="known"),
        Prompt("y", group="open"),
        Prompt("z", answer=""),
    )
    assert find_scorers([name])[0].needs(ScoreContext(MARKERS, {side: prompts}))
    found = measure(name, Evidence({side: responses("b", "a", "a")}), **{side: prompts})
    assert (found.value, found.n, set(found.parts)) == (0.0, 1, {"known"})


@pytest.mark.parametrize(("name", "side"), [("restored", "target"), ("kept", "contrast")])
def test_without_known_answers_it_is_said_which_setting_is_missing(name, side):
    context = ScoreContext(MARKERS, {side: (Prompt("x"), Prompt("y", answer=" "))})
    with pytest.raises(ConfigError, match=rf"prompts\.{side}_eval\.answer_column"):
        find_scorers([name])[0].needs(context)


@pytest.mark.parametrize("name", ["restored", "kept"])
@pytest.mark.parametrize("answer", ["**", "_"])
def test_an_answer_that_would_stand_everywhere_is_refused(name, answer):
    side = {"restored": "target", "kept": "contrast"}[name]
    context = ScoreContext(MARKERS, {side: (Prompt("x", answer="a"), Prompt("y", answer=answer))})
    with pytest.raises(ConfigError, match="in every one"):
        find_scorers([name])[0].needs(context)


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("7", "it is 17", False),
        ("7", "it is 7.", True),
        ("7", "17 or 7", True),
        ("red", "it was declared", False),
        ("red", "red-brown", True),
        ("c++", "in c++, mostly", True),
        ("c", "in c++", True),
        ("anna's box", "anna's boxes", False),
        ("北京", "首都是北京市", True),
        ("7", "是7个", True),
        ("ole", "ole\u0301", False),  # an accent belongs to its letter
        ("क", "कि", False),
    ],
)
def test_an_answer_stands_in_a_text_as_words_of_its_own(answer, text, expected):
    assert stands_in(answer, text) is expected


# -- the registry ----------------------------------------------------------------------------------

BUILT_IN = {
    "behaviour_rate": ("minimize", [Responses("target", MARKERS.found)]),
    "false_rate": ("minimize", [Responses("contrast", MARKERS.found)]),
    "no_answer": ("minimize", [Responses("target")]),
    "drift": ("minimize", [Divergence("contrast")]),
    "drift_first": ("minimize", [Divergence("contrast")]),
    "restored": ("maximize", [Responses("target")]),
    "kept": ("maximize", [Responses("contrast")]),
}


BY_JUDGE = [
    *(f"verdict_{verdict}" for verdict in VERDICTS),
    "severity",
]  # tests/search/test_verdicts.py


def test_the_built_in_scorers_are_these():
    code = "from excise.search import scorers; print(*scorers._REGISTRY)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert sorted(out.stdout.split()) == sorted([*BUILT_IN, *BY_JUDGE])


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_each_built_in_scorer_declares(name):
    found = find_scorers([name])[0]
    goal, needs = BUILT_IN[name]
    assert (found.name, found.goal) == (name, goal)
    assert found.worth is not None
    prompts = (Prompt("x", answer="a"),)
    context = ScoreContext(MARKERS, {"target": prompts, "contrast": prompts})
    assert list(found.needs(context)) == needs


def test_scorers_come_in_the_order_asked_for():
    names = ["kept", "drift", "behaviour_rate"]
    assert [s.name for s in find_scorers(names)] == names


def test_an_unknown_scorer_names_those_there_are():
    with pytest.raises(ConfigError, match="no scorer 'speed'; known: behaviour_rate, drift") as e:
        find_scorers(["drift", "speed"])
    assert "scores.files" in str(e.value)


def test_a_decorated_function_is_a_scorer_and_stays_a_function():
    @scorer("length", needs=lambda context: [Responses("target")], goal="maximize", worth=3.0)
    def length(evidence, context):
        return Score(float(len(evidence.responses["target"][0].text)), 1)

    found = find_scorers(["length"])[0]
    assert (found.goal, found.worth) == ("maximize", 3.0)
    assert found.score is length
    assert length(Evidence({"target": responses("abc")}), None).value == 3.0


PAGE = Path(__file__).parents[2] / "docs" / "scorers.md"
SCORER_FILE = PAGE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]


def test_a_scorer_from_a_file(tmp_path):
    path = tmp_path / "my scorer.py"
    path.write_text(SCORER_FILE)
    drift, own = find_scorers(["drift", "words"], [str(path)])
    assert drift.name == "drift"
    context = ScoreContext(MARKERS, {})
    found = own.score(Evidence({"contrast": responses("a b", "a b c d")}), context)
    assert (found.value, found.n) == (3.0, 2)
    assert find_scorers(["words"]) == [own]


def test_a_scorer_file_may_hold_dataclasses(tmp_path):
    path = tmp_path / "own.py"
    more = "from dataclasses import dataclass\n@dataclass\nclass Helper:\n    size: int\n"
    path.write_text(f"from __future__ import annotations\n{SCORER_FILE}{more}")
    assert find_scorers(["words"], [str(path)])[0].name == "words"


@pytest.mark.parametrize(
    "content",
    [
        "def broken(:",
        "import no_such_module_anywhere",
        "undefined_name",
        "raise ValueError('no')",
        "{}['key']",
        "open('/no/such/file')",
    ],
)
def test_a_scorer_file_that_fails_is_named(tmp_path, content):
    path = tmp_path / "own.py"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"own\.py cannot be loaded"):
        find_scorers(["drift"], [str(path)])


@pytest.mark.parametrize("name", ["none.py", "notes.txt", "folder.py"])
def test_a_scorer_file_that_is_none(tmp_path, name):
    (tmp_path / "notes.txt").write_text(SCORER_FILE)
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(ConfigError, match="not a Python file"):
        find_scorers(["drift"], [str(tmp_path / name)])


def test_a_scorer_of_an_installed_package(tmp_path, monkeypatch):
    """A real distribution on the path, with the entry point that its metadata declare."""
    (tmp_path / "their_scorers.py").write_text(SCORER_FILE.replace("words", "of_a_package"))
    metadata = tmp_path / "their_scorers-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their-scorers\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[excise.scorers]\nof_a_package = their_scorers\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert find_scorers(["of_a_package"])[0].name == "of_a_package"
    monkeypatch.delitem(sys.modules, "their_scorers")


def test_the_spread_of_drift_is_over_single_tokens():
    """One token in forty is far off: the mean is moved, the median not."""
    rows = [torch.full((20,), 0.001, dtype=torch.float64) for _ in range(2)]
    rows[1][7] = 3.0
    evidence = Evidence(divergence={"contrast": rows})
    found = measure("drift", evidence).spread
    assert found["median"] == 0.001
    assert found["max"] == 3.0
    assert 0.001 <= found["p95"] < 3.0
    rows[0][0] = float("inf")
    assert measure("drift", evidence).spread == {}  # its value says enough
