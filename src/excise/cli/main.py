"""Commands and exit codes. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import logging
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from excise.cli import benchmarks, terminal
from excise.cli.arguments import METHODS, PROMPT_FLAGS, parser
from excise.cli.signals import Stoppable
from excise.cli.workers import workers_of
from excise.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    ConfigError,
    ExciseError,
    JudgeError,
)
from excise.formats import FORMATS
from excise.named_models import DEMO, SMOLLM2
from excise.reading import full_path, is_file
from excise.trees import BUILTIN, absolute

if TYPE_CHECKING:
    from excise.cli.progress import Reporter

# What `excise demo` sets beside its behaviour's own settings. With --real, sizes that two cores take some
# ten minutes for; `excise run smollm2 --behaviour disclaimers` has the full ones.
TOY: dict[str, Any] = {"model.source": DEMO, "search.trials": 120}
REAL: dict[str, Any] = {
    "model.source": SMOLLM2,
    "search.trials": 20,
    "search.batch": 5,  # so that later trials learn from earlier ones: one batch would be nearly all
    "prompts.direction_size": 100,
    "prompts.eval_size": 40,
    "prompts.holdout_size": 60,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: arguments; by default those of the process, which then ends with the command.
    """
    terminal.prepare()
    arguments = build_parser().parse_args(argv)
    if not arguments.debug:  # it tells of a kernel that it would have downloaded
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        command: Callable[[argparse.Namespace], int] = arguments.command
        with Stoppable(last=argv is None):
            return command(arguments)
    except KeyboardInterrupt:
        terminal.complain("interrupted" + _resume_hint(arguments))
        return EXIT_INTERRUPTED
    except ExciseError as error:
        if arguments.debug:
            traceback.print_exc()
        # A judge that did not answer may do so later: the run can go on as it is.
        hint = _resume_hint(arguments) if isinstance(error, JudgeError) else ""
        terminal.complain(str(error) + hint)
        return error.exit_code
    except BrokenPipeError:
        # The reader of a pipe went away: not our failure, and nothing more can be said to it.
        unfinished = getattr(arguments, "json_events", False)  # its reader went away while it ran
        return EXIT_FAILED if unfinished else EXIT_DONE


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line: a test freezes it."""
    return parser(
        {
            "demo": _demo,
            "run": _run,
            "resume": _resume,
            "front": _front,
            "export": _export,
            "reproduce": _reproduce,
            "push": _push,
            "evaluate": _evaluate,
            "judge": _judge,
            "bench": _bench,
            "compare": _compare,
            "audit": _audit,
            "inspect": _inspect,
            "geometry": _geometry,
            "chat": _chat,
            "ui": _ui,
            "report": _report,
        }
    )


def _config(arguments: argparse.Namespace, model: str) -> Any:
    """Return the configuration that the flags make."""
    from excise.config import load_config

    given = vars(arguments)
    flags: dict[str, Any] = {"model.source": absolute(model)}
    plain = {
        "method": "method",
        "seed": "seed",
        "quantize": "model.quantize",
        "direction_size": "prompts.direction_size",
        "eval_size": "prompts.eval_size",
        "max_new_tokens": "scores.max_new_tokens",
        "trials": "search.trials",
        "time": "search.time",
        "startup_trials": "search.startup_trials",
    }
    flags |= {key: given[flag] for flag, key in plain.items() if given.get(flag) is not None}
    if given.get("trials") is not None:
        flags["search.time"] = None
    if given["strengthen"]:
        flags["goal"] = "strengthen"
    if given["markers"] is not None:
        flags |= {"scores.markers": [], "scores.markers_file": absolute(given["markers"])}
    if given["chat_template"] is not None:
        flags["prompts.chat_template"] = absolute(given["chat_template"])
    for name in PROMPT_FLAGS:
        if given[name] is not None:
            flags[f"prompts.{name}"] = {"source": absolute(given[name])}
    if given["keep"] is not None or given["no_keep"]:
        names = [n if n == BUILTIN else absolute(n) for n in given["keep"] or ()]
        flags["prompts.keep"] = [{"source": name} for name in names]
    return load_config(
        behaviour=arguments.behaviour,
        file=arguments.config,
        flags=flags,
        sets=tuple(arguments.sets),
    )


def _demo(arguments: argparse.Namespace) -> int:
    from excise.config import load_config

    behaviour, settings = ("disclaimers", REAL) if arguments.real else ("demo", TOY)
    trials = settings["search.trials"] if arguments.trials is None else arguments.trials
    flags = settings | {"search.trials": trials, "seed": arguments.seed or 0}
    if arguments.real:  # few trials: half of them random, as in a long search a third
        flags["search.startup_trials"] = max(1, trials // 2)
    out = arguments.out or Path("runs/real" if arguments.real else "runs/demo")
    return _do_run(load_config(behaviour=behaviour, flags=flags), out, arguments, resume=False)


def _run(arguments: argparse.Namespace) -> int:
    config = _config(arguments, arguments.model)
    return _do_run(config, arguments.out, arguments, resume=False)


def _resume(arguments: argparse.Namespace) -> int:
    from excise.errors import RunStateError
    from excise.runs.changed_settings import CONFIG, read_settings

    if not is_file(arguments.folder / CONFIG):
        raise RunStateError(f"{arguments.folder} holds no config.toml: it is not a run folder")
    config = read_settings(
        arguments.folder,
        trust=arguments.trust_run,
        trials=arguments.trials,
        time=arguments.time,
    )
    return _do_run(config, arguments.folder, arguments, resume=True)


def _do_run(config: Any, out: Path, arguments: argparse.Namespace, *, resume: bool) -> int:
    from excise.cli.console import show_result
    from excise.runs.pipeline import run

    arguments.run = out
    anyway = getattr(arguments, "anyway", False)
    token = terminal.judge_token()
    workers = workers_of(arguments, config, token)
    with _reporter(arguments) as on_event:
        record = run(
            config, out, on_event, resume=resume, anyway=anyway, judge_token=token, workers=workers
        )
    if not arguments.json_events:
        with terminal.beside_the_work():
            show_result(record, out)
    return EXIT_DONE


def _front(arguments: argparse.Namespace) -> int:
    from excise.cli import console
    from excise.report.stored_record import read_record

    record = read_record(arguments.folder)
    if arguments.json:
        trials = [record.trial(n).model_dump(mode="json") for n in record.front]
        terminal.show_json(
            {"objectives": record.objectives, "selected": record.selected, "front": trials}
        )
    else:
        console.show(console.front_table(record, most=1000))
    return EXIT_DONE


def _export(arguments: argparse.Namespace) -> int:
    from excise.runs.finished_run import export_run

    with _reporter(arguments) as on_event:
        artifact = export_run(
            arguments.folder,
            arguments.to,
            format_name=arguments.format_name,
            trial=arguments.trial,
            select=arguments.select,
            options=_export_options(arguments),
            trust_run=arguments.trust_run,
            on_event=on_event,
            judge_token=terminal.judge_token(),
        )
    if not _as_event(
        arguments,
        {**artifact.model_dump(include={"trial", "format", "sha256"}), "path": str(arguments.to)},
    ):
        with terminal.beside_the_work():
            terminal.say(f"trial {artifact.trial} as {artifact.format}: {arguments.to}")
    return EXIT_DONE


def _export_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return settings of the configuration's export section, None where a flag was not given."""
    types = arguments.quantize
    base, tools = arguments.from_gguf, arguments.llama_cpp
    form = arguments.form
    if arguments.error is not None and FORMATS[arguments.format_name].options & {"adapter_form"}:
        if form == "dora":
            raise ConfigError(
                "--error is of a plain adapter: give it with --lora, or --rank R with --dora"
            )
        form = "lora"
    return {
        "unpack": arguments.unpack,
        "adapter_form": form,
        "adapter_rank": arguments.rank,
        "adapter_error": arguments.error,
        "quantize": None if types is None else tuple(filter(None, types.split(","))),
        "from_gguf": None if base is None else str(full_path(base)),
        "llama_cpp": None if tools is None else str(tools.resolve()),
    }


