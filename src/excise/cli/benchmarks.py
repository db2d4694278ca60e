"""`excise bench`, `compare` and `audit`: their flags, and edits beside each other as tables.

The command line's help reads this module: what is heavy is imported where it is used.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from excise.errors import EXIT_DONE, ConfigError
from excise.reading import full_path, is_folder
from excise.trees import absolute

if TYPE_CHECKING:
    from rich.table import Table

    from excise.config import Config
    from excise.costs.benchmark import Row
    from excise.costs.comparison import Comparison
    from excise.events import OnEvent
    from excise.record import BenchmarkRecord

    Found = list[BenchmarkRecord] | list[Row]

DOES = "compare an edit with its original on benchmarks"
COMPARES = "compare runs and edited models at matched behaviour rates"
COMPARED = "runs/ridge runs/directional ./edited-by-another-tool"
PAGE = "comparison.html"
AUDITS = "find what it costs to remove a behaviour, by every method"
AUDITED = (
    "MODEL --out DIR",
    "Qwen/Qwen3-4B-Instruct-2507 --behaviour refusal --out audits/qwen3-4b",
)
_LABEL = 9  # characters of a name that leave figures room in 80 columns
_HEADS = {
    "behaviour_rate": "rate",
    "drift": "KL",
    "false_rate": "false rate",
    "severity": "severity",
    "verdict_broken": "broken",
}
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


def fill_compare(sub: argparse.ArgumentParser) -> None:
    """Add the flags that only `excise compare` has."""
    text = "run folders, exports of runs, and models of other tools; a run first"
    sub.add_argument("names", nargs="+", metavar="RUN|MODEL", help=text)
    text = "where the page is written (default: comparison.html in the first run's folder)"
    sub.add_argument("--out", type=Path, metavar="PAGE.html", help=text)


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


def compare(
    arguments: argparse.Namespace,
    reporter: AbstractContextManager[OnEvent],
    as_event: Callable[[argparse.Namespace, dict[str, Any]], bool],
) -> int:
    """Run `excise compare`: write the page, and show the comparison as the flags ask for it."""
    from excise.cli import terminal
    from excise.costs.comparison import compare

    out = _page_of(arguments)
    with reporter as on_event:
        found = compare(
            arguments.names,
            trust_run=arguments.trust_run,
            judge_token=terminal.judge_token(),
            on_event=on_event,
        )
    whole = _written(found, out)
    if arguments.json:
        terminal.show_json(whole)
    elif not as_event(arguments, whole):
        with terminal.beside_the_work():
            _show_comparison(found)
            terminal.say(str(out))
    return EXIT_DONE


def audit(
    arguments: argparse.Namespace,
    configs: Mapping[str, Config],
    reporter: AbstractContextManager[OnEvent],
    as_event: Callable[[argparse.Namespace, dict[str, Any]], bool],
) -> int:
    """Run `excise audit`: a run of every method, and their comparison."""
    from excise.cli import terminal
    from excise.cli.workers import workers_of
    from excise.costs.audit import audit
    from excise.costs.comparison import compare

    token, out = terminal.judge_token(), arguments.out / PAGE
    with reporter as on_event:
        folders, left_out = audit(
            configs,
            arguments.out,
            on_event,
            anyway=arguments.anyway,
            judge_token=token,
            workers=lambda config: workers_of(arguments, config, token),
        )
    found = compare([str(folder) for folder in folders])
    if not as_event(arguments, {**_written(found, out), "left_out": left_out}):
        with terminal.beside_the_work():
            _show_comparison(found)
            for method, reason in left_out.items():
                terminal.say(f"{method} is left out: {reason}")
            terminal.say(str(out))
    return EXIT_DONE


def _written(found: Comparison, out: Path) -> dict[str, Any]:
    """Write the page of a comparison; return what `--json` prints of it."""
    from excise.costs.comparison_page import as_json, comparison_page
    from excise.files import write_text

    write_text(out, comparison_page(found))
    return {**as_json(found), "page": str(out)}


def _page_of(arguments: argparse.Namespace) -> Path:
    """Return where the page is to be written, before anything is measured for it."""
    from excise.costs.comparison import first_run

    out: Path | None = arguments.out
    if out is None:
        run = first_run(arguments.names)
        return Path(PAGE) if run is None else run / PAGE
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {out}: the page's name ends with .html")
    if not is_folder(out.parent) or is_folder(out):
        raise ConfigError(f"--out {out}: not a file's name in a folder that is there")
    return out


def _show_comparison(found: Comparison) -> None:
    from rich.text import Text

    from excise.cli import console
    from excise.costs.comparison_page import matched_note
    from excise.visible import visible

    called = _called(found)
    for name, side in zip(called, found.sides, strict=True):
        long = "" if name == side.label else f"  {side.label}"
        console.show(Text(visible(f"{name}{long}: {side.what}")))
    for one in found.differences:
        console.show(Text(visible(f"† {one.words()}."), style="bold"))
    console.show(Text("\nAt matched behaviour rates, on the search prompts"))
    console.show(*(_matched_table(found, names) for names in _pairs(found.matched_scores())))
    console.show(Text(matched_note(), style="dim"))
    console.show(Text("\nWhat each selected"))
    console.show(*(_chosen_table(found, names) for names in _pairs(found.quoted_scores())))
    if not found.one_set:
        words = "† Some are of the holdout, some of search prompts, which flatter what was picked on them."
        console.show(Text(words, style="bold"))
    if any(side.benchmarks for side in found.sides):
        console.show(Text("\nBenchmarks of these"), _benchmark_table(found))


def _called(found: Comparison) -> list[str]:
    """Return short names for tables: letters where the sides' own leave figures no room."""
    labels = [side.label for side in found.sides]
    if max(map(len, labels)) <= _LABEL:
        return labels
    return list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(labels)])


