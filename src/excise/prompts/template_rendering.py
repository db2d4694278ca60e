"""Render chat templates in a process of their own, within limits of time, memory and size.

Templates come with models, and are programs. Jinja's sandbox still lets them loop for ever, allocate
without limit, or recurse; none of them runs in this process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from excise.children import Child, python
from excise.errors import ModelError
from excise.reading import is_unicode

Chat = list[dict[str, Any]]

_WORKER = Path(__file__).with_name("template_worker.py")
_BEGINNING = 120.0  # seconds for the process to start
_SECONDS = 15.0  # for all requests together, besides the next
_EACH = 0.01  # seconds per conversation
_LONGEST = 1 << 28  # bytes of an answer


class TemplateRefusal(ModelError):
    """Error of a template on a conversation, in its own words; another form of it may be accepted."""


@dataclass(frozen=True)
class TemplateFacts:
    """What a template's source shows: see `template_worker.analyse`."""

    names: frozenset[str]
    clock: tuple[str, ...] | None
    values: frozenset[str]


class Renderer:
    """Process that renders templates; it starts on first use and ends with the context."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._left = _SECONDS

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def analyse(self, template: str, what: str, compared: str) -> TemplateFacts:
        """Find a template's variables, clock formats, and the strings that it compares a variable with.

        Raises:
            ModelError: it cannot be parsed, or exceeds the limits.
        """
        found = self._ask({"template": template, "compared": compared}, what)
        clock = found["clock"]
        return TemplateFacts(
            frozenset(found["names"]),
            None if clock is None else tuple(clock),
            frozenset(found["values"]),
        )

    def render(
        self,
        template: str,
        what: str,
        chats: Sequence[Chat],
        variables: dict[str, Any],
        *,
        prompt: bool = True,
    ) -> list[str]:
        """Render conversations.

        Args:
            template: its source.
            what: what it is, for messages.
            chats: messages with a role and a content.
            variables: what it is given beside them.
            prompt: add the generation prompt.

        Raises:
            TemplateRefusal: the template fails on one of them.
            ModelError: it takes too long, too much memory, or writes too much.
        """
        asked = {"template": template, "chats": list(chats), "variables": variables}
        texts = self._ask({**asked, "prompt": prompt}, what, _EACH * len(chats))
        if not all(map(is_unicode, texts)):
            raise ModelError(f"{what} writes half of a character (a lone surrogate)")
        return list(map(str, texts))

    def _ask(self, asked: dict[str, Any], what: str, extra: float = 0.0) -> Any:
        child = self._started()
        pipe = child.process.stdin
        assert pipe is not None
        begun = time.monotonic()
        try:
            pipe.write(json.dumps(asked).encode() + b"\n")
            pipe.flush()
        except OSError:
            raise self._ended(what) from None
        answer = self._answer(child, what, max(0.0, self._left) + extra)
        self._left -= max(0.0, time.monotonic() - begun - extra)
        if "failed" in answer:
            raise TemplateRefusal(f"{what} cannot render a prompt: {answer['failed']}")
        if "exceeded" in answer:
            raise ModelError(f"{what} {answer['exceeded']}: give another one with --chat-template")
        return answer["found"]

    def _started(self) -> Child:
        if self._child is None:
            self._child = Child(python(_WORKER), "the process for chat templates", talks=True)
            self._answer(self._child, "the process for chat templates", _BEGINNING)
        return self._child

    def _answer(self, child: Child, what: str, seconds: float) -> dict[str, Any]:
        line = child.line(seconds, _LONGEST)
        if line.endswith(b"\n"):
            return dict(json.loads(line))
        if child.late:
            self._stop()
            raise ModelError(
                f"{what} does not come to an end within {seconds:.0f} seconds: give another one with "
                "--chat-template"
            )
        raise self._ended(what)

    def _ended(self, what: str) -> ModelError:
        assert self._child is not None
        said = self._child.stderr_tail().strip().splitlines() or ["it said nothing"]
        self._stop()
        return ModelError(f"{what} ends the process that it is rendered in: {said[-1]:.200}")

    def _stop(self) -> None:
        if self._child is not None:
            self._child.stop()
            self._child = None
