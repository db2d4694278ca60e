"""A study on disk that was changed is refused in one line, and a file that is no study is left alone."""

from __future__ import annotations

import json
import random

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from toy_search import GOALS, SPACE, search_in, toy, trials, whole

from excise.errors import RunStateError
from excise.events import ignore
from excise.search import journal
from excise.search.stored_study import check_study


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("region", [], "cannot be read"),
        (
            "region",
            {"edges": [{"best": "low", "worst": 1}, {"best": 0, "worst": 1}]},
            "cannot be read",
        ),
        ("region", {"edges": [{"best": 0, "worst": 1}]}, "not one of its objectives"),
        ("region", {"edges": [{"best": 1, "worst": 1}] * 2}, "not one of its objectives"),
        (
            "region",
            {"edges": [{"best": 0, "worst": 1, "log": True}] * 2},
            "not one of its objectives",
        ),
        ("spent", -1.0, "not a time"),
        ("spent", "long", "not a time"),
        ("startup", 0, "not a count"),
        ("startup", True, "not a count"),
    ],
)
def test_a_study_that_says_what_no_search_wrote_is_refused(tmp_path, name, value, words):
    search = search_in(tmp_path)
    search.study.set_user_attr(name, value)
    with pytest.raises(RunStateError, match=f"^[^\n]*{words}[^\n]*--out$"):
        check_study(journal.open_study(tmp_path), SPACE, GOALS, "journal")


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("study")
    whole(folder, 16)
    return (folder / journal.FILE).read_bytes().splitlines(keepends=True)


def altered(line: bytes, draw: random.Random) -> bytes:
    """The line with a key or a value of it changed."""
    log = json.loads(line)
    key = draw.choice(sorted(log.keys() - {"sum"}))
    if draw.random() < 0.3:
        log["renamed"] = log.pop(key)
    else:
        value = log[key]
        log[key] = value + 1 if isinstance(value, int | float) else [value]
    return json.dumps(log, separators=(",", ":")).encode() + b"\n"


@pytest.mark.parametrize("seed", range(60))
def test_a_changed_journal_is_refused_or_has_the_same_trials(tmp_path, lines, seed):
    draw, changed = random.Random(seed), list(lines)
    at = draw.randrange(len(lines))
    how = draw.choice(["lost", "doubled", "swapped", "altered", "garbage", "cut"])
    if how == "lost":
        del changed[at]
    elif how == "doubled":
        changed.insert(at, changed[at])
    elif how == "swapped":
        at = min(at, len(lines) - 2)
        changed[at : at + 2] = reversed(changed[at : at + 2])
    elif how == "altered":
        changed[at] = altered(changed[at], draw)
    elif how == "garbage":
        changed.insert(at, draw.randbytes(30).replace(b"\n", b"") + b"\n")
    else:
        changed = changed[:at]
    path = tmp_path / journal.FILE
    path.write_bytes(b"".join(changed))
    if how != "cut" and at < len(lines) - 1:
        with pytest.raises(RunStateError, match=r"^[^\n]*--out$"):
            journal.open_study(tmp_path)
        assert path.read_bytes() == b"".join(changed)
    elif how in ("lost", "cut") and journal.open_study(tmp_path) is not None:
        search = search_in(tmp_path)
        check_study(search.study, SPACE, GOALS, str(path))
        search.run(16, toy, ignore)
        assert trials(search) == whole(tmp_path / "whole", 16)


def test_optuna_alone_reads_the_journal(tmp_path):
    expected = whole(tmp_path, 8)
    storage = JournalStorage(JournalFileBackend(str(tmp_path / journal.FILE)))
    study = optuna.load_study(study_name=journal.STUDY, storage=storage)
    assert [t.params for t in study.trials] == [params for _, _, params, _ in expected]


def test_a_journal_without_sums_is_gone_on_with(tmp_path, lines):
    """Earlier versions wrote none."""
    path = tmp_path / journal.FILE
    plain = [{k: v for k, v in json.loads(line).items() if k != "sum"} for line in lines]
    path.write_text("".join(json.dumps(log, separators=(",", ":")) + "\n" for log in plain))
    expected = whole(tmp_path / "whole", 24)
    search = search_in(tmp_path)
    check_study(search.study, SPACE, GOALS, str(path))
    assert whole(tmp_path, 24) == expected
    text = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*text[:3], *text[4:]]))
    with pytest.raises(RunStateError, match="changed since it was written"):
        journal.open_study(tmp_path)


