"""kill -9, SIGTERM and SIGHUP in the long phases of a run, a GGUF export and an upload.

`make kills` is its long form: every phase, at twenty moments with each signal.
"""

from __future__ import annotations

import random
from pathlib import Path

import kills

# Command -> the phases that are struck, in turn with each signal.
STRUCK = {
    "run": ["capture", "search", "export"],
    "export": ["quantise Q4_K_M", "measure Q4_K_M"],
    "push": ["push", "push", "push"],
}


def test_what_was_struck_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    draw = random.Random(0)
    struck = []
    with kills.all_jobs(tmp_path, (), "Q4_K_M") as jobs:
        for work in jobs:
            struck += kills.series(work, kills.SIGNALS, STRUCK[work.name], draw)
    met = [one for one in struck if one.met]
    assert len(met) >= len(struck) // 2, f"most came too late: {struck}"
