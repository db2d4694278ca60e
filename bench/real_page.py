"""The part of docs/methods.md on the real model, from `real_methods.json` and `real_methods_notes.md`."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from real_kinds import AT, SCALES
from real_methods import LIMITS, METHODS, RESULTS, is_held

from excise.report.formatting import percent, significant

NOTES = RESULTS.parent / "real_methods_notes.md"
NOT_RUN = "Not run yet: `bench/real_kinds.py` measures it."
Studies = dict[str, list[dict[str, Any]]]


def page() -> list[str]:
    """The notes, with a table in place of every name in brackets; nothing before a study was run."""
    if not RESULTS.exists():
        return []
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    found = studies(results)
    notes = NOTES.read_text(encoding="utf-8").strip()
    tables: dict[str, Callable[[], str]] = {
        "ran": lambda: ran(results, found),
        "searched": lambda: searched(found),
        "same": lambda: held(found, "same", results["original"]),
        "other": lambda: held(found, "other", results["original"]),
        "paired": lambda: paired(results["paired"]),
        "left_out": lambda: left_out(results["left_out"]) if "left_out" in results else NOT_RUN,
        "shapes": lambda: shapes(results["shapes"]) if "shapes" in results else NOT_RUN,
    }
    for name, write in tables.items():
        if f"({name})" in notes:
            notes = notes.replace(f"({name})", write())
    return [notes]


def studies(results: dict[str, Any]) -> Studies:
    """Method -> its studies, by seed."""
    out: Studies = {}
    for name in METHODS:
        seeds = [key for key in results if key.rpartition(" ")[0] == name]
        if seeds:
            out[name] = [results[key] for key in sorted(seeds)]
    return out


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def ran(results: dict[str, Any], found: Studies) -> str:
    """What was run, and at which sizes."""
    sizes, on = results["sizes"], results["machine"]
    trials = ", ".join(
        f"{name} {' + '.join(str(one['trials']) for one in some)}" for name, some in found.items()
    )
    absent = [name for name in METHODS if name not in found]
    trials += f"; none of {', '.join(absent)}" if absent else ""
    where = ", ".join(f"{key}: {value}" for key, value in on.items() if value)
    return (
        f"Trials by method, one number a seed: {trials}; the first {sizes['startup_trials']} of each are "
        f"random. {sizes['direction_size']} + {sizes['direction_size']} direction prompts, "
        f"{sizes['eval_size']} + {sizes['eval_size']} search prompts, {sizes['holdout_size']} + "
        f"{sizes['holdout_size']} holdout prompts, half of them of other kinds; at most "
        f"{sizes['max_new_tokens']} new tokens. {where}."
    )


def over_seeds(values: Sequence[float | None], show: Callable[[float], str]) -> str:
    """The mean, and the range where there are several; seeds without a value are counted."""
    there = [v for v in values if v is not None]
    if not there:
        return "none"
    text = show(statistics.mean(there))
    if len(there) > 1:
        text += f" [{show(min(there))}, {show(max(there))}]"
    missing = len(values) - len(there)
    return text + (f", none in {missing} of {len(values)}" if missing else "")


def mean(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return statistics.mean(there) if there else None


def over(values: Sequence[float | None], base: Sequence[float | None]) -> str:
    """The ratio of two means, in brackets."""
    a, b = mean(values), mean(base)
    return "" if a is None or b is None else f" ({a / b:.2f} x)"


def at(some: Sequence[dict[str, Any]], limit: float, where: str, score: str) -> list[float | None]:
    """A score of the point at a limit, by seed."""
    points = [one["least"][str(limit)] for one in some]
    return [None if p is None else p[where][score] for p in points]


def searched(found: Studies) -> str:
    rows = []
    for name, some in found.items():
        cells = []
        for limit in LIMITS:
            values = at(some, limit, "search", "drift")
            base = at(found["directional"], limit, "search", "drift")
            cells.append(over_seeds(values, significant) + over(values, base))
        first = at(some, AT, "search", "drift_first")
        cells.append(over_seeds(first, significant))
        rows.append([name, *cells])
    head = [f"rate at most {percent(limit)}" for limit in LIMITS]
    return table(["method", *head, f"first token, at most {percent(AT)}"], rows)


def held(found: Studies, half: str, original: dict[str, Any]) -> str:
    """The points at LIMITS, measured on one half of the holdout: rate and KL, true answers."""
    rows = []
    absent = [name for name, some in found.items() if not any(map(is_held, some))]
    found = {
        name: list(filter(is_held, some)) for name, some in found.items() if name not in absent
    }
    for name, some in found.items():
        cells = []
        for limit in LIMITS:
            values = at(some, limit, half, "drift")
            base = at(found["directional"], limit, half, "drift")
            rate = mean(at(some, limit, half, "behaviour_rate"))
            shown = "" if rate is None else f"{percent(rate)}: "
            cells.append(shown + over_seeds(values, significant) + over(values, base))
        true = over_seeds(at(some, AT, half, "kept"), percent)
        rows.append([name, *cells, true])
    rows.append(
        [
            "original",
            f"{percent(original[half]['behaviour_rate'])}",
            *[""] * (len(LIMITS) - 1),
            percent(original[half]["kept"]),
        ]
    )
    head = [f"chosen at {percent(limit)}" for limit in LIMITS]
    text = table(["method", *head, f"true answers, at {percent(AT)}"], rows)
    return text + (f"\n\nNot measured there: {', '.join(absent)}." if absent else "")


def paired(found: dict[str, Any]) -> str:
    """Trials of the same parameters with and without the keep set, in a sentence."""
    drift, first = (
        f"{median:.2f} times ({low:.2f} to {high:.2f})"
        for median, low, high in (found["drift"], found["drift_first"])
    )
    return (
        f"Of {found['pairs']} pairs of trials with the same parameters, the one with the keep set has "
        f"{drift} the KL on search prompts in the median, {first} at the first token; its rate is "
        f"{100 * found['rate']:+.1f} points higher in the mean."
    )


def left_out(found: dict[str, Any]) -> str:
    """KL on held prompts of each kind, the mean over seeds; the ratio is to directional's."""
    names = ("directional", "ridge-no-keep", "ridge", "without")
    titles = ("directional", "ridge, no keep set", "ridge", "ridge without this kind")
    rows, ratios = [], {name: list[float]() for name in names}
    for kind, one in found["kinds"].items():
        means = {name: statistics.mean(s["drift"] for s in one[name]) for name in names}
        for name in names:
            ratios[name].append(means[name] / means["directional"])
        cells = [
            significant(means[name]) + ("" if name == names[0] else f" ({ratios[name][-1]:.2f} x)")
            for name in names
        ]
        rows.append([kind, one["in the set"], *cells])
    middle = [f"{math.exp(statistics.mean(map(math.log, ratios[n]))):.2f} x" for n in names]
    rows.append(["geometric mean of the ratios", "", *middle])
    search = found["search"]
    for title, score, show in (
        ("search prompts: KL", "drift", significant),
        ("search prompts: rate", "behaviour_rate", percent),
    ):
        cells = [over_seeds([s[score] for s in search[name]], show) for name in names[:3]]
        without = [s[score] for one in found["kinds"].values() for s in one["search, without"]]
        rows.append([title, "", *cells, over_seeds(without, show)])
    return table(["held prompts of", "in the set", *titles], rows)


