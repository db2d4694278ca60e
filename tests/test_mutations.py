"""The faults of `make mutants` still apply, and the tests that must notice them are there."""

from __future__ import annotations

import pytest
from mutations import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.fault)
def test_every_fault_still_applies(mutant: Mutant):
    compile(mutant.applied(), mutant.module, "exec")
    files, _, words = mutant.tests.partition(" -k ")
    lines = [line for file in files.split() for line in (ROOT / file).read_text().splitlines()]
    assert any(words in line for line in lines if line.startswith("def test_"))


def test_no_fault_is_there_twice():
    assert len({mutant.applied() for mutant in MUTANTS}) == len(MUTANTS)


def test_a_fault_that_no_longer_applies_is_said():
    gone = Mutant(
        "gone",
        "search/pareto",
        "what never stood there",
        "",
        "tests/methods/test_directional_math.py",
    )
    with pytest.raises(ValueError, match="0 times"):
        gone.applied()
