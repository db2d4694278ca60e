"""Progress: plain lines, bars, JSON lines, silence, and a line where nothing else is said."""

from __future__ import annotations

import json
import time

import pytest

from excise.cli import main as cli
from excise.cli import progress
from excise.cli.progress import Reporter
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
    TrialMeasured(1, SCORES, True),
    TrialMeasured(2, SCORES, False),
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


def test_a_search_for_a_time_says_how_much_of_it_is_left(capsys):
    with Reporter() as report:
        for event in (
            Progress("search", 1, 1200, 5000.0),
            Progress("search", 16, 48, 95.0),
            Progress("search", 48, 48, 3.0),
        ):
            report(event)
    assert capsys.readouterr().err.splitlines() == [
        "Searching: 1 trial of about 1,200, 1 h 23 min left",
        "Searching: 16 trials of about 48, 1 min 35 s left",
        "Searching: 48 trials, no time for another batch",
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


# -- where nothing else is said --------------------------------------------------------------------


@pytest.fixture
def often(monkeypatch):
    """Half a minute is a twentieth of a second."""
    monkeypatch.setattr(progress, "EVERY", 0.05)


def lines_while(events, seconds=0.25):
    with Reporter() as report:
        for event in events:
            report(event)
        time.sleep(seconds)


def test_a_long_phase_says_that_it_goes_on(often, capsys):
    lines_while([PhaseStarted("load"), PhaseEnded("load", 0.1), PhaseStarted("capture")])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Loading the model: done in 0.1 s"
    assert len(lines) > 2
    assert all(x.startswith("Capturing residuals: ") and x.endswith(" so far") for x in lines[1:])
    time.sleep(0.1)
    assert not capsys.readouterr().err  # the end is the end


def test_what_is_left_is_said_where_steps_are_counted(often, capsys):
    steps = [Progress("capture target", n, 40) for n in range(1, 11)]
    lines_while([PhaseStarted("capture"), *steps])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Capturing residuals, target prompts: 10 of 40, about ")
    assert lines[0].endswith(" left")


def test_the_outermost_steps_that_are_counted_say_what_is_left(often, capsys):
    search = [PhaseStarted("search", 40), Progress("responses", 3, 4)]
    lines_while(search)
    assert "Searching, generating responses: 3 of 4, about " in capsys.readouterr().err
    lines_while([*search, Progress("search", 10, 40), Progress("responses", 1, 4)])
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("Searching: 10 of 40, about ") for line in lines[1:])


def test_steps_that_begin_again_are_timed_anew(often, capsys):
    with Reporter() as report:
        for event in (PhaseStarted("baseline"), Progress("responses", 39, 40)):
            report(event)
        time.sleep(0.3)
        capsys.readouterr()
        for event in (Progress("passes", 4, 4), Progress("responses", 20, 40)):
            report(event)
        time.sleep(0.07)
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert lines[0].startswith("Measuring the original model, generating responses: 20 of 40")
    left = float(lines[0].partition("about ")[2].split()[0])
    assert left < 0.3


def test_what_a_search_does_within_has_no_bar(on_a_terminal, capsys):
    with Reporter() as report:
        for event in (
            PhaseStarted("search", 4),
            Progress("responses", 1, 4),
            PhaseEnded("search", 1),
        ):
            report(event)
    assert "generating" not in capsys.readouterr().err
    with Reporter() as report:
        for event in (
            PhaseStarted("baseline"),
            Progress("responses", 3, 4),
            Progress("responses", 1, 4),
        ):
            report(event)
    err = capsys.readouterr().err
    assert "generating responses" in err
    assert "1/4" in err


@pytest.mark.parametrize("how", [{"quiet": True}, {"json_events": True}])
def test_nothing_is_said_beside_silence_or_json(often, capsys, how):
    with Reporter(**how) as report:
        report(PhaseStarted("capture"))
        time.sleep(0.2)
    out, err = capsys.readouterr()
    assert not err
    assert len(out.splitlines()) <= 1


def test_json_lines_have_no_bare_nan(capsys):
    """JSON has no NaN; the record writes such numbers by name, and so do events."""
    scores = {"drift": float("nan"), "a": float("inf"), "b": float("-inf")}
    with Reporter(json_events=True) as report:
        report(TrialMeasured(1, scores, True))
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line, parse_constant=pytest.fail)["scores"]
    assert found == {"drift": "NaN", "a": "Infinity", "b": "-Infinity"}


EVIL = "\x1b[2J\x9b1mred\u202egnp.exe\u2028\x07[bold]b[/]"


@pytest.mark.parametrize("bars", [False, True])
def test_names_and_notes_of_others_do_nothing_to_a_terminal(bars, monkeypatch, capsys):
    if bars:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "200")
    with Reporter() as report:
        report(PhaseStarted(f"measure {EVIL}"))
        report(PhaseEnded(f"measure {EVIL}", 1.0))
        report(Notice(f"{EVIL}\nexcise: all is well"))
    err = capsys.readouterr().err
    assert "\\x1b[2J\\x9b1mred\\u202egnp.exe\\u2028\\x07[bold]b[/]" in err
    assert not {"\x1b[2J", "\x9b", "\u202e", "\u2028", "\x07"} & set(err)
    assert "\x1b[2J" not in err
    assert not any(line.startswith("excise:") for line in err.splitlines())
