"""Arguments and exit codes. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from excise import __version__
from excise.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    ExciseError,
)

METHODS = ("directional", "subspace", "ridge", "ara")
PROJECTIONS = ("pca", "umap")
_PROMPT_FLAGS = ("target", "contrast", "target_eval", "contrast_eval")


class _Parser(argparse.ArgumentParser):
    """One clear line and exit code 2, without the whole usage."""

    def error(self, message: str) -> Any:
        self.exit(EXIT_BAD_INPUT, f"excise: {message} (see `{self.prog} --help`)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = build_parser().parse_args(argv)
    if not arguments.debug:  # it tells of a kernel that it would have downloaded
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        command: Callable[[argparse.Namespace], int] = arguments.command
        return command(arguments)
    except KeyboardInterrupt:
        _complain("interrupted; what was finished is kept" + _resume_hint(arguments))
        return EXIT_INTERRUPTED
    except ExciseError as error:
        if arguments.debug:
            traceback.print_exc()
        _complain(str(error))
        return error.exit_code
    except BrokenPipeError:
        # The reader of a pipe went away: not our failure, and nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE


def build_parser() -> argparse.ArgumentParser:
    """The command line, whole: a test freezes it."""
    parser = _Parser(
        prog="excise",
        description="Edit one behaviour out of an open-weight language model, and prove the cost.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"excise {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, text: str, function: Callable[[argparse.Namespace], int]) -> Any:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("--debug", action="store_true", help="show tracebacks")
        sub.set_defaults(command=function)
        return sub

    demo = add("demo", "run the whole job on the embedded model, offline", _demo)
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder")
    demo.add_argument("--trials", type=int, metavar="N", help="trials of the search (default 120)")
    demo.add_argument("--seed", type=int, metavar="N", help="seed of the search (default 0)")
    _add_progress(demo)

    run = add("run", "find, edit, measure, choose and export", _run)
    run.add_argument("model", metavar="MODEL", help="folder or Hub id")
    run.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new run folder")
    _add_job(run)
    _add_progress(run)

    resume = add("resume", "go on with an interrupted run, or add trials to one", _resume)
    resume.add_argument("folder", type=Path, metavar="DIR")
    resume.add_argument("--trials", type=int, metavar="N", help="trials in all")
    _add_progress(resume)

    front = add("front", "the Pareto front of a run", _front)
    front.add_argument("folder", type=Path, metavar="DIR")
    front.add_argument("--json", action="store_true", help="for programs")

    export = add("export", "write a trial of a run as a model people can load", _export)
    export.add_argument("folder", type=Path, metavar="DIR")
    export.add_argument("--to", type=Path, required=True, metavar="PATH", help="a new folder")
    choice = export.add_mutually_exclusive_group()
    choice.add_argument("--trial", type=int, metavar="N", help="default: the selected trial")
    choice.add_argument("--select", metavar="RULE", help="knee, drift<=X or rate<=X")
    formats = ("safetensors", "adapter", "gguf", "gguf-adapter")
    export.add_argument("--format", choices=formats, default="safetensors", dest="format_name")
    export.add_argument("--rank", type=int, metavar="R", help="rank of an adapter")
    export.add_argument("--error", type=float, metavar="X", help="its error (default 0.1)")
    export.add_argument("--quantize", metavar="A,B", help="GGUF file types, such as Q4_K_M,Q8_0")
    export.add_argument("--from-gguf", type=Path, metavar="FILE", help="patch this GGUF instead")
    export.add_argument("--llama-cpp", type=Path, metavar="DIR", help="a checkout of llama.cpp")
    _add_progress(export)

    again = add("reproduce", "rebuild an edited model from its record, and compare", _reproduce)
    again.add_argument("record", type=Path, metavar="RECORD", help="a record.json, or its folder")
    again.add_argument("--out", type=Path, metavar="DIR", help="keep it here; else it is removed")
    again.add_argument("--trial", type=int, metavar="N", help="default: the selected trial")
    again.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="sets")
    _add_progress(again)

    push = add("push", "upload an export to the Hub, private unless you say otherwise", _push)
    push.add_argument("folder", type=Path, metavar="RUN")
    push.add_argument("repo", metavar="OWNER/NAME")
    push.add_argument("--format", choices=formats, default="safetensors", dest="format_name")
    push.add_argument("--trial", type=int, metavar="N", help="default: the selected trial")
    push.add_argument("--public", action="store_true", help="let everybody see it")
    _add_progress(push)

    evaluate = add("evaluate", "measure any edited model against its base", _evaluate)
    evaluate.add_argument("base", metavar="BASE")
    evaluate.add_argument("edited", metavar="EDITED")
    _add_job(evaluate, search=False)
    evaluate.add_argument("--json", action="store_true", help="for programs")
    _add_progress(evaluate)

    inspect = add("inspect", "layers, writers, and what is not edited", _inspect)
    inspect.add_argument("model", metavar="MODEL", help="folder or Hub id")
    inspect.add_argument("--json", action="store_true", help="for programs")

    geometry = add("geometry", "where a run's residuals lie, layer by layer", _geometry)
    geometry.add_argument("folder", type=Path, metavar="DIR")
    geometry.add_argument("--json", action="store_true", help="for programs")
    geometry.add_argument(
        "--projection",
        choices=PROJECTIONS,
        default=PROJECTIONS[0],
        help="how the page draws residuals; umap needs the extra of that name",
    )
    _add_progress(geometry)

    report = add("report", "write a run's report.html and cards again", _report)
    report.add_argument("folder", type=Path, metavar="DIR")
    return parser


def _add_job(parser: argparse.ArgumentParser, *, search: bool = True) -> None:
    parser.add_argument("--behaviour", metavar="NAME|FILE.toml", help="demo, refusal, or your own")
    packed = ("bnb-4bit", "bnb-8bit")
    parser.add_argument("--quantize", choices=packed, help="pack the weights as they are loaded")
    parser.add_argument("--method", choices=METHODS, help="how edits are made (default: ridge)")
    parser.add_argument("--strengthen", action="store_true", help="edit the behaviour in, not out")
    texts = ("give the directions: evoke it", "give the directions: do not", "score", "score")
    for name, text in zip(_PROMPT_FLAGS, texts, strict=True):
        parser.add_argument(
            f"--{name.replace('_', '-')}", metavar="FILE|ID", help=f"prompts, {text}"
        )
    parser.add_argument("--direction-size", type=int, metavar="N", help="rows used for directions")
    parser.add_argument("--eval-size", type=int, metavar="N", help="rows that score; rest: holdout")
    text = "chat template: a file, or a model that has one"
    parser.add_argument("--chat-template", metavar="FILE|MODEL", help=text)
    parser.add_argument("--markers", metavar="FILE", help="phrases that show the behaviour")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest response")
    if search:
        parser.add_argument("--trials", type=int, metavar="N", help="trials in all")
        parser.add_argument("--startup-trials", type=int, metavar="N", help="random ones first")
        parser.add_argument("--refine", type=int, metavar="N", help="trials refined by gradient")
        parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML with any setting")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="sets")


def _add_progress(parser: argparse.ArgumentParser) -> None:
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quiet", action="store_true", help="no progress")
    how.add_argument("--json-events", action="store_true", help="progress as JSON lines")


def _config(arguments: argparse.Namespace, model: str) -> Any:
    """The configuration that the flags make."""
    from excise.config import load_config

    given = vars(arguments)
    flags: dict[str, Any] = {"model.source": _absolute(model)}
    plain = {
        "method": "method",
        "seed": "seed",
        "quantize": "model.quantize",
        "direction_size": "prompts.direction_size",
        "eval_size": "prompts.eval_size",
        "max_new_tokens": "scores.max_new_tokens",
        "trials": "search.trials",
        "startup_trials": "search.startup_trials",
        "refine": "search.refine",
    }
    flags |= {key: given[flag] for flag, key in plain.items() if given.get(flag) is not None}
    if given["strengthen"]:
        flags["goal"] = "strengthen"
    if given["markers"] is not None:
        flags |= {"scores.markers": [], "scores.markers_file": _absolute(given["markers"])}
    if given["chat_template"] is not None:
        flags["prompts.chat_template"] = _absolute(given["chat_template"])
    for name in _PROMPT_FLAGS:
        if given[name] is not None:
            flags[f"prompts.{name}"] = {"source": _absolute(given[name])}
    return load_config(
        behaviour=arguments.behaviour,
        file=arguments.config,
        flags=flags,
        sets=tuple(arguments.sets),
    )


def _absolute(name: str) -> str:
    """A file or folder by its full path, so that a run can be resumed from anywhere; else an id."""
    return str(Path(name).resolve()) if Path(name).exists() and name != "demo" else name


def _demo(arguments: argparse.Namespace) -> int:
    from excise.config import load_config

    trials = 120 if arguments.trials is None else arguments.trials
    flags = {"model.source": "demo", "search.trials": trials, "seed": arguments.seed or 0}
    config = load_config(behaviour="demo", flags=flags)
    return _do_run(config, arguments.out, arguments, resume=False)


def _run(arguments: argparse.Namespace) -> int:
    config = _config(arguments, arguments.model)
    return _do_run(config, arguments.out, arguments, resume=False)


def _resume(arguments: argparse.Namespace) -> int:
    from excise.config import load_config
    from excise.errors import RunStateError

    file = arguments.folder / "config.toml"
    if not file.is_file():
        raise RunStateError(f"{arguments.folder} holds no config.toml: it is not a run folder")
    flags = {} if arguments.trials is None else {"search.trials": arguments.trials}
    config = load_config(file=file, flags=flags)
    return _do_run(config, arguments.folder, arguments, resume=True)


def _do_run(config: Any, out: Path, arguments: argparse.Namespace, *, resume: bool) -> int:
    from excise.console import Reporter, show_result
    from excise.pipeline import run

    arguments.folder = out
    with Reporter(quiet=arguments.quiet, json_events=arguments.json_events) as on_event:
        record = run(config, out, on_event, resume=resume)
    if not arguments.json_events:
        show_result(record, out)
    return EXIT_DONE


def _front(arguments: argparse.Namespace) -> int:
    from excise import console
    from excise.record import read_record

    record = read_record(arguments.folder)
    if arguments.json:
        trials = [record.trial(n).model_dump(mode="json") for n in record.front]
        console.show_json(
            {"objectives": record.objectives, "selected": record.selected, "front": trials}
        )
    else:
        console.show(console.front_table(record, most=1000))
    return EXIT_DONE


def _export(arguments: argparse.Namespace) -> int:
    from excise.console import Reporter, say
    from excise.jobs import export_run

    with Reporter(quiet=arguments.quiet, json_events=arguments.json_events) as on_event:
        artifact = export_run(
            arguments.folder,
            arguments.to,
            format_name=arguments.format_name,
            trial=arguments.trial,
            select=arguments.select,
            options=_export_options(arguments),
            on_event=on_event,
        )
    if not arguments.json_events:
        say(f"trial {artifact.trial} as {artifact.format}: {arguments.to}")
    return EXIT_DONE


def _export_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Settings of the configuration's export section, None where a flag was not given."""
    types = arguments.quantize
    base, tools = arguments.from_gguf, arguments.llama_cpp
    return {
        "adapter_rank": arguments.rank,
        "adapter_error": arguments.error,
        "quantize": None if types is None else tuple(filter(None, types.split(","))),
        "from_gguf": None if base is None else str(base.resolve()),
        "llama_cpp": None if tools is None else str(tools.resolve()),
    }


