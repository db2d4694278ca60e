"""A conversation with several points at once: each column has the user's messages and its own answers.

Knows how messages become token ids, and what was said; `columns` knows how answers are made.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from excise.chat.columns import Answer, Columns
from excise.chat.opened_run import OpenedRun, Point
from excise.chat.sampling import Sampling
from excise.errors import PromptError, RunStateError
from excise.files import write_text
from excise.prompts.chat_template import ChatFormat, choose_format
from excise.prompts.template_rendering import Renderer
from excise.prompts.tokens import check_known, rendered_ids, vocabulary
from excise.reading import replace_surrogates

_HALF = "\ufffd"  # what the tokens of half of a character are decoded to


@dataclass(frozen=True)
class Manner:
    """How the model is spoken to, and how it answers.

    Attributes:
        system: the system prompt; None for none.
        thinking: whether it may think, where its template has a switch for that.
        sampling: how answers are sampled.
    """

    system: str | None = None
    thinking: bool = False
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Reply:
    """What one column says to a message. `first` has the likeliest first tokens, with probabilities."""

    name: str
    trial: int | None
    text: str
    tokens: int
    ended: bool  # by the model; else it was stopped, or cut at the limit
    first: tuple[tuple[str, float], ...] = ()
    open: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        first = [{"token": token, "probability": round(p, 6)} for token, p in self.first]
        found = {**asdict(self), "first": first}
        return {key: value for key, value in found.items() if key != "open"}


@dataclass(frozen=True)
class Turn:
    """A message, what each column said to it, and the manner of it."""

    message: str
    replies: tuple[Reply, ...]
    manner: Manner

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return {
            "message": self.message,
            "replies": [reply.as_dict() for reply in self.replies],
            "system": self.manner.system,
            "thinking": self.manner.thinking,
            **asdict(self.manner.sampling),
        }


class Chat:
    """A conversation with points of a run; a context, as a process renders its template.

    Attributes:
        run: the opened run.
        points: who answers, a column each.
        manner: how, from the next message on.
        turns: what was said.
    """

    def __init__(
        self, run: OpenedRun, points: Sequence[Point], manner: Manner | None = None
    ) -> None:
        self.run = run
        self.manner = manner or manner_of(run)
        self.turns: list[Turn] = []
        self._renderer = Renderer()
        self._format: tuple[Manner, ChatFormat] | None = None
        self._answers = 0
        self.choose(points)

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self._renderer.__exit__()

    def choose(self, points: Sequence[Point]) -> None:
        """Begin a new conversation with other points; no weights are loaded for that.

        Raises:
            RunStateError: one is no trial of the run, or there is none.
            MeasurementError: one has no edit.
        """
        if not points:
            raise RunStateError("choose a point to talk to")
        edits = [self.run.edits(point) for point in points]
        session = self.run.session
        self.points = tuple(points)
        self.columns = Columns(session.loaded, session.writers, edits)
        self.clear()

    def clear(self) -> None:
        """Begin a new conversation with the same points."""
        self.turns, self._answers = [], 0

    def say(self, message: str) -> Generator[tuple[Reply, ...], None, None]:
        """Put a message to every column; yield all replies after every token.

        The turn is kept when the iterator ends, also where it is closed before.

        Raises:
            PromptError: the message is empty, or the conversation longer than the model has positions.
            ModelError: the template cannot render the conversation.
            MeasurementError, MemoryExhausted: as `Columns.answer`.
        """
        message = replace_surrogates(message)
        if not message.strip():
            raise PromptError("the message is empty")
        manner = self.manner
        texts = self._texts(message)
        sampling = self._within(texts, manner.sampling)
        stream = self.columns.answer(texts, sampling, self._answers)
        replies: tuple[Reply, ...] = ()
        try:
            for answers in stream:
                pairs = zip(self.points, answers, strict=True)
                replies = tuple(self._reply(point, answer) for point, answer in pairs)
                yield replies
        finally:
            stream.close()
            if replies:
                self._answers += 1
                ended = tuple(replace(reply, open=False) for reply in replies)
                self.turns.append(Turn(message, ended, manner))

    def again(self) -> Generator[tuple[Reply, ...], None, None]:
        """Put the last message once more, with other noise.

        Raises:
            PromptError: nothing was said yet.
        """
        if not self.turns:
            raise PromptError("nothing was said yet that could be answered again")
        return self.say(self.turns.pop().message)

    def save(self, path: Path) -> None:
        """Write the conversation so far, a line of JSON per turn.

        Raises:
            StorageError: it cannot be written.
        """
        lines = [json.dumps(turn.as_dict(), ensure_ascii=False) for turn in self.turns]
        write_text(path, "".join(f"{line}\n" for line in lines))

    def _texts(self, message: str) -> list[tuple[int, ...]]:
        """Return the token ids of every column's conversation, up to where its answer begins."""
        chat_format, session = self._chat_format(), self.run.session
        chats = [
            [*(text for t in self.turns for text in (t.message, t.replies[n].text)), message]
            for n in range(len(self.points))
        ]
        rendered = chat_format.conversations(self._renderer, chats)
        tokenizer, model = session.loaded.tokenizer, session.loaded.model
        ids = rendered_ids(tokenizer, rendered, chat_format)
        check_known(tokenizer, ids, vocabulary(model))
        return [(*row, *self._opening().ids) for row in ids]

    def _opening(self) -> Any:
        """Return what every response of the run begins with; nothing where thinking is not as it was."""
        sets, section = self.run.session.sets, self.run.session.config.prompts
        same = self.manner.thinking == section.thinking
        return sets.opening if same else type(sets.opening)()

    def _chat_format(self) -> ChatFormat:
        """Return how conversations are put to the model, in the present manner."""
        if self._format is None or self._format[0] != self.manner:
            session = self.run.session
            fields = {"system": self.manner.system, "thinking": self.manner.thinking}
            section = session.config.prompts.model_copy(update=fields)
            loaded = session.loaded
            found = choose_format(loaded.tokenizer, section, self._renderer, loaded.folder)
            self._format = (self.manner, found)
        return self._format[1]

    def _within(self, texts: Sequence[Sequence[int]], sampling: Sampling) -> Sampling:
        """Return the sampling with a limit that the model has positions for."""
        text = self.run.session.loaded.model.config.get_text_config()
        most: int | None = getattr(text, "max_position_embeddings", None)
        longest = max(map(len, texts))
        if most is None:
            return sampling
        if longest >= most:
            raise PromptError(
                f"the conversation has {longest} tokens, and the model room for {most}: begin a new one"
            )
        return replace(sampling, limit=min(sampling.limit, most - longest))

    def _reply(self, point: Point, answer: Answer) -> Reply:
        tokenizer = self.run.session.loaded.tokenizer
        ids = [*self._opening().spoken, *answer.tokens]
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        if answer.open:
            text = text.rstrip(_HALF)
        first = tuple((str(tokenizer.decode([token])), share) for token, share in answer.first)
        return Reply(
            point.name,
            point.trial,
            replace_surrogates(text),
            len(answer.tokens),
            answer.ended,
            first,
            answer.open,
        )


def manner_of(run: OpenedRun) -> Manner:
    """Return the manner in which a run put its prompts, with greedy answers."""
    section = run.session.config.prompts
    return Manner(section.system, section.thinking)
