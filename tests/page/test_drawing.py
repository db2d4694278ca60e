"""Figures of pages: text of others is text, whatever it looks like."""

from __future__ import annotations

import json

from records import HOSTILE, make_record

from excise.page import drawing


def test_hostile_names_are_escaped():
    record = make_record()
    figures = [drawing.compared({HOSTILE: record, "other": record}), drawing.history(record)]
    for figure in figures:
        assert "<script" not in json.dumps(figure, default=str)
    assert len(figures[0]["data"]) == 2
    assert [len(trace["x"]) for trace in figures[0]["data"]] == [len(record.front)] * 2


def test_a_run_without_trials_is_an_empty_figure():
    assert list(drawing.front(None)["data"]) == []


def test_every_measured_trial_stands_in_the_history():
    record = make_record(trials=30)
    first, second = drawing.history(record)["data"]
    assert list(first["x"]) == list(second["x"]) == [t.number for t in record.trials if t.scores]
