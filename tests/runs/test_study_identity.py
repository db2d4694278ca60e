"""What a study's trials belong to: everything that decides what a trial of the same parameters measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from excise import events
from excise.checkpoints.loading import load
from excise.config import load_config
from excise.judges.markers import Markers
from excise.methods.registry import settle
from excise.prompts.chat_template import ChatFormat
from excise.prompts.measured_sets import MeasuredSet, MeasuredSets
from excise.prompts.sets import Prompt
from excise.runs.session import Session
from excise.runs.study_identity import digests, identity
from excise.search.scoring import Scoring


@pytest.fixture(scope="module")
def found(tiny: Path):
    """The digests of an identity, of settings as they are given."""
    section = load_config(flags={"model.source": str(tiny / "model")}).model
    loaded = load(section)
    roles = (
        "target",
        "contrast",
        "target_eval",
        "contrast_eval",
        "target_holdout",
        "contrast_holdout",
    )

    def of(flags=None, answer=None, text="a", phrase="b", template="", batch=4, directions=None):
        config = load_config(flags={"method": "directional", **(flags or {})})
        prompts = {role: (Prompt(text + role, answer),) for role in roles}
        sets = {role: MeasuredSet(role, "x", some, [[]]) for role, some in prompts.items()}
        measured, scoring = (
            MeasuredSets(sets, ChatFormat(None, template)),
            Scoring(Markers((phrase,))),
        )
        session = Session(settle(config, loaded), loaded, measured, scoring, events.ignore)
        return digests(identity(session, batch))

    return of


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"flags": {"edit.row_norms": "none"}}, "edit"),
        ({"flags": {"edit.post_norms": False}}, "edit"),
        ({"flags": {"edit.components": ["attn.o_proj"]}}, "edit"),
        ({"flags": {"directions.winsor": 0.9}}, "directions"),
        ({"flags": {"directions.projected": True}}, "directions"),
        ({"flags": {"directions.center": "geometric_median"}}, "directions"),
        ({"flags": {"goal": "strengthen"}}, "goal"),
        ({"flags": {"seed": 1}}, "seed"),
        ({"flags": {"scores.max_new_tokens": 5}}, "scores"),
        ({"flags": {"scores.objectives": ["drift"]}}, "scores"),
        ({"flags": {"prompts.system": "x"}}, "template"),
        ({"flags": {"prompts.suffix": "x"}}, "template"),
        ({"answer": "c"}, "answers"),
        ({"text": "c"}, "prompts"),
        ({"phrase": "c"}, "markers"),
        ({"batch": 8}, "batch"),
    ],
)
def test_each_of_these_is_part_of_it(found, change, part):
    before, after = found(), found(**change)
    assert [name for name in before if before[name] != after[name]] == [part]


def test_what_decides_no_figure_is_not(found):
    flags = {"search.trials": 3, "description": "x", "scores.final": ["kept"], "export.formats": []}
    assert found() == found(flags)


def test_methods_have_their_own_settings(found):
    ridge, other = ({"method": "ridge"}, {"method": "ridge", "ridge.rank": 2})
    assert found(ridge)["ridge"] != found(other)["ridge"]
    assert "ridge" not in found()
