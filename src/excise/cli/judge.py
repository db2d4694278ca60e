"""`excise judge`: how far a judge agrees with labelled responses, as tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from excise.cli import console, terminal
from excise.config import load_config
from excise.errors import EXIT_DONE
from excise.events import OnEvent
from excise.judges.certification import Certification, certify_judge
from excise.judges.verdicts import MEANINGS, VERDICTS
from excise.report import formatting
from excise.trees import BUILTIN, absolute
from excise.visible import visible


def judge(
    arguments: argparse.Namespace,
    reporter: AbstractContextManager[OnEvent],
    as_event: Callable[[argparse.Namespace, dict[str, Any]], bool],
) -> int:
    """Run the command: measure the judge, and show what was found as the flags ask for it."""
    labelled = arguments.labelled
    flags: dict[str, Any] = {
        "scores.judge.source": absolute(arguments.judge),
        "scores.judge.labelled": labelled if labelled == BUILTIN else absolute(labelled),
    }
    if arguments.rubric is not None:
        flags["scores.judge.rubric"] = arguments.rubric
    if arguments.markers is not None:
        flags |= {"scores.markers": [], "scores.markers_file": absolute(arguments.markers)}
    config = load_config(
        behaviour=arguments.behaviour,
        file=arguments.config,
        flags=flags,
        sets=tuple(arguments.sets),
    )
    with reporter as on_event:
        found = certify_judge(config, on_event, judge_token=terminal.judge_token())
    if arguments.json:
        terminal.show_json(certification_json(found))
    elif not as_event(arguments, certification_json(found)):
        console.show(*certification_tables(found))
    return EXIT_DONE


def certification_json(found: Certification) -> dict[str, Any]:
    """Return what was found, as `--json` prints it."""
    return {
        "judge": found.name,
        **found.facts,
        **found.certificate.model_dump(mode="json", exclude_none=True),
        "seconds": found.seconds,
    }


def certification_tables(found: Certification) -> list[RenderableType]:
    """Return recall of each verdict with what the others were taken for, and kappa."""
    one = found.certificate
    told = [v for v in (*VERDICTS, "none") if any(v in row for row in one.confusion.values())]
    title = f"Judge {visible(found.name)} on {one.n:,} labelled responses ({visible(one.labelled)})"
    table = Table(
        title=Text(title), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    table.add_column("true verdict")
    table.add_column("recall (95 %)", justify="right", no_wrap=True)
    table.add_column("n", justify="right")
    for verdict in told:
        table.add_column(f"said {verdict}", justify="right")
    for name, recall in one.recall.items():
        counts = (str(one.confusion[name].get(verdict, 0)) for verdict in told)
        table.add_row(name, formatting.measured("behaviour_rate", recall), str(recall.n), *counts)
    each = found.seconds / one.n
    lines = Text(
        f"\nCohen's kappa: {formatting.kappa(one.kappa)} over the verdicts, "
        f"{formatting.kappa(one.kappa_shows)} over whether the behaviour shows.\n"
        f"{formatting.duration(found.seconds)} in all, {formatting.duration(100 * each)} for 100 responses."
    )
    key = Text("; ".join(f"{name}: {MEANINGS[name]}" for name in one.recall), style="dim")
    return [table, lines, key]
