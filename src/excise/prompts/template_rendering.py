"""Chat templates, rendered in a process of their own, within limits of time, memory and size.

They come with models, and are programs. What Jinja's sandbox allows them still loops for ever, grows
without end, or recurses; nothing of a template is computed in this process.
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
from excise.reading import is_whole

Chat = list[dict[str, Any]]

_WORKER = Path(__file__).with_name("template_worker.py")
_BEGINNING = 120.0  # seconds in which the process must have begun
_SECONDS = 15.0  # of all that a template is asked, beside the next
_EACH = 0.01  # seconds of every conversation
_LONGEST = 1 << 28  # bytes of an answer


class TemplateRefusal(ModelError):
    """A template refuses what it was given, in its own words: another form of it may do."""


@dataclass(frozen=True)
class Look:
    """What a template says about itself: see `templateworker.look`."""

    names: frozenset[str]
    clock: tuple[str, ...] | None
    values: frozenset[str]


class Renderer:
    """The process that templates are rendered in, begun when it is first asked; ended with the context."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._left = _SECONDS

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def look(self, template: str, what: str, compared: str) -> Look:
        """What a template says about itself, and the strings that it compares a variable with.

        Raises:
            ModelError: it cannot be parsed, or exceeds the limits.
        """
        found = self._ask({"template": template, "compared": compared}, what)
        clock = found["clock"]
        return Look(
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
        """What a template makes of conversations.

        Args:
            template: its source.
            what: it is, for messages.
            chats: messages with a role and a content.
            variables: what it is given beside them.
            prompt: let a response begin at the end.

        Raises:
            TemplateRefusal: the template fails on one of them.
            ModelError: it takes too long, too much memory, or makes too much of them.
        """
        asked = {"template": template, "chats": list(chats), "variables": variables}
        texts = self._ask({**asked, "prompt": prompt}, what, _EACH * len(chats))
        if not all(map(is_whole, texts)):
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
        said = self._child.complaints().strip().splitlines() or ["it said nothing"]
        self._stop()
        return ModelError(f"{what} ends the process that it is rendered in: {said[-1]:.200}")

    def _stop(self) -> None:
        if self._child is not None:
            self._child.stop()
            self._child = None
