"""How tokens are drawn: as softmax says, alike for every row."""

from __future__ import annotations

import math

import pytest
import torch

from excise.chat.sampling import Dice, Sampling, likeliest
from excise.errors import ConfigError

LOGITS = torch.tensor([2.0, 0.5, 0.0, -1.0, float("-inf")])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_softmax_says(temperature):
    draws, counts = 4000, torch.zeros(5)
    dice = Dice(Sampling(temperature), 3)
    for _ in range(draws):
        counts[dice.next(LOGITS[None])] += 1
    expected = (LOGITS / temperature).softmax(-1)
    for share, p in zip((counts / draws).tolist(), expected.tolist(), strict=True):
        assert abs(share - p) <= 4.5 * math.sqrt(p * (1 - p) / draws)


def test_the_likeliest_token_at_temperature_zero():
    assert Dice(Sampling(), 0).next(torch.stack([LOGITS, -LOGITS[:4].repeat(2)[:5]])).tolist() == [
        0,
        3,
    ]


def test_rows_share_their_noise_and_answers_do_not():
    warm = Sampling(1.0, seed=7)
    logits = torch.zeros(3, 10**5)
    first = [Dice(warm, 0).next(logits).tolist() for _ in range(2)]
    assert first[0] == first[1]
    assert len(set(first[0])) == 1
    drawn = {
        tuple(Dice(Sampling(1.0, seed=s), n).next(logits).tolist())
        for s, n in [(7, 0), (7, 1), (8, 0)]
    }
    assert len(drawn) == 3


def test_the_likeliest_first_tokens():
    ((best, *others),) = likeliest(LOGITS[None])
    assert best == (0, pytest.approx(float(LOGITS.softmax(-1)[0])))
    assert [token for token, _ in others] == [1, 2, 3, 4]
    assert likeliest(torch.zeros(2, 3))[1][0][1] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "fields", [{"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": 9},
               {"limit": 0}, {"limit": 10**9}, {"seed": -1}, {"seed": 1 << 63}]
)  # fmt: skip
def test_values_out_of_range_are_refused(fields):
    with pytest.raises(ConfigError):
        Sampling(**fields)
