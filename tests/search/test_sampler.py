"""The sampler is told of a bounded number of trials, and answers a function of what it is told."""

from __future__ import annotations

import random

import pytest
from toy_search import SPACE

from excise.search import sampler
from excise.search.pareto import Objective, Point, pareto
from excise.search.sampler import Sampler, telling

GOALS = [Objective("0"), Objective("1")]


def drawn(count: int, seed: int = 0, grid: int = 0) -> list[tuple[float, float]]:
    draw = random.Random(seed)
    found = [(draw.random(), draw.random()) for _ in range(count)]
    return [(round(a * grid) / grid, round(b * grid) / grid) for a, b in found] if grid else found


def test_of_few_trials_the_sampler_is_told_of_all():
    assert telling(drawn(sampler.MOST)) == list(range(sampler.MOST))
    assert telling([]) == []


@pytest.mark.parametrize("grid", [0, 1, 3, 40])
@pytest.mark.parametrize("count", [sampler.MOST + 1, 400, 3359])
def test_of_many_it_is_told_of_the_front_and_of_the_last(count, grid):
    told = drawn(count, grid=grid)
    places = telling(told)
    assert places == sorted(set(places))
    assert len(places) <= sampler.MOST
    front = pareto([Point(n, one) for n, one in enumerate(told)], GOALS)
    assert {p.number for p in front} <= set(places)
    late = range(count - (sampler.MOST - sampler.BEST), count)
    assert set(late) <= set(places)


def test_of_a_front_that_is_too_long_it_is_told_of_every_part():
    count = 5 * sampler.MOST
    told = [(n / count, 1 - n / count) for n in range(count)]
    random.Random(1).shuffle(told)
    firsts = sorted(told[place][0] for place in telling(told))
    assert len(firsts) == sampler.MOST
    gaps = [b - a for a, b in zip([0.0, *firsts], [*firsts, 1.0], strict=True)]
    assert max(gaps) < 2 / sampler.BEST


def known_of(count: int, seed: int = 0) -> list:
    asker = Sampler(SPACE, 2, 128, seed)
    params = asker.ask([], range(count), count)
    return [(one, told) for one, told in zip(params, drawn(count, seed), strict=True)]


def test_a_batch_depends_on_the_seed_the_numbers_and_what_is_told_alone():
    known = known_of(20)
    batch = Sampler(SPACE, 2, 24, 0).ask(known, range(20, 24), 8)
    assert batch == Sampler(SPACE, 2, 24, 0).ask(known, range(20, 24), 8)
    assert batch != Sampler(SPACE, 2, 24, 1).ask(known, range(20, 24), 8)
    assert batch != Sampler(SPACE, 2, 24, 0).ask(known, range(24, 28), 8)
    other = [(one, tuple(1 - value for value in told)) for one, told in known]
    assert batch != Sampler(SPACE, 2, 24, 0).ask(other, range(20, 24), 8)
    assert len({str(one) for one in batch}) == 4


def test_random_trials_do_not_depend_on_the_trials_before_them():
    random_ones = Sampler(SPACE, 2, 24, 0).ask(known_of(20), range(20, 24), 21)
    assert random_ones == Sampler(SPACE, 2, 24, 0).ask([], range(20, 24), 1)


def test_a_long_search_is_not_taken_for_one_that_begins(monkeypatch):
    monkeypatch.setattr(sampler, "MOST", 10)
    monkeypatch.setattr(sampler, "BEST", 4)
    known = known_of(30)
    asked = Sampler(SPACE, 2, 24, 0).ask(known, range(30, 32), 20)
    assert asked != Sampler(SPACE, 2, 24, 0).ask([], range(30, 32), 1)
    few = [known[place] for place in telling([told for _, told in known])]
    assert asked == Sampler(SPACE, 2, 24, 0).ask(few, range(30, 32), 10)
