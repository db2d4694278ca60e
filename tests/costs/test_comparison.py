"""Comparisons: the right trials are matched, what differs is said, models are measured as a run was."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from records import make_record, minimal_record, nats, rate

from excise.cli.main import main
from excise.costs.comparison import compare
from excise.record import Record
from excise.report.stored_record import read_record, write_record


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Two runs that were measured alike."""
    return [kept(tmp_path / name, make_record(60, seed)) for name, seed in (("one", 3), ("two", 4))]


def kept(folder: Path, record) -> str:
    folder.mkdir(parents=True)
    write_record(folder, record)
    return str(folder)


def changed(**parts):
    """A record of `make_record` with other values deep in it: dotted keys, `__` for the dots."""
    data = make_record(60, 4).model_dump(by_alias=True)
    for path, value in parts.items():
        *way, last = path.split("__")
        place = data
        for key in way:
            place = place[key]
        place[last] = value
    return Record.model_validate(data)


def test_the_least_drift_at_every_limit(runs):
    found = compare(runs)
    assert found.differences == []
    for match in found.matches:
        for name, trial in zip(runs, match.trials, strict=True):
            kept = [
                t.scores["drift"].value
                for t in read_record(Path(name)).trials
                if t.scores and not t.screened and t.scores["behaviour_rate"].value <= match.limit
            ]
            assert (trial is None) == (not kept)
            assert trial is None or trial.scores["drift"].value == min(kept)


def test_a_limit_that_no_trial_keeps_has_none(tmp_path):
    found = compare([kept(tmp_path / name, minimal_record()) for name in "ab"])
    assert all(match.trials == [None, None] for match in found.matches)
    # Nothing is known of how these were measured: nothing is called alike.
    assert not found.may_compare("behaviour_rate")
    assert not found.may_compare("drift")


def test_strengthened_behaviours_are_matched_from_above(tmp_path):
    trials = [
        {"number": n, "state": "complete", "params": {}, "seconds": {},
         "scores": {"behaviour_rate": rate(share), "drift": nats(drift)}}
        for n, (share, drift) in enumerate([(0.99, 0.4), (0.9, 0.2), (0.5, 0.1)])
    ]  # fmt: skip
    more = {"trials": trials, "front": [0, 1, 2], "goals": ["maximize", "minimize"]}
    records = [minimal_record(config={"goal": "strengthen"}, **more) for _ in range(2)]
    names = [kept(tmp_path / str(n), one) for n, one in enumerate(records)]
    numbers = [[t and t.number for t in match.trials] for match in compare(names).matches]
    assert numbers == [[0, 0], [0, 0], [1, 1], [1, 1]]
    other = kept(tmp_path / "other", minimal_record())
    assert main(["compare", names[0], other, "--quiet"]) == 2


@pytest.mark.parametrize(
    ("where", "value", "untouched", "touched"),
    [
        ("prompts__target_eval__sha256", "ab" * 32, "drift", "behaviour_rate"),
        ("prompts__contrast_eval__sha256", "ab" * 32, "behaviour_rate", "drift"),
        ("config__scores__markers", ["another"], "drift", "behaviour_rate"),
        ("judge", {"name": "j", "facts": {}, "scores": []}, "drift", "verdict_shows"),
        ("config__scores__max_new_tokens", 7, None, "drift"),
        ("config__prompts__system", "Be brief.", None, "drift"),
        ("model__config_sha256", "ab" * 32, None, "behaviour_rate"),
        ("model__dtype", "float16", None, "drift"),
    ],
)
def test_what_differs_is_said_and_marked(runs, tmp_path, capsys, where, value, untouched, touched):
    other = kept(tmp_path / "other", changed(**{where: value}))
    found = compare([runs[0], other])
    assert len(found.differences) == 1
    assert not found.may_compare(touched)
    assert not found.may_quote(touched)
    assert untouched is None or found.may_compare(untouched)
    assert main(["compare", runs[0], other, "--quiet"]) == 0
    assert f"† {found.differences[0].what} (" in capsys.readouterr().out


def test_other_holdouts_touch_what_is_quoted_from_them_alone(runs, tmp_path):
    other = kept(tmp_path / "other", changed(prompts__target_holdout__sha256="ab" * 32))
    found = compare([runs[0], other])
    assert found.may_compare("behaviour_rate")
    assert not found.may_quote("behaviour_rate")
    assert found.may_quote("drift")


def test_a_record_of_an_earlier_version_is_compared_by_what_both_have(runs, tmp_path):
    newer = changed(model__fingerprint="cd" * 32, identity={"markers": "ef" * 32})
    assert compare([runs[0], kept(tmp_path / "newer", newer)]).differences == []


def test_an_export_gives_what_its_record_says(runs):
    folder = Path(runs[0])
    record = read_record(folder)
    artifact = record.artifacts[0].model_copy(update={"path": "model"})
    write_record(folder, record.with_artifacts([artifact]))
    (folder / "model").mkdir()
    side = compare([str(folder / "model"), runs[1]]).sides[0]
    assert side.chosen is not None
    assert side.chosen.number == record.selected
    assert side.chosen.scores == artifact.measured
    assert side.quoted.after == record.holdout