def _reproduce(arguments: argparse.Namespace) -> int:
    from excise.cli import console
    from excise.runs.reproduce import reproduce

    with _reporter(arguments) as on_event:
        found = reproduce(
            arguments.record,
            arguments.out,
            trial=arguments.trial,
            sets=arguments.sets,
            on_event=on_event,
        )
    verdict = {"trial": found.trial, "same": found.same, "verdict": found.verdict}
    if not _as_event(arguments, verdict):
        with terminal.beside_the_work():
            console.show_reproduction(found)
    return EXIT_DONE if found.same else EXIT_FAILED


def _push(arguments: argparse.Namespace) -> int:
    from excise.export.hub import push

    with _reporter(arguments) as on_event:
        done = push(
            arguments.folder,
            arguments.repo,
            format_name=arguments.format_name,
            trial=arguments.trial,
            place=arguments.place,
            public=arguments.public,
            on_event=on_event,
        )
    if not _as_event(arguments, {"address": done.address, "public": done.public}):
        with terminal.beside_the_work():
            terminal.say(f"{'public' if done.public else 'private'}: {done.address}")
    return EXIT_DONE


def _evaluate(arguments: argparse.Namespace) -> int:
    from excise.cli import console
    from excise.runs.finished_run import evaluate

    config = _config(arguments, arguments.base)
    with _reporter(arguments) as on_event:
        rows = evaluate(config, arguments.edited, on_event, judge_token=terminal.judge_token())
    found = {
        where: {
            "original": {k: v.model_dump(exclude_none=True) for k, v in before.items()},
            "edited": {k: v.model_dump(exclude_none=True) for k, v in after.items()},
        }
        for where, before, after in rows
    }
    if arguments.json:
        terminal.show_json(found)
    elif not _as_event(arguments, found):
        console.show(console.comparison_table(rows))
    return EXIT_DONE


