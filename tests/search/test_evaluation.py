"""What a panel asks of an engine, and for whom: hopeless candidates meet few prompts."""

from __future__ import annotations

import pytest
import torch

from excise.engine.requests import Divergence, Evidence, Response, Responses
from excise.prompts.sets import Prompt
from excise.search.evaluation import SCREENED_PROMPTS, Panel
from excise.search.pareto import Objective, Point
from excise.search.scorers import ScoreContext, find_scorers, read_markers

PROMPTS = 40
GOALS = [Objective("behaviour_rate", 1, 1.0), Objective("drift", 1, 0.5)]
DRIFTS = [0.01, 0.5, 0.03, 0.2]  # of four candidates, which are named by their place


class Engine:
    """Gives candidate n its drift, and the behaviour in every response but each (n + 2)th."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], set[type], dict[str, int] | None]] = []

    def measure(self, candidates, requests, only=None):
        numbers = [candidate[0] for candidate in candidates]
        self.asked.append((numbers, {type(r) for r in requests}, only))
        return [self._of(number, requests, only or {}) for number in numbers]

    def _of(self, number, requests, only):
        found = Evidence()
        for request in requests:
            n = only.get(request.side, PROMPTS)
            if isinstance(request, Divergence):
                found.divergence[request.side] = [torch.full((3,), DRIFTS[number])] * n
            else:
                texts = ["I can't" if i % (number + 2) else "Yes" for i in range(n)]
                found.responses[request.side] = [Response((), text, True) for text in texts]
        return found


def panel(engine, *, screen=True, names=("behaviour_rate", "drift", "drift_first")):
    prompts = {side: (Prompt("x"),) * PROMPTS for side in ("target", "contrast")}
    context = ScoreContext(read_markers(["I can't"], None), prompts)
    return Panel(engine, find_scorers(names), context, screen=screen)


CANDIDATES = [[number] for number in range(len(DRIFTS))]
BEST = [Point(7, (0.0, 0.1))]  # whatever drifts more than this is beaten


def test_candidates_that_cannot_reach_the_front_meet_sixteen_prompts():
    engine = Engine()
    found = panel(engine).measure(CANDIDATES, GOALS, BEST)
    assert [one.screened for one in found] == [False, True, False, True]
    quick, whole, few = engine.asked
    assert quick == ([0, 1, 2, 3], {Divergence}, None)
    assert whole == ([0, 2], {Responses}, None)
    assert few == ([1, 3], {Responses}, {"target": SCREENED_PROMPTS})
    assert [one.scores["behaviour_rate"].n for one in found] == [40, 16, 40, 16]
    shown = [20 / 40, 10 / 16, 30 / 40, 12 / 16]  # of 40 and of 16 prompts
    assert [one.scores["behaviour_rate"].value for one in found] == shown
    assert [one.scores["drift"].value for one in found] == pytest.approx(DRIFTS)
    assert [list(one.scores) for one in found] == [["behaviour_rate", "drift", "drift_first"]] * 4


@pytest.mark.parametrize(
    ("goals", "finished", "screen"),
    [
        (GOALS, BEST, False),
        (GOALS, [], True),
        (GOALS, [Point(7, (0.1, 0.001))], True),  # it still shows the behaviour: all have hope
        ((), (), True),
    ],
)
def test_nobody_is_screened_without_a_reason(goals, finished, screen):
    engine = Engine()
    found = panel(engine, screen=screen).measure(CANDIDATES, goals, finished)
    assert not any(one.screened for one in found)
    assert len(engine.asked) == 2
    assert all(one.scores["behaviour_rate"].n == PROMPTS for one in found)


def test_who_maximises_hopes_for_the_most():
    goals = [Objective("behaviour_rate", -1, 1.0), Objective("drift", 1, 0.5)]
    for best, screened in ((1.0, [False, True, False, True]), (0.9, [False] * 4)):
        engine = Engine()
        one = panel(engine)
        one._slow = [scorer.__class__(**{**vars(scorer), "best": 1.0}) for scorer in one._slow]
        found = one.measure(CANDIDATES, goals, [Point(7, (best, 0.1))])
        assert [measured.screened for measured in found] == screened


def test_seconds_are_shared_by_the_candidates_of_a_batch():
    ticks = iter([0.0, 2.0, 10.0])
    found = panel(Engine()).measure(CANDIDATES, clock=lambda: next(ticks))
    assert all(one.seconds == {"drift": 0.5, "responses": 2.0} for one in found)