def old_study(folder, change):
    """A study whose lines have no sums, with `change` made to each of its logs."""
    whole(folder, 8)
    path = folder / journal.FILE
    logs = [json.loads(line) for line in path.read_bytes().splitlines()]
    logs = [change({k: v for k, v in log.items() if k != "sum"}) for log in logs]
    logs = [one for log in logs for one in (log if isinstance(log, list) else [log]) if one]
    text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
    path.write_text(text)
    return journal.open_study(folder)


def of_trial(number, **wanted):
    return lambda log: (
        log.get("trial_id") == number and all(log.get(k) == v for k, v in wanted.items())
    )


NAME = "attn.o_proj.max_weight"


@pytest.mark.parametrize(
    ("hit", "change", "words"),
    [
        (of_trial(3, param_name=NAME), lambda _: None, f"trial 3 has no parameter '{NAME}'"),
        (
            of_trial(3, param_name=NAME),
            lambda log: {**log, "param_value_internal": 99.0},
            "not in the range",
        ),
        (
            of_trial(3, param_name=NAME),
            lambda log: {**log, "param_name": "mine"},
            "which this search does not have",
        ),
        (
            of_trial(2, op_code=6),
            lambda log: {**log, "values": [0.1, 0.2]},
            "not what was measured",
        ),
        (of_trial(2, op_code=8), lambda _: None, "not what was measured"),
        (
            of_trial(2, op_code=8),
            lambda log: {**log, "user_attr": {"measured": {"scores": 3}}},
            "no readable scores",
        ),
        (
            lambda log: log["op_code"] == 2 and "stops" in log["user_attr"],
            lambda _: None,
            "more than",
        ),
        (
            lambda log: log["op_code"] == 2 and "stops" in log["user_attr"],
            lambda log: {**log, "user_attr": {"stops": "many"}},
            "not a list of counts",
        ),
    ],
)
def test_trials_that_cannot_be_this_searchs_are_refused(tmp_path, hit, change, words):
    study = old_study(tmp_path, lambda log: change(log) if hit(log) else log)
    with pytest.raises(RunStateError, match=words):
        check_study(study, SPACE, GOALS, "study.journal")


def test_screened_trials_of_earlier_versions_are_no_points(tmp_path):
    """They met fewer prompts than the others."""

    def change(log):
        if of_trial(3, op_code=8)(log):
            log["user_attr"]["measured"]["screened"] = True
        return log

    check_study(old_study(tmp_path, change), SPACE, GOALS, "study.journal")
    search = search_in(tmp_path)
    found = search.records()[3]
    assert (found.state, found.screened) == ("screened", True)
    assert [point.number for point in search.points()] == [0, 1, 2, 4, 5, 6, 7]
    assert len(whole(tmp_path, 16)) == 16


def test_a_study_that_does_not_say_what_it_belongs_to_is_refused(tmp_path):
    def change(log):
        return None if log["op_code"] == 2 and "identity" in log["user_attr"] else log

    with pytest.raises(RunStateError, match="does not say what its trials belong to"):
        old_study(tmp_path, change)


@pytest.mark.parametrize("said", [{"config": [1]}, {"files": [1]}, {"files": {"x": 7}}])
def test_a_study_that_says_in_no_table_what_it_was_started_with_is_refused(tmp_path, said):
    def change(log):
        first = log["op_code"] == 2 and "identity" in log["user_attr"]
        return [{**log, "user_attr": said}, log] if first else log

    with pytest.raises(RunStateError, match="does not say what it was started with"):
        old_study(tmp_path, change)


@pytest.mark.parametrize(
    "content",
    [
        b"notes of mine, without a line's end",
        b'{"op_code":0,"worker_id":"a","study_name":"another","directions":[1]}\n',
        b'{"op_code":0' + b" " * 5000,
        b"x" * 20 + b"\nmore\ntorn",
    ],
)
def test_a_foreign_journal_is_not_touched(tmp_path, content):
    path = tmp_path / journal.FILE
    path.write_bytes(content)
    with pytest.raises(RunStateError, match="not a readable Excise journal"):
        journal.open_study(tmp_path)
    assert path.read_bytes() == content


def test_what_a_kill_left_of_the_first_line_is_replaced(tmp_path, lines):
    for size in (0, 5, 40):
        (tmp_path / journal.FILE).write_bytes(lines[0][:size])
        assert journal.open_study(tmp_path) is None
        study = journal.create_study(tmp_path, ["minimize"], {"model": "a"}, {"batch": 4}, more=3)
        assert journal.open_study(tmp_path).user_attrs == study.user_attrs
        assert study.user_attrs["more"] == 3


def test_a_journal_that_is_a_pipe_is_refused(tmp_path):
    import os

    os.mkfifo(tmp_path / journal.FILE)
    with pytest.raises(RunStateError, match="not a file"):
        journal.open_study(tmp_path)