def _reproduce(arguments: argparse.Namespace) -> int:
    from excise import console
    from excise.reproduce import reproduce

    with console.Reporter(quiet=arguments.quiet, json_events=arguments.json_events) as on_event:
        found = reproduce(
            arguments.record,
            arguments.out,
            trial=arguments.trial,
            sets=arguments.sets,
            on_event=on_event,
        )
    if not arguments.json_events:
        console.show_reproduction(found)
    return EXIT_DONE if found.same else EXIT_FAILED


def _push(arguments: argparse.Namespace) -> int:
    from excise.console import Reporter, say
    from excise.hub import push

    with Reporter(quiet=arguments.quiet, json_events=arguments.json_events) as on_event:
        address = push(
            arguments.folder,
            arguments.repo,
            format_name=arguments.format_name,
            trial=arguments.trial,
            public=arguments.public,
            on_event=on_event,
        )
    if not arguments.json_events:
        say(f"{'public' if arguments.public else 'private'}: {address}")
    return EXIT_DONE


def _evaluate(arguments: argparse.Namespace) -> int:
    from excise import console
    from excise.jobs import evaluate

    config = _config(arguments, arguments.base)
    with console.Reporter(quiet=arguments.quiet, json_events=arguments.json_events) as on_event:
        rows = evaluate(config, arguments.edited, on_event)
    if arguments.json:
        console.show_json(
            {
                where: {
                    "original": {k: v.model_dump(exclude_none=True) for k, v in before.items()},
                    "edited": {k: v.model_dump(exclude_none=True) for k, v in after.items()},
                }
                for where, before, after in rows
            }
        )
    elif not arguments.json_events:
        console.show(console.comparison_table(rows))
    return EXIT_DONE


