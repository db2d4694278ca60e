"""`excise bench`: its flags, and an edit beside its original on benchmarks as a table.

The command line's help reads this module: what is heavy is imported where it is used.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from excise.errors import EXIT_DONE, ConfigError
from excise.reading import full_path, is_folder
from excise.trees import absolute

if TYPE_CHECKING:
    from rich.table import Table

    from excise.costs.benchmark import Row
    from excise.events import OnEvent
    from excise.record import BenchmarkRecord

    Found = list[BenchmarkRecord] | list[Row]

DOES = "compare an edit with its original on benchmarks"
EXAMPLE = "runs/qwen3-4b --tasks piqa gsm8k --limit 200"


def fill(sub: argparse.ArgumentParser) -> None:
    """Add the flags that no other command has."""
    text = "run folder, or a model: folder, GGUF file or Hub id"
    sub.add_argument("target", metavar="RUN|MODEL", help=text)
    text = "model that a model is compared with; a run is compared with its own original"
    sub.add_argument("--against", metavar="BASE", help=text)
    text = "tasks of lm-evaluation-harness, or task files (default: five, with a network)"
    sub.add_argument("--tasks", nargs="+", metavar="NAME|FILE", help=text)
    text = "first samples of each task (default: 200; 0 for all)"
    sub.add_argument("--limit", type=int, metavar="N", help=text)
    text = "allow code that task files name to run"
    sub.add_argument("--trust-tasks", action="store_true", help=text)


def bench(
    arguments: argparse.Namespace,
    reporter: AbstractContextManager[OnEvent],
    as_event: Callable[[argparse.Namespace, dict[str, Any]], bool],
) -> int:
    """Run the command: measure, and show what was found as the flags ask for it."""
    from excise.cli import console, terminal

    with reporter as on_event:
        found = _found(arguments, on_event)
    rows = {"benchmarks": _as_json(found)}
    if arguments.json:
        terminal.show_json(rows)
    elif not as_event(arguments, rows):
        console.show(_table(found))
    return EXIT_DONE


def _found(arguments: argparse.Namespace, on_event: OnEvent) -> Found:
    """Measure a run's trial, or a model with another one or alone."""
    from excise.config import ModelSection
    from excise.costs.benchmark import DEFAULTS, LIMIT, bench_models, bench_run
    from excise.report.stored_record import FILE

    if arguments.limit is not None and arguments.limit < 0:
        raise ConfigError("--limit is a number of samples, or 0 for all of them")
    names = [str(full_path(Path(n))) if n.endswith((".yaml", ".yml")) else n
             for n in arguments.tasks or DEFAULTS]  # fmt: skip
    limit = LIMIT if arguments.limit is None else arguments.limit or None
    trust, target = arguments.trust_tasks, Path(arguments.target)
    if is_folder(target) and (target / FILE).exists():
        if arguments.against is not None:
            raise ConfigError("a run is compared with its own original: leave --against out")
        return bench_run(
            target,
            names,
            trial=arguments.trial,
            limit=limit,
            trust_tasks=trust,
            trust_run=arguments.trust_run,
            on_event=on_event,
        )
    if arguments.trial is not None:
        raise ConfigError(f"--trial is of a run, and {target} holds no {FILE}")
    against = None if arguments.against is None else absolute(arguments.against)
    return bench_models(
        ModelSection(source=absolute(arguments.target)),
        names,
        against=against,
        limit=limit,
        trust_tasks=trust,
        on_event=on_event,
    )


def _as_json(found: Found) -> list[dict[str, Any]]:
    from excise.costs.benchmark import Row

    rows: list[dict[str, Any]] = []
    for one in found:
        if isinstance(one, Row):
            score = one.score.model_dump(mode="json", exclude_none=True)
            rows.append({"task": one.task, "metric": one.metric, "score": score})
        else:
            rows.append(one.model_dump(mode="json", exclude_none=True))
    return rows


def _table(found: Found) -> Table:
    """Return the figures as a table, a row for each metric of a task."""
    from rich.table import Table
    from rich.text import Text

    from excise.costs.benchmark import Row
    from excise.report import formatting
    from excise.visible import visible

    whole = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    alone = any(isinstance(one, Row) for one in found)
    heads = ("score (95 %)",) if alone else ("original", "edited", "difference (95 %)", "p")
    whole.add_column("task")
    for head in heads:
        whole.add_column(head, justify="right")
    whole.add_column("n", justify="right")
    for one in found:
        name = Text(visible(f"{one.task}, {one.metric}"))
        if isinstance(one, Row):
            whole.add_row(name, formatting.measured("kept", one.score), f"{one.score.n:,}")
        else:
            old, new = (formatting.number("kept", s.value) for s in (one.original, one.edited))
            p = formatting.MISSING if one.p is None else f"{one.p:.2g}"
            whole.add_row(name, old, new, formatting.points(one), p, f"{one.n:,}")
    return whole
