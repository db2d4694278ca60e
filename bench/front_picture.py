"""`docs/front.svg`, the picture at the head of the README: the trials and the front of a run's record.

python bench/front_picture.py runs/demo/record.json
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parent.parent / "docs" / "front.svg"
WIDTH, HEIGHT = 760, 330
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 22, 54
LEAST = 1e-5  # nats per token; below, a KL divergence is rounding
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #57606a } .grid { stroke: #8c959f; stroke-opacity: .25 }
.trial { fill: #8c959f; fill-opacity: .55 } .front { fill: none; stroke: #e0762f; stroke-width: 2 }
.point { fill: #e0762f } .chosen { fill: none; stroke: #cf222e; stroke-width: 2.5 }
.said { fill: #cf222e; font-weight: 600 }
@media (prefers-color-scheme: dark) {
  text { fill: #9da7b1 } .said { fill: #ff7b72 } .chosen { stroke: #ff7b72 }
}
"""


def picture(record: dict[str, Any]) -> str:
    """Draw behaviour rate against KL divergence (log scale), as an SVG."""
    scores = {
        trial["number"]: (
            max(trial["scores"]["drift"]["value"], LEAST),
            trial["scores"]["behaviour_rate"]["value"],
        )
        for trial in record["trials"]
        if trial["state"] == "complete"
    }
    ends = [math.floor(math.log10(min(kl for kl, _ in scores.values())))]
    ends += [math.ceil(math.log10(max(kl for kl, _ in scores.values())))]

    def place(kl: float, rate: float) -> tuple[float, float]:
        along = (math.log10(kl) - ends[0]) / (ends[1] - ends[0])
        return (
            LEFT + along * (WIDTH - LEFT - RIGHT),
            TOP + (1 - rate) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    parts += [f"<title>{_title(record)}</title>", f"<style>{STYLE}</style>"]
    for rate in (0.0, 0.25, 0.5, 0.75, 1.0):
        (x, y), (right, _) = place(10.0 ** ends[0], rate), place(10.0 ** ends[1], rate)
        parts.append(
            f'<line class="grid" x1="{x:.0f}" y1="{y:.1f}" x2="{right:.0f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{x - 8:.0f}" y="{y + 4:.1f}" text-anchor="end">{rate:.0%}</text>')
    for power in range(ends[0], ends[1] + 1):
        x, y = place(10.0**power, 0.0)
        label = f"{10.0**power:g}"
        parts.append(f'<text x="{x:.1f}" y="{y + 20:.1f}" text-anchor="middle">{label}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{HEIGHT - 10}" text-anchor="middle">'
        "KL divergence from the original (full response, nats per token)</text>"
    )
    parts.append(f'<text x="{LEFT + 6}" y="{TOP - 8}">behaviour rate</text>')
    for kl, rate in scores.values():
        x, y = place(kl, rate)
        parts.append(f'<circle class="trial" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    front = sorted(place(*scores[number]) for number in record["front"])
    steps = " ".join(f"{x:.1f},{y:.1f}" for x, y in front)
    parts.append(f'<polyline class="front" points="{steps}"/>')
    parts += [f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in front]
    kl, rate = scores[record["selected"]]
    x, y = place(kl, rate)
    parts.append(f'<circle class="chosen" cx="{x:.1f}" cy="{y:.1f}" r="8"/>')
    before = record["baseline"]["behaviour_rate"]["value"]
    parts.append(
        f'<text class="said" x="{x + 14:.1f}" y="{y - 12:.1f}">'
        f"{before:.0%} before, {rate:.0%} after, at {kl:.2g}</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _title(record: dict[str, Any]) -> str:
    return f"Front of {len(record['trials'])} trials: behaviour rate against KL divergence"


if __name__ == "__main__":
    OUT.write_text(picture(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), "utf-8")