def _inspect(arguments: argparse.Namespace) -> int:
    from excise import console
    from excise.inspecting import inspect_model, inspection_table

    found = inspect_model(arguments.model)
    if arguments.json:
        console.show_json(found)
    else:
        console.show(inspection_table(found))
    return EXIT_DONE


def _geometry(arguments: argparse.Namespace) -> int:
    from excise import console
    from excise.jobs import GEOMETRY, survey

    with console.Reporter(quiet=arguments.quiet, json_events=arguments.json_events) as on_event:
        layers = survey(arguments.folder, on_event, arguments.projection)
    if arguments.json:
        console.show_json({"layers": layers})
    elif not arguments.json_events:
        console.show(console.geometry_table(layers))
        console.say(str(arguments.folder / GEOMETRY))
    return EXIT_DONE


def _report(arguments: argparse.Namespace) -> int:
    from excise.console import say
    from excise.finish import write_pages
    from excise.record import read_record

    write_pages(arguments.folder, read_record(arguments.folder))
    say(str(arguments.folder / "report.html"))
    return EXIT_DONE


def _complain(text: str) -> None:
    sys.stderr.write(f"excise: {text}\n")


def _resume_hint(arguments: argparse.Namespace) -> str:
    folder = getattr(arguments, "folder", None)
    return f": go on with `excise resume {folder}`" if folder is not None else ""


if __name__ == "__main__":
    sys.exit(main())
