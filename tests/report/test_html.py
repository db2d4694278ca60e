"""The report: one file, no network, nothing in a record becomes markup, missing parts left out."""

from __future__ import annotations

import base64
import hashlib
import json
from html.parser import HTMLParser
from typing import Any

import pytest
from plotly.offline import get_plotlyjs
from records import HOSTILE, LAYERS, SECRET_PROMPT, hostile_record, make_record, minimal_record

from excise.record import Record, ScoreRecord
from excise.report.figures import front_figure, profile_figure
from excise.report.formatting import number
from excise.report.html import html_report
from excise.report.stored_record import read_record, write_record
from excise.report.views import front_points, shape


class Page(HTMLParser):
    """What a browser would make of the page: its elements, texts and scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self._open = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            attrs, text = self.scripts[-1]
            self.scripts[-1] = (attrs, text + data)
        elif self._open != "style":
            self.text += data

    @property
    def sections(self) -> set[str]:
        return {str(a["id"]) for tag, a in self.elements if tag == "section"}

    @property
    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0][1])
        return found


def page(record: Record) -> Page:
    return Page(html_report(record))


@pytest.fixture(scope="module")
def whole() -> Page:
    return page(make_record())


def test_a_whole_record_has_every_section(whole: Page) -> None:
    assert whole.sections == {
        "scores", "front", "trials", "profile", "separation", "importance", "samples", "coverage",
        "exports", "prompts", "facts", "timing", "versions",
    }  # fmt: skip
    plots = {str(a["id"]) for _, a in whole.elements if a.get("class") == "plot"}
    assert plots == {f"plot-{name}" for name in whole.figures}


def test_figures_stand_in_the_page(whole: Page) -> None:
    record = make_record()
    for name in ("behaviour_rate", "drift"):
        for scores in (record.chosen().scores, record.holdout):
            assert number(name, scores[name].value) in whole.text
    for point in front_points(record):
        assert point.words in whole.text
    assert SECRET_PROMPT in whole.text  # samples are shown: the record holds benign ones only
    assert "/home/someone" not in whole.text


def test_phases_have_the_names_of_the_progress() -> None:
    text = page(make_record(timing={"plan": 1.0, "capture": 2.0, "convert q8_0": 3.0})).text
    for words in ("Finding the batch size", "Capturing residuals", "Converting to q8_0"):
        assert words in text


def test_the_page_needs_no_network(whole: Page) -> None:
    for tag, attrs in whole.elements:
        assert tag not in {"link", "iframe", "img", "base", "object"}
        assert not {"src", "href", "srcset"} & attrs.keys()
    assert "default-src 'none'" in policy(whole)


def policy(found: Page) -> str:
    return next(
        str(a["content"])
        for _, a in found.elements
        if a.get("http-equiv") == "Content-Security-Policy"
    )


@pytest.mark.parametrize("make", [make_record, hostile_record, minimal_record])
def test_only_the_packages_own_scripts_may_run(make: Any) -> None:
    found = page(make())
    data, *scripts = found.scripts
    assert data[0] == {"type": "application/json", "id": "figures"}
    assert len(scripts) == 2
    assert scripts[0][1] == get_plotlyjs()
    for _, text in scripts:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy(found)


def test_nothing_in_a_record_becomes_markup(whole: Page) -> None:
    hostile = page(hostile_record())
    assert {tag for tag, _ in hostile.elements} <= {tag for tag, _ in whole.elements}
    assert HOSTILE in hostile.text
    assert not [a for _, a in hostile.elements if "onerror" in a]
    # Plotly reads HTML in labels: what comes from the record must be escaped there once more.
    for text in strings(hostile.figures):
        assert "<script" not in text
        assert "<img" not in text


def strings(tree: Any) -> list[str]:
    if isinstance(tree, str):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [text for value in values for text in strings(value)]


def test_missing_parts_are_left_out() -> None:
    found = page(minimal_record())
    assert found.sections == {"scores", "front", "trials", "facts"}
    assert list(found.figures) == ["front"]
    assert "Holdout" not in found.text
    assert "optimistic" in found.text


def test_a_run_without_a_choice_renders() -> None:
    found = page(make_record(selected=None, holdout={}))
    assert "profile" not in found.sections
    assert "The chosen edit" not in found.text
    assert "Search: original" in found.text
    assert "Search: edited" not in found.text


def test_a_run_without_trials_renders() -> None:
    found = page(minimal_record(trials=[], front=[], selected=None, baseline={}))
    assert found.figures == {}


def test_the_front_figure_shows_every_measured_trial_once() -> None:
    record = make_record()
    figure = front_figure(record)
    assert figure is not None
    points = {trace.name: len(trace.x) for trace in figure.data}
    measured = [t for t in record.trials if t.scores]
    assert points["front"] == len(record.front)
    assert points["chosen"] == points["original"] == 1
    assert points["other trials"] == len(measured) - len(record.front)


def test_zero_drift_stands_at_the_left_end_of_the_logarithmic_axis() -> None:
    record = make_record()
    figure = front_figure(record)
    assert figure is not None
    axis = figure.layout.xaxis
    assert axis.type == "log"
    assert axis.ticktext[0] == "0"
    original = next(trace for trace in figure.data if trace.name == "original")
    assert original.x[0] == axis.tickvals[0] > 0
    assert all(min(trace.x) >= axis.tickvals[0] for trace in figure.data)


def test_noise_does_not_stretch_the_axis() -> None:
    data = make_record().model_dump(by_alias=True)
    data["trials"][0]["scores"]["drift"]["value"] = 1e-14
    data["trials"][1]["scores"]["drift"]["value"] = -1e-9
    figure = front_figure(Record.model_validate(data))
    assert figure is not None
    low, high = figure.layout.xaxis.range
    assert high - low < 7


def test_all_zero_drift_is_drawn_on_a_plain_axis() -> None:
    figure = front_figure(minimal_record())
    assert figure is not None
    assert figure.layout.xaxis.type is None


def test_other_objectives_are_drawn_too() -> None:
    data = make_record().model_dump(by_alias=True)
    for trial in data["trials"]:
        if trial["scores"]:
            trial["scores"]["MMLU"] = {"value": 0.5, "n": 20}
    data |= {"objectives": ["behaviour_rate", "MMLU"], "goals": ["minimize", "maximize"]}
    figure = front_figure(Record.model_validate(data))
    assert figure is not None
    assert figure.layout.xaxis.title.text == "MMLU"
    data |= {"objectives": ["behaviour_rate"], "goals": ["minimize"]}
    assert front_figure(Record.model_validate(data)) is None
    assert "front" not in page(Record.model_validate(data)).sections


def test_the_profile_is_that_of_the_chosen_trial() -> None:
    record = make_record()
    found = shape(record, record.chosen())
    assert found is not None
    figure = profile_figure(found)
    assert [trace.name for trace in figure.data] == ["attn.o_proj", "mlp.down_proj"]
    assert all(len(trace.y) == LAYERS for trace in figure.data)
    lines = [s for s in figure.layout.shapes if s.x0 == found.index]
    assert len(lines) == (found.index is not None)


def test_the_profile_of_ridge_has_a_line_for_components_that_go_less_far() -> None:
    params = {
        "max_weight_position": 2.0,
        "min_weight": 0.5,
        "min_weight_distance": 9.0,
        "overshoot": 1.0,
        "mlp.down_proj.share": 0.25,
    }
    record = make_record()
    trial = record.chosen().model_copy(update={"params": params})
    found = shape(record.model_copy(update={"method": "ridge"}), trial)
    assert found is not None
    whole, less = found.strengths["attn.o_proj"], found.strengths["mlp.down_proj"]
    assert whole[2] == 2.0
    assert less == [0.25 * strength for strength in whole]


def test_a_record_of_an_edit_that_broke_the_model_is_read_back(tmp_path):
    record = make_record()
    broken = {**record.holdout, "drift": ScoreRecord(value=float("inf"), n=10)}
    write_record(tmp_path, record.model_copy(update={"holdout": broken}))
    assert read_record(tmp_path).holdout["drift"].value == float("inf")