def _pairs(there: list[str]) -> list[list[str]]:
    """Return the scores of each table: two have room with their intervals. The page has all scores."""
    names = [name for name in _HEADS if name in there]
    return [names[place : place + 2] for place in range(0, len(names), 2)]


def _table_of(*heads: str) -> Table:
    """Return a table whose first two columns are words."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, one in enumerate(heads):
        table.add_column(one, justify="left" if place < 2 else "right", no_wrap=place > 1)
    return table


def _row(table: Table, *cells: str) -> None:
    from rich.text import Text

    from excise.visible import visible

    table.add_row(*(Text(visible(cell)) for cell in cells))


def _matched_table(found: Comparison, names: list[str]) -> Table:
    from excise.costs.comparison import number_of
    from excise.costs.comparison_page import MARK, NONE, limit_words
    from excise.report import formatting

    def mark(name: str) -> str:
        return "" if found.may_compare(name) else MARK

    heads = [_HEADS[name] + mark(name) for name in names]
    table = _table_of(f"limit{mark('behaviour_rate')}", "", "trial", *heads)
    for match in found.matches:
        for called, trial in zip(_called(found), match.trials, strict=True):
            where = limit_words(found, match.limit) if called == _called(found)[0] else ""
            scores = {} if trial is None else trial.scores
            figures = (formatting.measured(name, scores.get(name)) for name in names)
            _row(table, where, called, NONE if trial is None else number_of(trial), *figures)
    return table


def _chosen_table(found: Comparison, names: list[str]) -> Table:
    from excise.costs.comparison import number_of
    from excise.costs.comparison_page import MARK, NONE
    from excise.report import formatting

    heads = [_HEADS[name] + ("" if found.may_quote(name) else MARK) for name in names]
    table = _table_of("", "on", "trial", *heads)
    for called, side in zip(_called(found), found.sides, strict=True):
        number = NONE if side.chosen is None else number_of(side.chosen)
        figures = (formatting.measured(name, side.quoted.after.get(name)) for name in names)
        _row(table, called, side.quoted.name, number, *figures)
    return table


def _benchmark_table(found: Comparison) -> Table:
    from excise.costs.comparison_page import MARK, benchmark_rows
    from excise.report import formatting

    called = dict(zip((side.name for side in found.sides), _called(found), strict=True))
    table = _table_of("", "", "original", "edited", "difference (95 %)")
    for side, one, alike in benchmark_rows(found):
        task = f"{one.task}, {one.metric}" + ("" if alike else MARK)
        old, new = (formatting.number("kept", s.value) for s in (one.original, one.edited))
        _row(table, task, called[side.name], old, new, formatting.points(one))
    return table
