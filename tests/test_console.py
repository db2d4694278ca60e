"""What is shown: plain lines, bars, JSON lines, silence, and tables of any width."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from records import make_record, minimal_record
from rich.console import Console

from excise import cli, console
from excise.console import Reporter, comparison_table, figures_table, front_table, show_result
from excise.events import (
    Finished,
    Notice,
    PhaseEnded,
    PhaseStarted,
    Progress,
    TrialMeasured,
)

SCORES = {"behaviour_rate": 0.25, "drift": 0.01}
EVENTS = [
    PhaseStarted("load"),
    PhaseEnded("load", 1.5),
    PhaseStarted("search", 4),
    Progress("search", 2, 4),
    TrialMeasured(1, SCORES, False, True),
    TrialMeasured(2, SCORES, True, False),
    Notice("batch [red]halved[/] to 8"),
    Progress("capture target", 1, 2),
    PhaseEnded("search", 62.0),
    PhaseStarted("something new"),
    PhaseEnded("something new", 0.25),
    Finished("/tmp/run [1]"),
]


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    """No test depends on the terminal it is started from."""
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def tell(**how):
    with Reporter(**how) as report:
        for event in EVENTS:
            report(event)


def test_plain_lines_where_there_is_no_terminal(capsys):
    tell()
    out, err = capsys.readouterr()
    assert not out
    assert "\x1b" not in err
    assert err.splitlines() == [
        "Loading the model: done in 1.5 s",
        "Searching: 2 of 4 trials",
        "note: batch [red]halved[/] to 8",
        "Searching: done in 1 min 2 s",
        "something new: done in 0.2 s",
    ]


def test_a_plain_line_is_one_line_however_long(capsys):
    with Reporter() as report:
        report(Notice("word " * 100))
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_json_lines_parse_and_name_their_event(capsys):
    tell(json_events=True)
    out, err = capsys.readouterr()
    assert not err
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows == [event.as_dict() for event in EVENTS]
    assert [row["event"] for row in rows] == [type(event).__name__ for event in EVENTS]
    assert rows[4] == {
        "event": "TrialMeasured",
        "number": 1,
        "scores": SCORES,
        "screened": False,
        "on_front": True,
    }


def test_quiet_is_silent(capsys):
    tell(quiet=True)
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def on_a_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")


def test_bars_on_a_terminal(on_a_terminal, capsys):
    with Reporter() as report:
        for event in EVENTS[:6] + EVENTS[7:]:
            report(event)
    out, err = capsys.readouterr()
    assert not out
    assert "\x1b" in err
    for text in ("Loading the model", "1 found on the front", "target prompts", "something new"):
        assert text in err


@pytest.mark.parametrize("on", [{"quiet": True}, {"json_events": True}])
def test_quiet_and_json_draw_no_bars_on_a_terminal(on_a_terminal, capsys, on):
    tell(**on)
    out, err = capsys.readouterr()
    assert not err
    assert "\x1b" not in out


@pytest.mark.parametrize("text", ["batch [red]halved[/red] to 8", "file a[/b] is odd", "at [3]"])
def test_a_notice_on_a_terminal_is_shown_as_it_is(on_a_terminal, capsys, text):
    monochrome = {"NO_COLOR": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in monochrome.items():
            patch.setenv(name, value)
        with Reporter() as report:
            report(Notice(text))
    assert text in capsys.readouterr().err


# -- the command line ------------------------------------------------------------------------------


@pytest.fixture
def failing(tmp_path):
    """Arguments of a command that says what it does until it finds nothing to work on."""
    return ["run", str(tmp_path / "none"), "--out", str(tmp_path / "out"), "--behaviour", "demo"]


@pytest.mark.parametrize("how", [[], ["--quiet"], ["--json-events"]])
def test_an_error_is_one_line_however_progress_is_shown(failing, capsys, how):
    assert cli.main([*failing, *how]) == 2
    out, err = capsys.readouterr()
    complaints = [line for line in err.splitlines() if line.startswith("excise: ")]
    assert len(complaints) == 1
    assert err.splitlines()[-1] == complaints[0]
    rows = [json.loads(line) for line in out.splitlines()]
    if how == ["--json-events"]:
        assert rows[0] == {"event": "PhaseStarted", "phase": "prompts", "total": None}
    else:
        assert not rows
    if how:
        assert err.splitlines() == complaints


def test_quiet_and_json_exclude_each_other(failing, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*failing, "--quiet", "--json-events"])
    assert exit_.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


# -- tables ----------------------------------------------------------------------------------------


def drawn(what, width):
    """What a terminal of this width shows, without colours."""
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(what)
    lines = file.getvalue().splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_the_front_as_a_table(width):
    record = make_record()
    text = drawn(front_table(record, most=1000), width)
    assert f"Front: {len(record.front)} of 120 trials" in text
    assert "…" not in text
    first = [line.split() for line in text.splitlines()]
    numbers = [words[1] if words[0] == "*" else words[0] for words in first if words]
    assert [n for n in numbers if n.isdigit()] == [str(n) for n in record.front]
    (chosen,) = [line for line in text.splitlines() if line.lstrip().startswith("* ")]
    assert f"* {record.selected} " in chosen


def test_a_long_front_is_thinned_and_keeps_its_ends_and_the_choice():
    record = make_record(trials=400, seed=1)
    record = record.model_copy(update={"front": list(range(6, 46)), "selected": 8})
    text = drawn(front_table(record, most=12), 100)
    assert "Front: 40 of 400 trials, 13 shown" in text
    assert "* 8 " in text
    numbers = [line.split()[0] for line in text.splitlines()]
    assert "6" in numbers
    assert "45" in numbers


@pytest.mark.parametrize("width", [80, 120])
def test_the_figures_as_a_table(width):
    record = make_record()
    text = drawn(figures_table(record), width)
    assert f"Chosen: trial {record.selected} by knee" in text
    assert "…" not in text
    for word in ("original", "edited (95 %)", "search", "holdout", "seen", "unseen"):
        assert word in text
    lines = [line.strip() for line in text.splitlines()]
    start = lines.index("on holdout prompts")
    assert lines.index("on search prompts") < start
    groups = sum(len(score.parts or {}) for score in record.holdout.values())
    assert len([x for x in lines[start + 1 :] if x]) == len(record.holdout) + groups
    assert all(len(x) < 80 for x in lines)  # nothing is broken into two lines


@pytest.mark.parametrize("width", [80, 120])
def test_a_comparison_as_a_table(width):
    record = make_record()
    rows = [
        ("search", record.baseline, record.chosen().scores),
        ("holdout", record.holdout_baseline, record.holdout),
    ]
    text = drawn(comparison_table(rows), width)
    assert "…" not in text
    assert len([x for x in text.splitlines() if "holdout" in x]) == len(record.holdout)
    assert len([x for x in text.splitlines() if "search" in x]) == len(record.chosen().scores)


@pytest.mark.parametrize("width", [80, 120])
def test_tables_of_the_smallest_record(width):
    record = minimal_record()
    assert "Front: 1 of 1 trials" in drawn(front_table(record), width)
    assert "Chosen: trial 0" in drawn(figures_table(record), width)


@pytest.mark.parametrize("group", ["[bold]", "[/bold]", "a[1]"])
def test_group_names_come_from_users_and_are_shown_as_they_are(group):
    record = make_record()
    score = record.holdout["behaviour_rate"]
    part = score.model_copy(update={"parts": None})
    changed = score.model_copy(update={"parts": {group: part}})
    record = record.model_copy(update={"holdout": {"behaviour_rate": changed}})
    assert group in drawn(figures_table(record), 120)


@pytest.mark.parametrize("width", [80, 120])
def test_a_result_shows_front_figures_samples_and_places(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    record = make_record()
    show_result(record, Path("/runs/one"))
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    sample = record.samples[0]
    for word in (sample.before, sample.after, sample.answer, "/runs/one/report.html", "Front: "):
        assert word in text
    assert text.index("Front: ") < text.index("Chosen: ") < text.index("/runs/one/report.html")


@pytest.mark.parametrize("name", ["run[1]", "[bold]", "a[/b]"])
def test_a_folder_is_shown_as_it_is_called(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    show_result(minimal_record(), Path("runs") / name)
    assert f"runs/{name}/report.html" in capsys.readouterr().out


def test_texts_of_a_model_are_not_markup(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    record = make_record()
    sample = record.samples[0].model_copy(
        update={"prompt": "[red]p", "before": "", "after": "[/]x"}
    )
    show_result(record.model_copy(update={"samples": [sample]}), Path("/runs/one"))
    text = capsys.readouterr().out
    assert all(word in text for word in ("[red]p", "(empty)", "[/]x"))


def test_data_for_programs(capsys):
    console.show_json({"a": [1, None]})
    assert json.loads(capsys.readouterr().out) == {"a": [1, None]}


def test_lines_for_people(capsys):
    console.say("done")
    console.complain("not done")
    assert capsys.readouterr() == ("done\n", "excise: not done\n")
