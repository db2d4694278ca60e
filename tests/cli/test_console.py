"""What is shown of a record: tables of any width, and texts of others as they are."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from records import make_record, minimal_record
from rich.console import Console

from excise.cli.console import comparison_table, figures_table, front_table, show_result


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    """No test depends on the terminal it is started from."""
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


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
    assert f"Pareto front: {len(record.front)} of 120 trials" in text
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
    assert "Pareto front: 40 of 400 trials, 13 shown" in text
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
    assert "Pareto front: 1 of 1 trials" in drawn(front_table(record), width)
    assert "Chosen: trial 0" in drawn(figures_table(record), width)


@pytest.mark.parametrize("group", ["[bold]", "[/bold]", "a[1]"])
def test_group_names_come_from_users_and_are_shown_as_they_are(group):
    record = make_record()
    score = record.holdout["behaviour_rate"]
    part = score.model_copy(update={"parts": None})
    changed = score.model_copy(update={"parts": {group: part}})
    record = record.model_copy(update={"holdout": {"behaviour_rate": changed}})
    assert group in drawn(figures_table(record), 120)


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (4, 4), (5, 2), (20, 2)])
def test_of_many_groups_the_furthest_apart_have_a_row(count, rows):
    record = make_record()
    score = record.holdout["behaviour_rate"]
    part = score.model_copy(update={"parts": None, "n": 50})
    values = [(7 * n % count) / 50 for n in range(count)]
    parts = {f"kind {n}": part.model_copy(update={"value": v}) for n, v in enumerate(values)}
    holdout = {"behaviour_rate": score.model_copy(update={"parts": parts})}
    shown = drawn(figures_table(record.model_copy(update={"holdout": holdout})), 80).splitlines()
    named = [line.split()[1] for line in shown if line.strip().startswith("kind")]
    assert len(named) == rows
    assert {str(values.index(end(values))) for end in (min, max)} <= set(named)
    said = [line.strip() for line in shown if "more" in line]
    assert said == ([f"{count - 2} more in report"] if rows < count else [])


def test_groups_of_a_few_prompts_have_no_row():
    record = make_record()
    score = record.holdout["behaviour_rate"]
    part = score.model_copy(update={"parts": None})
    parts = {
        "pets": part.model_copy(update={"n": 4}),
        "driving": part.model_copy(update={"n": 5}),
        "verse": part.model_copy(update={"n": 32, "interval": None}),  # tokens of one response
    }
    holdout = {"behaviour_rate": score.model_copy(update={"parts": parts})}
    shown = drawn(figures_table(record.model_copy(update={"holdout": holdout})), 120)
    assert "driving" in shown
    assert "pets" not in shown
    assert "verse" not in shown


@pytest.mark.parametrize("width", [80, 120])
def test_a_result_shows_front_figures_samples_and_places(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    record = make_record()
    show_result(record, Path("/runs/one"))
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    sample = record.samples[0]
    for word in (
        sample.before,
        sample.after,
        sample.answer,
        "/runs/one/report.html",
        "Pareto front: ",
    ):
        assert word in text
    assert (
        text.index("Pareto front: ") < text.index("Chosen: ") < text.index("/runs/one/report.html")
    )


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


def test_texts_of_others_do_nothing_to_a_terminal(monkeypatch, capsys):
    """Names of scores, groups and rules, prompts, responses and folders: of a record from anywhere."""
    monkeypatch.setenv("COLUMNS", "240")
    evil = "\x1b[2J\x9b1m\u202e\u2028\u200b\x07[bold]x[/]"
    shown = "\\x1b[2J\\x9b1m\\u202e\\u2028\\u200b\\x07[bold]x[/]"
    record = make_record()
    score = record.holdout["behaviour_rate"].model_copy(update={"parts": None})
    grouped = score.model_copy(update={"parts": {evil: score}})
    sample = record.samples[0].model_copy(
        update={"prompt": evil, "before": f"{evil}\nmore", "after": evil, "answer": evil}
    )
    chosen = record.chosen()
    trials = [
        t.model_copy(update={"scores": {**t.scores, evil: score}}) if t is chosen else t
        for t in record.trials
    ]
    update = {
        "holdout": {"behaviour_rate": grouped, evil: score},
        "samples": [sample],
        "trials": trials,
        "objectives": [*record.objectives, evil],
        "selection": evil,
    }
    show_result(record.model_copy(update=update), Path("runs") / evil)
    text = capsys.readouterr().out
    assert not {"\x1b", "\x9b", "\u202e", "\u2028", "\u200b", "\x07"} & set(text)
    assert text.count(shown) >= 8
