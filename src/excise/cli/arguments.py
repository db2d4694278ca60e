"""The command line: every command's arguments. A test freezes them.

Knows what can be said, not what is done: `cli` gives the function of each command.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from excise import __version__
from excise.errors import EXIT_BAD_INPUT
from excise.visible import one_line

METHODS = ("directional", "subspace", "ridge", "ara")
PROMPT_FLAGS = ("target", "contrast", "target_eval", "contrast_eval")
_FORMATS = ("safetensors", "adapter", "gguf", "gguf-adapter")
_TRIAL: dict[str, Any] = {"type": int, "metavar": "N", "help": "default: the selected trial"}

Command = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """One clear line and exit code 2, without the whole usage."""

    def error(self, message: str) -> Any:
        """Say it, and leave."""
        self.exit(EXIT_BAD_INPUT, f"excise: {one_line(message)} (see `{self.prog} --help`)\n")


def parser(functions: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of all commands; what it parses holds its command's function as `command`."""
    whole = Parser(
        prog="excise",
        description="Edit one behaviour out of an open-weight language model, and prove the cost.",
        allow_abbrev=False,
    )
    whole.add_argument("-V", "--version", action="version", version=f"excise {__version__}")
    commands = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (text, fill) in _COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("--debug", action="store_true", help="show tracebacks")
        sub.set_defaults(command=functions[name])
        fill(sub)
    return whole


def _demo(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder")
    sub.add_argument("--trials", type=int, metavar="N", help="trials of the search (default 120)")
    sub.add_argument("--seed", type=int, metavar="N", help="seed of the search (default 0)")
    _progress(sub)


def _run(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", help="folder or Hub id")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new run folder")
    _job(sub)
    _anyway(sub)
    _progress(sub)


def _resume(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("folder", type=Path, metavar="DIR")
    sub.add_argument("--trials", type=int, metavar="N", help="trials in all")
    _anyway(sub)
    _trust(sub)
    _progress(sub)


def _front(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("folder", type=Path, metavar="DIR")
    sub.add_argument("--json", action="store_true", help="for programs")


def _export(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("folder", type=Path, metavar="DIR")
    sub.add_argument("--to", type=Path, required=True, metavar="PATH", help="a new folder")
    choice = sub.add_mutually_exclusive_group()
    choice.add_argument("--trial", **_TRIAL)
    choice.add_argument("--select", metavar="RULE", help="knee, drift<=X or rate<=X")
    sub.add_argument("--format", choices=_FORMATS, default="safetensors", dest="format_name")
    sub.add_argument("--rank", type=int, metavar="R", help="rank of an adapter")
    sub.add_argument("--error", type=float, metavar="X", help="its error (default 0.2)")
    sub.add_argument("--quantize", metavar="A,B", help="GGUF file types, such as Q4_K_M,Q8_0")
    sub.add_argument("--from-gguf", type=Path, metavar="FILE", help="patch this GGUF instead")
    sub.add_argument("--llama-cpp", type=Path, metavar="DIR", help="a checkout of llama.cpp")
    _trust(sub)
    _progress(sub)


def _reproduce(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("record", type=Path, metavar="RECORD", help="a record.json, or its folder")
    sub.add_argument("--out", type=Path, metavar="DIR", help="keep it here; else it is removed")
    sub.add_argument("--trial", **_TRIAL)
    sub.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="sets")
    _progress(sub)


def _push(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("folder", type=Path, metavar="RUN")
    sub.add_argument("repo", metavar="OWNER/NAME")
    sub.add_argument("--format", choices=_FORMATS, default="safetensors", dest="format_name")
    sub.add_argument("--trial", **_TRIAL)
    text = "where the export is, if not within the run folder"
    sub.add_argument("--from", type=Path, metavar="PATH", dest="place", help=text)
    sub.add_argument("--public", action="store_true", help="let everybody see a new repository")
    _progress(sub)


def _evaluate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("base", metavar="BASE")
    sub.add_argument("edited", metavar="EDITED")
    _job(sub, search=False)
    sub.add_argument("--json", action="store_true", help="for programs")
    _progress(sub)


def _inspect(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", help="folder or Hub id")
    sub.add_argument("--json", action="store_true", help="for programs")


def _geometry(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("folder", type=Path, metavar="DIR")
    sub.add_argument("--json", action="store_true", help="for programs")
    _trust(sub)
    _progress(sub)


def _report(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("folder", type=Path, metavar="DIR")


def _job(sub: argparse.ArgumentParser, *, search: bool = True) -> None:
    sub.add_argument("--behaviour", metavar="NAME|FILE.toml", help="demo, refusal, or your own")
    packed = ("bnb-4bit", "bnb-8bit")
    sub.add_argument("--quantize", choices=packed, help="pack the weights as they are loaded")
    sub.add_argument("--method", choices=METHODS, help="how edits are made (default: ridge)")
    sub.add_argument("--strengthen", action="store_true", help="edit the behaviour in, not out")
    texts = ("give the directions: evoke it", "give the directions: do not", "score", "score")
    for name, text in zip(PROMPT_FLAGS, texts, strict=True):
        flag = f"--{name.replace('_', '-')}"
        sub.add_argument(flag, metavar="FILE|ID", help=f"prompts, {text}")
    sub.add_argument("--direction-size", type=int, metavar="N", help="rows used for directions")
    sub.add_argument("--eval-size", type=int, metavar="N", help="rows that score; rest: holdout")
    text = "chat template: a file, or a model that has one"
    sub.add_argument("--chat-template", metavar="FILE|MODEL", help=text)
    sub.add_argument("--markers", metavar="FILE", help="phrases that show the behaviour")
    sub.add_argument("--max-new-tokens", type=int, metavar="N", help="longest response")
    if search:
        sub.add_argument("--trials", type=int, metavar="N", help="trials in all")
        sub.add_argument("--startup-trials", type=int, metavar="N", help="random ones first")
        sub.add_argument("--refine", type=int, metavar="N", help="trials refined by gradient")
        sub.add_argument("--seed", type=int, metavar="N")
    sub.add_argument("--config", type=Path, metavar="FILE", help="TOML with any setting")
    sub.add_argument("--set", action="append", default=[], metavar="a.b=c", dest="sets")


def _anyway(sub: argparse.ArgumentParser) -> None:
    text = "search even where the original leaves nothing to find"
    sub.add_argument("--anyway", action="store_true", help=text)


def _trust(sub: argparse.ArgumentParser) -> None:
    text = "let code run that the run folder names"
    sub.add_argument("--trust-run", action="store_true", help=text)


def _progress(sub: argparse.ArgumentParser) -> None:
    how = sub.add_mutually_exclusive_group()
    how.add_argument("--quiet", action="store_true", help="no progress")
    how.add_argument("--json-events", action="store_true", help="progress as JSON lines")


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "demo": ("run the whole job on the embedded model, offline", _demo),
    "run": ("find, edit, measure, choose and export", _run),
    "resume": ("go on with an interrupted run, or add trials to one", _resume),
    "front": ("the Pareto front of a run", _front),
    "export": ("write a trial of a run as a model people can load", _export),
    "reproduce": ("rebuild an edited model from its record, and compare", _reproduce),
    "push": ("upload an export to the Hub, private unless you say otherwise", _push),
    "evaluate": ("measure any edited model against its base", _evaluate),
    "inspect": ("layers, writers, and what is not edited", _inspect),
    "geometry": ("where a run's residuals lie, layer by layer", _geometry),
    "report": ("write a run's report.html and cards again", _report),
}
