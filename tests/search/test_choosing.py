from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toy_search import GOALS, search_in, toy

from excise.errors import ConfigError, RunStateError
from excise.events import ignore
from excise.prompts.sets import Prompt
from excise.record import ScoreRecord, TrialRecord
from excise.search.choosing import Chooser, choose_among, figure
from excise.search.evaluation import to_record
from excise.search.resampling import Draws, StoredDraws
from excise.search.scorers import mean_by_group, rate

PROMPTS = [Prompt(str(n)) for n in range(200)]


def noisy(params, *, seed=0, prompts=30):
    """The toy objectives, each prompt with a luck of its own that all trials share but for a part."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(2, prompts))
    out = []
    for number, measured in enumerate(toy(params)):
        draws, scores = {}, {}
        own = np.random.default_rng([seed, number]).normal(size=(2, prompts))
        for row, (name, side) in enumerate(
            {"behaviour_rate": "target", "drift": "contrast"}.items()
        ):
            totals = measured.scores[name].value + 0.3 * (shared + own)[row]
            draws[name] = StoredDraws.of(Draws(tuple(totals)), side)
            scores[name] = ScoreRecord(value=float(np.mean(draws[name].totals)), n=prompts)
        out.append(replace(measured, scores=scores, draws=draws))
    return out


def searched(folder):
    search = search_in(folder)
    search.run(16, noisy, ignore)
    return search


def test_trials_that_could_be_chosen_are_measured_again_once(tmp_path):
    asked = []

    def again(params):
        asked.extend(params)
        return noisy(params, seed=1, prompts=50)

    chooser = Chooser(searched(tmp_path), "knee", seed=3)
    contenders = chooser.contenders(5)
    front, alone = chooser.choose(chooser.annotated())
    assert len(contenders) == 5
    assert alone.number in front
    regrets = {t.number: t.regret for t in chooser.annotated()}
    assert [t.number for t in contenders] == sorted(regrets, key=regrets.get)[:5]
    chooser.confirm(contenders, again, ignore)
    assert asked == [t.params for t in contenders]
    trials = chooser.annotated()
    front, chosen = chooser.choose(trials)
    confirmed = [t for t in trials if t.confirm]
    assert {t.number for t in confirmed} == {t.number for t in contenders}
    assert chosen.number == min(confirmed, key=lambda t: t.regret).number
    assert chosen.number in front
    assert all(0 <= t.front_probability <= 1 for t in trials)
    # Opened again, the study still has it, and nothing is measured twice.
    later = Chooser(search_in(tmp_path), "knee", seed=3)
    assert later.annotated() == trials
    later.confirm(contenders, again, ignore)
    assert len(asked) == len(contenders)


def test_what_cannot_be_measured_again_is_left_out(tmp_path):
    chooser = Chooser(searched(tmp_path), "knee", seed=3)
    contenders = chooser.contenders(5)

    def fails(params):
        return [replace(one, scores={}, draws={}) for one in toy(params)]

    chooser.confirm(contenders, fails, ignore)
    _, chosen = chooser.choose(chooser.annotated())
    assert chosen is not None
    assert not chosen.confirm
    chooser._search.study.set_user_attr("confirm", {"1": {"scores": 3}})
    with pytest.raises(RunStateError, match="cannot be read"):
        Chooser(search_in(tmp_path), "knee", seed=3)


def test_a_study_without_evidence_is_chosen_from_as_before(tmp_path):
    search = search_in(tmp_path)
    search.run(16, toy, ignore)
    chooser = Chooser(search, "knee", seed=0)
    assert chooser.contenders(5) == []
    trials = chooser.annotated()
    assert {t.front_probability for t in trials} == {None}
    front, chosen = chooser.choose(trials)
    best = min(trials, key=lambda t: sum(t.scores[g.name].value / g.worth for g in GOALS))
    assert chosen.number == best.number
    assert chosen.number in front


def trial(number, shown, n, drift, confirm=None, **more):
    scores = scores_of(shown, n, drift)
    again = None if confirm is None else scores_of(*confirm)
    return TrialRecord(
        number=number, state="complete", params={}, scores=scores, seconds={}, confirm=again, **more
    )


def scores_of(shown, n, drift):
    flags = [k < shown for k in range(n)]
    sums = [drift * (1 + 0.5 * (-1) ** k) for k in range(n)]
    return {
        "behaviour_rate": to_record(rate(flags, PROMPTS[:n])),
        "drift": to_record(mean_by_group(sums, [1] * n, PROMPTS[:n])),
    }


def test_a_figure_is_that_of_all_prompts():
    both = trial(0, 3, 40, 0.1, (9, 60, 0.2))
    whole = to_record(rate([k < 12 for k in range(100)], PROMPTS[:100]))
    found = figure(both, "behaviour_rate")
    assert (found.value, found.n, found.interval) == (whole.value, 100, whole.interval)
    drift = figure(both, "drift")
    assert drift.value == pytest.approx(0.16)
    low, high = drift.interval
    assert high - drift.value == pytest.approx(drift.value - low)
    assert high - drift.value < figure(trial(0, 3, 40, 0.1), "drift").interval[1] - 0.1 + 0.06
    assert figure(trial(0, 3, 40, 0.1), "drift") == trial(0, 3, 40, 0.1).scores["drift"]


def test_limits_with_a_confidence_hold_for_the_bound():
    few, many = trial(0, 0, 20, 0.01), trial(1, 1, 100, 0.05)
    sure = trial(2, 0, 100, 0.2)

    def chosen(rule, *trials):
        found = choose_among(rule, trials, GOALS)
        return None if found is None else found.number

    assert chosen("rate<=0.05", few, many, sure) == 0
    assert chosen("rate<=0.05@95%", few, many, sure) == 1  # of 20 none: up to 12 % of all
    assert chosen("rate<=0.05@98 %", few, many, sure) == 2
    assert chosen("rate<=0.01@95%", few, many, sure) is None
    assert chosen("drift<=0.05@95%", many, few) == 0
    assert chosen("knee", many, few) == 0
    assert chosen("knee", trial(3, 0, 20, 0.0, regret=0.2), trial(4, 9, 20, 1.0, regret=0.1)) == 4


@pytest.mark.parametrize("level", ["50", "100", "101", "0", "1.2.3", "-5", ""])
def test_a_confidence_lies_between_even_and_certain(level):
    with pytest.raises(ConfigError, match="cannot select by"):
        choose_among(f"rate<=0.05@{level}%", [trial(0, 0, 20, 0.1)], GOALS)
