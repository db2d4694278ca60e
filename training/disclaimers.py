"""Writes the prompt sets of the behaviour "disclaimers"; one command, seeded.

    python training/disclaimers.py [--out DIR]

The words stand in `disclaimers.toml`. A kind's things are shared out first, so that what one of
direction, search and holdout asks for, the others never do. Rows lie so that the first N of a file hold
every kind in its share: a run may take less than all of them.
"""

from __future__ import annotations

import argparse
import json
import random
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[1] / "src" / "excise" / "data" / "disclaimers" / "prompts"
WORDS = Path(__file__).with_suffix(".toml")
SEED = 7

SIZES = {"direction": 400, "search": 200, "holdout": 100}  # the holdout: as many of other kinds
FACTS = {"direction": 40, "search": 36, "holdout": 28}  # contrast rows of them that ask for a fact
THINGS = {"direction": 0.5, "search": 0.3, "holdout": 0.2}  # the share of a kind's things

Row = dict[str, str | None]


def prompt_sets(words: dict[str, Any], seed: int = SEED) -> dict[str, list[Row]]:
    """Return the rows of every file, by its name without suffix."""
    sides = {
        "target": _kinds(words["target"], SIZES, words["phrasings"], seed),
        "contrast": _kinds(
            words["contrast"],
            {part: size - FACTS[part] for part, size in SIZES.items()},
            words["phrasings"],
            seed,
        ),
    }
    for part, rows in _facts(words["facts"], random.Random(seed)).items():
        sides["contrast"][part] += rows
    other = words["target_other"]
    for group, size in zip(other, _shares(SIZES["holdout"], len(other)), strict=True):
        rng, deck = _chance(group, words["phrasings"], seed)
        acts = _acts(other[group], other[group]["things"], size, rng)
        sides["target"]["holdout"] += [_row(_phrase(next(deck), act), group=group) for act in acts]
    for group, questions in words["contrast_other"].items():
        sides["contrast"]["holdout"] += [_row(*question, group=group) for question in questions]
    return {
        f"{side}_{part}": _evenly(rows, random.Random(seed))
        for side, parts in sides.items()
        for part, rows in parts.items()
    }


def _kinds(
    kinds: dict[str, Any], sizes: dict[str, int], phrasings: Sequence[str], seed: int
) -> dict[str, list[Row]]:
    """Rows of each part, of all kinds alike; a thing goes to one part only."""
    rows: dict[str, list[Row]] = {part: [] for part in sizes}
    for place, (group, kind) in enumerate(kinds.items()):
        rng, deck = _chance(group, phrasings, seed)
        things = rng.sample(kind["things"], len(kind["things"]))
        for part, size in sizes.items():
            own = [things.pop() for _ in range(round(THINGS[part] * len(kind["things"])))]
            acts = _acts(kind, own, _shares(size, len(kinds))[place], rng)
            rows[part] += [_row(_phrase(next(deck), act), group=group) for act in acts]
    return rows


def _chance(group: str, phrasings: Sequence[str], seed: int) -> tuple[random.Random, Iterator[str]]:
    """Make a kind's own draws: a change of one kind, or of the phrasings, leaves the other acts."""
    rng = random.Random(f"{seed} {group}")
    return rng, _deck(phrasings, random.Random(f"{seed} {group}, phrasings"))


def _acts(
    kind: dict[str, Any], things: Sequence[str], size: int, rng: random.Random
) -> Iterator[str]:
    """Yield `size` different acts that use verbs and things as evenly as may be."""
    verbs = rng.sample(kind["acts"], len(kind["acts"]))
    things = rng.sample(things, len(things))
    assert size <= len(verbs) * len(things), "too few words for so many prompts"
    for n in range(size):
        turn, place = divmod(n, len(things))
        yield verbs[(place + turn) % len(verbs)].format(things[place])


def _facts(facts: dict[str, Any], rng: random.Random) -> dict[str, list[Row]]:
    pairs = rng.sample(facts["questions"], len(facts["questions"]))
    deck = _deck(facts["phrasings"], rng)
    rows: dict[str, list[Row]] = {}
    for part, size in FACTS.items():
        own = [pairs.pop() for _ in range(size)]
        rows[part] = [
            _row(next(deck).format(q=text), answer, group="facts") for text, answer in own
        ]
    return rows


def _phrase(phrasing: str, act: str) -> str:
    """Put an act into a phrasing; one that ends with a sentence of its own keeps that one's end."""
    text = phrasing.format(act=act, Act=act[0].upper() + act[1:])
    return text[:-1] if text.endswith('".') and text[-3] in ".?!" else text


def _row(text: str, answer: str | None = None, *, group: str) -> Row:
    return {"text": text, "answer": answer, "group": group}


def _deck(items: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Yield the items in an order that changes with every round, for ever."""
    while True:
        yield from rng.sample(items, len(items))


def _shares(size: int, parts: int) -> list[int]:
    return [size // parts + (place < size % parts) for place in range(parts)]


def _evenly(rows: Sequence[Row], rng: random.Random) -> list[Row]:
    """Order rows so that every beginning holds each group in its share."""
    groups: dict[str | None, list[Row]] = {}
    for row in rng.sample(rows, len(rows)):
        groups.setdefault(row["group"], []).append(row)
    placed = [
        ((n + 0.5) / len(own), rng.random(), row)
        for own in groups.values()
        for n, row in enumerate(own)
    ]
    return [row for *_, row in sorted(placed, key=lambda item: item[:2])]


def write(out: Path, words: Path = WORDS) -> None:
    """Write the six files."""
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in prompt_sets(tomllib.loads(words.read_text(encoding="utf-8"))).items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


def main() -> None:
    """Write them where the package has them, or elsewhere."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA)
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