def _judge(arguments: argparse.Namespace) -> int:
    from excise.cli.judge import judge

    return judge(arguments, _reporter(arguments), _as_event)


def _bench(arguments: argparse.Namespace) -> int:
    return benchmarks.bench(arguments, _reporter(arguments), _as_event)


def _compare(arguments: argparse.Namespace) -> int:
    return benchmarks.compare(arguments, _reporter(arguments), _as_event)


def _audit(arguments: argparse.Namespace) -> int:
    # It is of costs: no model is exported where that is not asked for.
    given = {**vars(arguments), "sets": ["export.formats=[]", *arguments.sets]}
    configs = {
        method: _config(argparse.Namespace(**{**given, "method": method}), arguments.model)
        for method in METHODS
    }
    return benchmarks.audit(arguments, configs, _reporter(arguments), _as_event)


def _inspect(arguments: argparse.Namespace) -> int:
    from excise.cli import console
    from excise.cli.inspect_model import inspect_model, inspection_table

    found = inspect_model(arguments.model)
    if arguments.json:
        terminal.show_json(found)
    else:
        console.show(inspection_table(found))
    return EXIT_DONE


def _geometry(arguments: argparse.Namespace) -> int:
    from excise.cli import console
    from excise.runs.finished_run import survey

    with _reporter(arguments) as on_event:
        layers = survey(arguments.folder, on_event, trust_run=arguments.trust_run)
    if arguments.json:
        terminal.show_json({"layers": layers})
    elif not _as_event(arguments, {"layers": layers}):
        with terminal.beside_the_work():
            console.show(console.geometry_table(layers))
            terminal.say(str(arguments.folder / "report.html"))
    return EXIT_DONE


def _chat(arguments: argparse.Namespace) -> int:
    from excise.cli import chat

    chat.talk(arguments)
    return EXIT_DONE


def _ui(arguments: argparse.Namespace) -> int:
    from excise.cli import page

    page.show(arguments)
    return EXIT_DONE


def _report(arguments: argparse.Namespace) -> int:
    from excise.report.pages import REPORT, write_pages
    from excise.report.stored_record import read_record
    from excise.run_lock import hold

    read_record(arguments.folder)  # where there is none, not even a lock is left there
    with hold(arguments.folder):
        write_pages(arguments.folder, read_record(arguments.folder))
    with terminal.beside_the_work():
        terminal.say(str(arguments.folder / REPORT))
    return EXIT_DONE


def _reporter(arguments: argparse.Namespace) -> Reporter:
    """Return what shows progress, as the flags ask for it."""
    from excise.cli.progress import Reporter

    return Reporter(quiet=arguments.quiet, json_events=arguments.json_events)


def _as_event(arguments: argparse.Namespace, result: dict[str, Any]) -> bool:
    """Print a command's result as its last event, where events were asked for; else return False."""
    if arguments.json_events:
        from excise.events import Result

        terminal.show_json(Result(result).as_dict(), indent=None)
    return bool(arguments.json_events)


def _resume_hint(arguments: argparse.Namespace) -> str:
    """Return how to resume a run; "" where none has begun."""
    folder = getattr(arguments, "run", None)
    if folder is None or not (folder / "config.toml").is_file():
        return ""
    return f"; what was finished is kept: go on with `excise resume {folder}`"
