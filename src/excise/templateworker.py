"""The process in which chat templates are read and rendered for `rendering`.

A template is a program that others wrote: it may loop for ever, ask for all memory, or end its
process, so it gets one of its own. Run as a file: it imports nothing of the package. Requests are JSON
lines on standard input, answers are JSON lines on standard output.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser

_MEMORY = 1 << 29  # bytes: more than what the process has when it begins
_LONGEST = (
    1 << 20
)  # characters that a template may make of a conversation, beside eight times its own
_REASON = 200  # characters of a template's own complaint that are passed on
# What a template may raise; RuntimeError is recursion without end. Anything else ends the process.
_FAILURES = (
    *(TemplateError, ValueError, TypeError, ArithmeticError, LookupError, SyntaxError),
    *(AttributeError, RuntimeError, OSError),
)


class _Generation(Extension):
    """`{% generation %}`, which templates mark a model's own turns with: here it has no effect."""

    tags = {"generation"}  # noqa: RUF012 (as the base class has it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The block's body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def look(template: str, compared: str) -> dict[str, Any]:
    """What a template says about itself, without rendering it.

    Args:
        template: its source.
        compared: a variable; the strings that it is compared with are wanted.

    Returns:
        `names`, the variables that it expects; `clock`, the formats in which it writes the time, None
        where it does not; `values`, the strings.
    """
    tree = Environment(extensions=[_Generation, LoopControlExtension], autoescape=True).parse(
        template
    )
    calls = [c for c in tree.find_all(nodes.Call) if getattr(c.node, "name", "") == "strftime_now"]
    formats = {c.args[0].value for c in calls if c.args and isinstance(c.args[0], nodes.Const)}
    return {
        "names": sorted(meta.find_undeclared_variables(tree)),
        "clock": sorted(map(str, formats)) if calls else None,
        "values": sorted(_compared(tree, compared)),
    }


def _compared(tree: nodes.Template, name: str) -> set[str]:
    """The strings that a template compares a variable with."""
    found: set[str] = set()
    for compare in tree.find_all(nodes.Compare):
        if any(n.name == name for n in compare.find_all(nodes.Name)):
            values = [constant.value for constant in compare.find_all(nodes.Const)]
            parts = [v if isinstance(v, list | tuple) else [v] for v in values]
            found |= {v for part in parts for v in part if isinstance(v, str)}
    return found


def render(template: str, chats: list[Any], variables: dict[str, Any], prompt: bool) -> Any:
    """What Transformers makes of conversations; a `str` says in what the template exceeds its limits."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts = []
    for chat in chats:
        (text,), _ = render_jinja_template(
            conversations=[chat],
            chat_template=template,
            add_generation_prompt=prompt,
            **variables,
        )
        size = len(json.dumps(chat))
        if len(text) > _LONGEST + 8 * size:
            return f"makes {len(text):,} characters of a conversation of {size:,}"
        texts.append(text)
    return texts


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    from transformers.utils import chat_template_utils

    del chat_template_utils  # it takes a second, which no template is to blame for
    _limit_memory()
    _answer(answers, {})
    for line in requests:
        asked = json.loads(line)
        ask = look if "compared" in asked else render
        try:
            found = ask(**asked)
        except MemoryError:
            found = f"takes more than {_MEMORY >> 20} MB of memory"
        except _FAILURES as error:
            _answer(answers, {"failed": _reason(error)})
            continue
        _answer(answers, {"exceeded" if isinstance(found, str) else "found": found})


def _reason(error: Exception) -> str:
    """A template can raise anything, with any text."""
    lines = str(error).strip().splitlines() or [""]
    line = lines[0] or type(error).__name__
    return line[:_REASON].encode(errors="replace").decode()


def _limit_memory() -> None:
    if sys.platform == "linux":  # elsewhere the limit is not kept, or there is none
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


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