def test_json_and_page_hold_every_figure(runs, tmp_path, capsys):
    bench = {
        "task": "orbs", "metric": "acc", "trial": 0, "n": 50, "original": rate(0.5, 50),
        "edited": rate(0.4, 50), "difference": -0.1, "interval": (-0.2, 0.0),
        "samples_sha256": "aa",
    }  # fmt: skip
    for name, asked in zip(runs, ("aa", "bb"), strict=True):
        record = read_record(Path(name))
        one = make_record(benchmarks=[{**bench, "samples_sha256": asked}]).benchmarks[0]
        own = one.model_copy(update={"trial": record.selected})
        write_record(Path(name), record.with_benchmarks([own]))
    out = tmp_path / "page.html"
    assert main(["compare", *runs, "--out", str(out), "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["page"] == str(out)
    assert [side["name"] for side in found["sides"]] == runs
    assert [match["limit"] for match in found["matched"]] == [0.02, 0.05, 0.1, 0.2]
    page = out.read_text(encoding="utf-8")
    for side, name in zip(found["sides"], runs, strict=True):
        record = read_record(Path(name))
        assert side["edited"]["drift"]["value"] == record.holdout["drift"].value
        assert side["benchmarks"][0]["trial"] == record.selected
    assert page.count("orbs, acc\u00a0†") == 2  # they met other samples
    assert "default-src 'none'" in page
    assert main(["compare", *runs, "--quiet"]) == 0
    assert (Path(runs[0]) / "comparison.html").exists()
    assert "orbs" in capsys.readouterr().out


def test_hostile_names_stay_text(tmp_path, capsys):
    names = [kept(tmp_path / f"<b>x{n}[/b]\x1b[31m", make_record(60, n)) for n in range(2)]
    assert main(["compare", *names, "--quiet"]) == 0
    assert "\x1b" not in capsys.readouterr().out
    page = (Path(names[0]) / "comparison.html").read_text(encoding="utf-8")
    assert "<b>x" not in page


def test_tables_of_many_figures_and_long_names_fit_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = []
    for seed, word in enumerate(("one", "two")):
        record = make_record(60, seed, holdout=dict.fromkeys(("drift", "severity"), nats(0.000456)))
        trials = [
            t.model_copy(update={"scores": {**t.scores, "severity": record.holdout["severity"],
                                            "false_rate": record.trials[1].scores["behaviour_rate"]}})
            for t in record.trials if t.number != 5
        ]  # fmt: skip
        trials.insert(5, record.trials[5])
        one = record.model_copy(update={"trials": trials})
        names.append(kept(tmp_path / f"a-run-with-a-rather-long-name-{word}", one))
    assert main(["compare", *names, "--quiet"]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 80
    assert "A  a-run-with-a-rather-long-name-one: directional, 60 trials" in out
    assert out.count("0.000456 (0.000365 to 0.000547)") >= 8  # whole, in every row of both tables


def test_bad_input_is_one_line(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "record.json").write_text('{"schema": 1')
    gone = str(tmp_path / "gone")
    for names in (
        runs[:1],
        [runs[0], runs[0] + "/record.json"],
        [runs[0], str(tmp_path / "empty")],
        [runs[0], str(broken)],
        [gone, gone + "2"],
        [*runs, "--out", str(tmp_path / "page.txt")],
        [*runs, "--out", gone + "/page.html"],
        [*runs, gone],  # of no model, and the synthetic run has no settings to measure it with
    ):
        assert main(["compare", *names, "--quiet"]) == 2, names
        said = capsys.readouterr()
        assert said.out == ""
        assert len(said.err.strip().splitlines()) == 1, said.err
    assert not list(tmp_path.rglob("*.html"))


def test_a_model_without_a_record_is_measured_as_the_run_was(tiny_run: Path, tmp_path, capsys):
    """The run's own export, away from its record, measures what the run's record says of it."""
    run, model = tmp_path / "run", tmp_path / "elsewhere" / "edited"
    shutil.copytree(tiny_run, run)
    model.parent.mkdir()
    shutil.move(run / "model", model)
    assert main(["compare", str(run), str(model), "--json", "--quiet"]) == 0
    ours, theirs = json.loads(capsys.readouterr().out)["sides"]
    assert theirs["what"] == "a model without a record, measured here"
    assert theirs["trial"] is None
    assert theirs["prompts"] == ours["prompts"]
    for name in ("behaviour_rate", "drift"):
        mine, other = (side["edited"][name]["value"] for side in (ours, theirs))
        assert math.isclose(mine, other, rel_tol=0.02, abs_tol=1e-5), name
    # An original that is measurably another one now is no measure.
    record = read_record(run)
    there = record.baseline["behaviour_rate"]
    moved = there.model_copy(update={"interval": (1.5, 1.6), "value": 1.5})
    other = {**record.baseline, "behaviour_rate": moved}
    write_record(run, record.model_copy(update={"baseline": other}))
    assert main(["compare", str(run), str(model), "--quiet"]) == 2
    assert "another model now" in capsys.readouterr().err
