"""What a panel asks of an engine, and what it makes of the answers."""

from __future__ import annotations

import pytest
import torch

from excise.engine.requests import Divergence, Evidence, Response, Responses
from excise.judges.markers import read_markers
from excise.prompts.sets import Prompt
from excise.search.evaluation import Panel
from excise.search.score_context import ScoreContext
from excise.search.scorers import find_scorers

PROMPTS = 40
DRIFTS = [0.01, 0.5, 0.03, 0.2]  # of four candidates, which are named by their place
CANDIDATES = [[number] for number in range(len(DRIFTS))]
NAMES = ("behaviour_rate", "drift", "drift_first")


class Engine:
    """Gives candidate n its drift, and the behaviour in every response but each (n + 2)th."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], list[type]]] = []

    def measure(self, candidates, requests):
        numbers = [candidate[0] for candidate in candidates]
        self.asked.append((numbers, [type(r) for r in requests]))
        return [self._of(number, requests) for number in numbers]

    def _of(self, number, requests):
        found = Evidence()
        for request in requests:
            if isinstance(request, Divergence):
                found.divergence[request.side] = [torch.full((3,), DRIFTS[number])] * PROMPTS
            else:
                texts = ["I can't" if i % (number + 2) else "Yes" for i in range(PROMPTS)]
                found.responses[request.side] = [Response((), text, True) for text in texts]
        return found


def panel(engine):
    prompts = {side: (Prompt("x"),) * PROMPTS for side in ("target", "contrast")}
    context = ScoreContext(read_markers(["I can't"], None), prompts)
    return Panel(engine, find_scorers(NAMES), context)


def test_all_scorers_ask_together_and_every_candidate_has_its_own_scores():
    engine = Engine()
    found = panel(engine).measure(CANDIDATES)
    everyone = [0, 1, 2, 3]
    assert engine.asked == [(everyone, [Divergence, Divergence]), (everyone, [Responses])]
    assert [one.scores["behaviour_rate"].n for one in found] == [PROMPTS] * 4
    shown = [20 / 40, 26 / 40, 30 / 40, 32 / 40]
    assert [one.scores["behaviour_rate"].value for one in found] == shown
    assert [one.scores["drift"].value for one in found] == pytest.approx(DRIFTS)
    assert [tuple(one.scores) for one in found] == [NAMES] * 4


def test_seconds_are_shared_by_the_candidates_of_a_batch():
    ticks = iter([0.0, 2.0, 2.0, 10.0])
    found = panel(Engine()).measure(CANDIDATES, clock=lambda: next(ticks))
    assert all(one.seconds == {"drift": 0.5, "responses": 2.0} for one in found)
