"""`docs/methods.md` and its plot: figures of `bench/methods.json`, text of `bench/methods_notes.md`."""

from __future__ import annotations

import html
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import real_page
from methods import LIMITS, RESULTS, VARIANTS

from excise.report.formatting import percent, significant

DOCS = Path(__file__).resolve().parent.parent / "docs"
COLORS = {
    "directional": "#3b86d6",
    "subspace": "#2f9e77",
    "ara": "#a06bd0",
    "ridge": "#e0762f",
}


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


Groups = dict[tuple[str, str], dict[int, dict[str, Any]]]


def studies(results: dict[str, Any], place: str = "") -> Groups:
    """(name, objective) -> seed -> study, in the order of `COLORS`; of the shipped files by default."""
    out: Groups = {}
    for key, found in results.items():
        match key.split():
            case [name, objective, seed, *rest] if rest == place.split():
                out.setdefault((name, objective), {})[int(seed)] = found
    order = list(COLORS)
    return dict(sorted(out.items(), key=lambda g: order.index(g[0][0]) if g[0][0] in order else 99))


def spread(values: Sequence[Any], show: Any) -> str:
    """Each seed's value, in order."""
    return ", ".join(show(v) for v in values)


def overview(groups: Groups, objective: str) -> str:
    rows = []
    for (name, driven), seeds in groups.items():
        if driven != objective or name not in COLORS:
            continue
        found = [seeds[s] for s in sorted(seeds)]
        chosen = [f["chosen"] for f in found]
        rows.append(
            [
                name,
                ", ".join(map(str, sorted(seeds))),
                spread([f["trials"] for f in found], str),
                spread([f["volume"][0] for f in found], lambda v: f"{v:.3f}"),
                spread([f["volume"][1] for f in found], lambda v: f"{v:.3f}"),
                spread([f["restored, search"] for f in found], percent),
                spread([f["kept, search"] for f in found], percent),
                spread([c["behaviour_rate, unseen"] for c in chosen], percent),
                spread([c["drift"] for c in chosen], significant),
                spread([c["restored, unseen"] for c in chosen], percent),
                spread([c["kept, unseen"] for c in chosen], percent),
                spread([f["edits_ms"] for f in found], lambda v: f"{v:.0f}"),
            ]
        )
    head = (
        "method",
        "seeds",
        "trials",
        "volume, search",
        "volume, holdout",
        "restored, search",
        "kept, search",
        "rate, unseen",
        "drift, holdout",
        "restored, unseen",
        "kept, unseen",
        "edits, ms",
    )
    return table(head, rows)


def at_equal_rate(groups: Groups, side: str) -> str:
    """Every method's least drifts by seed, and the ratio of their medians to directional's."""
    medians: dict[str, list[float | None]] = {}
    rows = []
    for (name, driven), seeds in groups.items():
        if driven != "drift" or (name not in COLORS):
            continue
        cells: list[str] = []
        medians[name] = []
        for at in range(len(LIMITS)):
            values = [seeds[s]["least"][side][at] for s in sorted(seeds)]
            medians[name].append(median(values))
            text = ", ".join("none" if v is None else significant(v) for v in values)
            cells.append(text + ratio(medians[name][-1], medians["directional"][len(cells)]))
        rows.append([name, *cells])
    head = ("method", *(f"rate at most {percent(limit)}" for limit in LIMITS))
    return table(head, rows)


def variants(groups: Groups) -> str:
    """Variants of ridge beside ridge itself, by seed."""
    rows = []
    for (name, driven), seeds in groups.items():
        if driven != "drift" or not name.startswith("ridge"):
            continue
        found = [seeds[s] for s in sorted(seeds)]
        chosen = [f["chosen"] for f in found]
        least = zip(*(f["least"]["holdout"][2:] for f in found), strict=True)
        rows.append(
            [
                name.removeprefix("ridge+"),
                spread([f["volume"][0] for f in found], lambda v: f"{v:.3f}"),
                spread([f["volume"][1] for f in found], lambda v: f"{v:.3f}"),
                *(
                    spread(values, lambda v: "none" if v is None else significant(v))
                    for values in least
                ),
                spread([c["behaviour_rate, unseen"] for c in chosen], percent),
                spread([c["kept, unseen"] for c in chosen], percent),
            ]
        )
    limits = (f"unseen, rate at most {percent(limit)}" for limit in LIMITS[2:])
    return table(
        ("variant", "volume, search", "volume, holdout", *limits, "knee, unseen", "kept, unseen"),
        rows,
    )