def at_rate(points: Sequence[dict[str, Any]], rate: float, where: str, score: str) -> float | None:
    """A score where the rate is that, between two strengths; None where they do not enclose it."""
    for weak, strong in pairwise(points):
        a, b = weak["search"]["behaviour_rate"], strong["search"]["behaviour_rate"]
        if b <= rate <= a:
            t = 0.5 if a == b else (a - rate) / (a - b)
            low, high = (math.log(p[where][score]) for p in (weak, strong))
            return math.exp(low + t * (high - low))
    return None


def shapes(found: dict[str, Any]) -> str:
    """Each form at the rate that the first has at strength 1; scores relative to the first's."""
    base = next(iter(found["shapes"].values()))
    middle = list(SCALES).index(1.0)
    rows = []
    for name, seeds in found["shapes"].items():
        cells: list[str] = []
        plain = [points[middle]["search"]["behaviour_rate"] for points in seeds]
        cells.append(over_seeds(plain, percent))
        for where, score in (("search", "drift"), ("kinds", "drift"), ("kinds", "drift_first")):
            ratios = []
            for points, first in zip(seeds, base, strict=True):
                one = first[middle]
                value = at_rate(points, one["search"]["behaviour_rate"], where, score)
                ratios.append(None if value is None else value / one[where][score])
            cells.append(over_seeds(ratios, lambda r: f"{r:.2f} x"))
        rows.append([name, *cells])
    head = ("S_keep", "rate at strength 1", "KL, search prompts", "KL, the ten kinds")
    return table([*head, "first token, the ten kinds"], rows)
