"""Worker process in which `template_rendering` has chat templates parsed and rendered.

A template is a program that others wrote: it may loop for ever, allocate without limit, or crash its
process. Requests are JSON lines on standard input, answers are JSON lines on standard output.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, BinaryIO

from jinja2 import TemplateError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from excise.prompts.memory_limit import limit_memory

_MEMORY = 1 << 29  # bytes beyond what the process has when it starts
# Characters that a template may add to eight times a conversation's own: real ones add up to ten
# thousand. The model reads them with every prompt.
_LONGEST = 1 << 16
_REASON = 200  # characters of a template's own error message
# What a template may raise; RuntimeError is infinite recursion. Anything else ends the process.
_FAILURES = (
    *(TemplateError, ValueError, TypeError, ArithmeticError, LookupError, SyntaxError),
    *(AttributeError, RuntimeError, OSError),
)


class _Generation(Extension):
    """Tag `{% generation %}`, with which templates mark a model's own turns; it has no effect here."""

    tags = {"generation"}  # noqa: RUF012 (as the base class has it)

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the block; names that are set in it are its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_whole"), [], [], body).set_lineno(line)

    def _whole(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """Replacement of `dict` without the attributes of Python's own."""

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Replacement of `namespace` that refuses names with a leading underscore."""

    def __init__(*args: Any, **items: Any) -> None:
        self, *args = args  # type: ignore[assignment]
        made = dict(*args, **items)
        for name in made:
            _check_name(name)
        Namespace.__init__(self, made)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace holds no name such as {name!r}")


def _fail(message: str) -> str:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    """Build the Jinja environment of Transformers, without importing Transformers, which takes a second.

    It has no clock: token ids that change from day to day are of no use here.
    """
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
    )
    made.filters["tojson"] = _tojson
    made.globals |= {"raise_exception": _fail, "dict": _Dict(), "namespace": _Namespace}
    return made


def analyse(template: str, compared: str) -> dict[str, Any]:
    """Parse a template and report what its source shows.

    Args:
        template: its source.
        compared: a variable; the strings that it is compared with are wanted.

    Returns:
        `names`, the variables that it expects; `clock`, the formats in which it writes the time, None
        where it does not; `values`, the strings.
    """
    tree = _environment().parse(template)
    calls = [c for c in tree.find_all(nodes.Call) if getattr(c.node, "name", "") == "strftime_now"]
    formats = {c.args[0].value for c in calls if c.args and isinstance(c.args[0], nodes.Const)}
    return {
        "names": sorted(meta.find_undeclared_variables(tree)),
        "clock": sorted(map(str, formats)) if calls else None,
        "values": sorted(_compared(tree, compared)),
    }


def _compared(tree: nodes.Template, name: str) -> set[str]:
    """Collect the strings that a template compares a variable with."""
    found: set[str] = set()
    for compare in tree.find_all(nodes.Compare):
        if any(n.name == name for n in compare.find_all(nodes.Name)):
            values = [constant.value for constant in compare.find_all(nodes.Const)]
            parts = [v if isinstance(v, list | tuple) else [v] for v in values]
            found |= {v for part in parts for v in part if isinstance(v, str)}
    return found


def render(template: str, chats: list[Any], variables: dict[str, Any], prompt: bool) -> Any:
    """Render conversations; return a `str` where the template exceeds its limits, saying how."""
    compiled, texts = _environment().from_string(template), []
    for chat in chats:
        text = compiled.render(
            messages=chat, tools=None, documents=None, add_generation_prompt=prompt, **variables
        )
        size = len(json.dumps(chat))
        if len(text) > _LONGEST + 8 * size:
            return f"makes {len(text):,} characters of a conversation of {size:,}"
        texts.append(text)
    return texts


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    limit_memory(_MEMORY)
    _answer(answers, {})
    for line in requests:
        asked = json.loads(line)
        ask = analyse if "compared" in asked else render
        try:
            found = ask(**asked)
        except MemoryError:
            found = f"takes more than {_MEMORY >> 20} MB of memory"
        except _FAILURES as error:
            _answer(answers, {"failed": _reason(error)})
            continue
        _answer(answers, {"exceeded" if isinstance(found, str) else "found": found})


def _reason(error: Exception) -> str:
    """Return the first line of a template's error as valid Unicode; its text can be anything."""
    lines = str(error).strip().splitlines() or [""]
    line = lines[0] or type(error).__name__
    return line[:_REASON].encode(errors="replace").decode()


def _answer(answers: BinaryIO, found: dict[str, Any]) -> None:
    answers.write(json.dumps(found).encode() + b"\n")
    answers.flush()


def _main() -> None:
    # Whatever a library prints to standard output must not come between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with open(0, "rb") as requests, answers:
        serve(requests, answers)


if __name__ == "__main__":
    _main()