def paired(results: dict[str, Any], question: str) -> str:
    """The same random candidates under several settings."""
    found = results.get(f"paired {question}")
    if found is None:
        return "Not measured."
    rows = [
        [
            name,
            row["pairs"],
            f"{row['drift']:.2f} x",
            f"{100 * row['rate']:+.1f} points",
            f"{100 * row['kept']:+.1f} points",
        ]
        for name, row in found["settings"].items()
    ]
    return table(("setting", "candidates", "drift, median", "rate, mean", "kept, mean"), rows)


def again(results: dict[str, Any]) -> str:
    """Edits of one capture beside those of a capture after every edited layer."""
    found = results.get("again")
    if found is None:
        return "Not measured."
    rows = [
        [row["trial"], *(f"{percent(r)}, {significant(d)}" for r, d in (row["once"], row["again"]))]
        for row in found["rows"]
    ]
    return table(("trial", "one capture: rate, drift", "captured again: rate, drift"), rows)


PLACES = {
    "fold-1": "The shipped model, other unseen objects (`--fold 1`)",
    "fold-2": "The shipped model, again other unseen objects (`--fold 2`)",
    "world-1": "Another model (`--world 1`)",
}


def elsewhere(results: dict[str, Any]) -> list[str]:
    """The studies on other prompts and another model."""
    text = (RESULTS.parent / "methods_elsewhere.md").read_text(encoding="utf-8").strip()
    parts = []
    for place, title in PLACES.items():
        groups = studies(results, place)
        if groups:
            parts += [f"### {title}", overview(groups, "drift"), at_equal_rate(groups, "holdout")]
    return [text, *parts] if parts else []


def median(values: Sequence[float | None]) -> float | None:
    """The middle one, where "none" is larger than any; None where that is the middle."""
    middle = statistics.median_high([math.inf if v is None else v for v in values])
    return middle if middle < math.inf else None


def ratio(value: float | None, base: float | None) -> str:
    return "" if value is None or base is None else f" ({value / base:.2f} x)"


def plot(groups: Groups) -> str:
    """The holdout fronts as an SVG: behaviour rate over drift, logarithmic."""
    width, height, left, bottom = 760, 420, 60, 50
    low, high = -5.0, 0.0

    def x(drift: float) -> float:
        place = (math.log10(max(drift, 10**low)) - low) / (high - low)
        return left + min(place, 1.0) * (width - left - 20)

    def y(rate: float) -> float:
        return 20 + (1 - rate) * (height - bottom - 20)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12" fill="#6b7580">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for power in range(-5, 1):
        at = x(10**power)
        parts.append(f'<path d="M{at:.1f} 20V{height - bottom}" stroke="#e3e7eb"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{height - bottom + 18}" text-anchor="middle">1e{power}</text>'
        )
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<path d="M{left} {y(tick):.1f}H{width - 20}" stroke="#e3e7eb"/>')
        parts.append(
            f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.0%}</text>'
        )
    parts.append(
        f'<text x="{width / 2}" y="{height - 8}" text-anchor="middle">'
        "drift on holdout prompts, nats per token</text>"
    )
    place = 40
    for (name, driven), seeds in groups.items():
        if driven != "drift" or name not in COLORS:
            continue
        color = COLORS[name]
        for found in seeds.values():
            for rate, drift in found["points"]:
                parts.append(
                    f'<circle cx="{x(drift):.1f}" cy="{y(rate):.1f}" r="4" fill="{color}" '
                    'fill-opacity="0.75"/>'
                )
        parts.append(f'<circle cx="{width - 170}" cy="{place}" r="4" fill="{color}"/>')
        parts.append(f'<text x="{width - 160}" y="{place + 4}">{html.escape(name)}</text>')
        place += 18
    return "\n".join([*parts, "</svg>"]) + "\n"


