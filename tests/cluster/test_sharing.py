"""A batch is shared out whole and in order; rounding is told from another model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from excise.cluster.sharing import disagreement, patience, shares


@given(st.lists(st.integers(), max_size=40), st.integers(1, 50))
def test_shares_are_the_batch_in_order_and_as_even_as_can_be(batch, workers):
    parts = shares(batch, workers)
    assert [one for part in parts for one in part] == batch
    assert len(parts) == workers
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_a_slow_worker_is_waited_for_and_a_hanging_one_is_not():
    assert patience(0.1, least=5) == 5
    assert patience(60, least=5) == 600


@pytest.mark.parametrize(
    ("mine", "theirs", "differs"),
    [
        ({"drift": (0.01, 100)}, {"drift": (0.010001, 100)}, False),
        ({"drift": (0.01, 100)}, {"drift": (0.0102, 100)}, True),
        ({"drift": (1e-9, 100)}, {"drift": (5e-9, 100)}, False),
        ({"behaviour_rate": (0.5, 40)}, {"behaviour_rate": (0.525, 40)}, False),
        ({"behaviour_rate": (0.5, 40)}, {"behaviour_rate": (0.55, 40)}, True),
        ({"drift": (0.01, 100)}, {}, True),
    ],
)
def test_rounding_is_no_disagreement(mine, theirs, differs):
    found = disagreement(mine, theirs)
    assert (found is not None) == differs
    if differs and theirs:
        assert "there and" in found