def speed() -> str:
    path = RESULTS.parent / "method_speed.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    ranks = [key.split("_")[1] for key in found["attn.o_proj"] if key.endswith("edit_seconds")]
    rows = []
    for name in ("attn.o_proj", "mlp.down_proj"):
        of = found[name]
        times = (f"{of[f'rank_{r}_edit_seconds']:.2f} s" for r in ranks)
        sizes = (f"{1000 * of[f'rank_{r}_edits_gb']:.0f} MB" for r in ranks)
        cells = [f"{t}, {s}" for t, s in zip(times, sizes, strict=True)]
        rows.append(
            [name, f"{of['prepare_seconds'] / 60:.1f} min", f"{of['held_gb']:.1f} GB", *cells]
        )
    ara = found["ara"]
    on = ", ".join(f"{k}: {v}" for k, v in found["machine"].items() if v)
    head = ("writers", "preparation, once", "held", *(f"a candidate, rank {r}" for r in ranks))
    return "\n\n".join(
        [
            "## Speed at the shape of Gemma 4 E4B",
            "Ridge: 42 layers, O = 2560, I = 2048 and 10240, 400 prompts a side, 20,000 kept tokens, "
            f"a basis of {found['basis']}. {on}. {found['layers_measured']} of 42 layers was measured, "
            f"peak memory {found['peak_gb']:.1f} GB; times and bytes are scaled to 42. The model's own "
            "forward passes are not in it.",
            table(head, rows),
            "Milliseconds per candidate were wanted; on this processor the edits of all writers take as "
            "long as the table says, most of it one Cholesky factorisation and one eigenproblem per "
            "writer. No GPU was at hand.",
            f"ARA, one writer of I = 10240 with 400 + 400 prompts, the same solver in both coordinates: "
            f"{ara['reduced_seconds_per_evaluation']:.2f} s per evaluation in reduced coordinates, "
            f"{ara['full_seconds_per_evaluation']:.2f} s with the full matrix: "
            f"{ara['ratio_per_evaluation']:.1f} times as fast. The basis takes "
            f"{ara['basis_seconds']:.1f} s per writer once per run; with 40 evaluations of a single "
            f"candidate on top the ratio is {ara['ratio_40']:.1f} (at least 8 was wanted).",
        ]
    )


def write(results: dict[str, Any]) -> None:
    groups = studies(results)
    on = ", ".join(f"{key}: {value}" for key, value in results["machine"].items() if value)
    trials = sorted({f["trials"] for seeds in groups.values() for f in seeds.values()})
    ran = "; ".join(
        f"{name} driven by {driven}, seeds {', '.join(map(str, sorted(seeds)))}"
        for (name, driven), seeds in groups.items()
    )
    notes = (RESULTS.parent / "methods_notes.md").read_text(encoding="utf-8").strip()
    parts = [
        "# Methods",
        "Written by `python bench/methods.py page` from `bench/methods.json`. "
        f"{on}. Trials per study: {', '.join(map(str, trials))}. What was run: {ran}.",
        "Every study searches on the demo model's search prompts; then every point of its front is "
        "measured on the holdout prompts. *Unseen* objects stand in no direction or search prompt. "
        "*Volume* is the share of the square behaviour rate 0 to 1, log drift 1e-5 to 1 that the front "
        "beats, larger is better. *Chosen* figures are of the knee. Values are listed by seed.",
        *real_page.page(),
        "## Driven by drift",
        overview(groups, "drift"),
        "![fronts on the holdout](methods.svg)",
        "### Least drift at equal rate, search prompts",
        "By seed; in brackets the median over directional's median.",
        at_equal_rate(groups, "front"),
        "### Least drift at equal rate, unseen objects",
        "The rate on unseen objects; only points that answer no fewer of the open questions on them than "
        "the original less a point. Drift is over all holdout prompts.",
        at_equal_rate(groups, "holdout"),
    ]
    if any(driven == "drift_first" for _, driven in groups):
        parts += [
            "## Driven by drift at the first token",
            "The same table where the second objective is `drift_first`; volumes and drifts are those "
            "of whole responses all the same.",
            overview(groups, "drift_first"),
        ]
    parts += elsewhere(results)
    notes = notes.replace("(variants)", variants(groups))
    for question in ("rank", "mlps", "basis"):
        notes = notes.replace(f"({question})", paired(results, question))
    parts += [notes.replace("(again)", again(results)), speed()]
    (DOCS / "methods.svg").write_text(plot(groups), encoding="utf-8")
    (DOCS / "methods.md").write_text("\n\n".join(p for p in parts if p) + "\n", encoding="utf-8")


__all__ = ["VARIANTS", "write"]
