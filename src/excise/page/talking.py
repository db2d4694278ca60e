"""The one model of a page, and who talks to it: a thread that opens runs, answers, and reads responses.

Everything that pages show of it lies here, so a tab that was asleep or closed sees it when it looks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from excise.chat.conversation import Chat, Manner, Reply, Turn, manner_of
from excise.chat.opened_run import OpenedRun, Point, open_run
from excise.chat.run_so_far import run_so_far
from excise.engine.batch_sizing import from_dict
from excise.engine.requests import Responses
from excise.engine.stacking import ORIGINAL
from excise.errors import ExciseError
from excise.reading import replace_surrogates

_READ = 5  # search prompts of a side whose responses are shown


@dataclass(frozen=True)
class Heard:
    """Responses of the original and of a trial to one search prompt."""

    trial: int
    side: str
    prompt: str
    before: str
    after: str


@dataclass
class Talk:
    """What is said now, and was. `version` changes with all of it.

    Attributes:
        folder: the run that is open.
        points: who answers.
        turns: what was said.
        message: what is answered now, and `replies`, as far as they are.
        does: what the thread does, in words; "" where it waits.
        problem: why the last thing that was asked of it failed.
        heard: responses to search prompts of the trial that was read last.
    """

    folder: Path | None = None
    points: tuple[Point, ...] = ()
    turns: tuple[Turn, ...] = ()
    message: str = ""
    replies: tuple[Reply, ...] = ()
    does: str = ""
    problem: str = ""
    heard: tuple[Heard, ...] = ()
    version: int = 0


class Talker:
    """The thread and the model that it has loaded: of one run at a time."""

    def __init__(self, *, trust_run: bool) -> None:
        self.now = Talk()
        self._trust = trust_run
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="excise-talk")
        self._run: OpenedRun | None = None
        self._chat: Chat | None = None
        self._halt = threading.Event()

    def say(self, folder: Path, points: Sequence[Point], message: str, manner: Manner) -> None:
        """Put a message to points of a run; other ones than before begin a new conversation."""
        self._do("answering", lambda: self._say(folder, tuple(points), message, manner))

    def again(self, folder: Path) -> None:
        """Answer the last message once more, with other noise."""
        self._do("answering", lambda: self._again(folder))

    def clear(self) -> None:
        """Begin a new conversation."""
        self._do("", self._clear)

    def stop(self) -> None:
        """End the reply that is made now; what was said stays."""
        self._halt.set()

    def read(self, folder: Path, trial: int) -> None:
        """Make the responses of a trial, and of the original, to a few search prompts."""
        self._do("reading responses", lambda: self._read(folder, trial))

    def close(self) -> None:
        """End the thread."""
        self.stop()
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._chat is not None:
            self._chat.__exit__()

    def _do(self, words: str, work: Callable[[], None]) -> None:
        if self.now.does:
            return  # one thing at a time; pages have their buttons off meanwhile
        self._halt.clear()
        self._tell(does=words, problem="")

        def ended(future: Future[None]) -> None:
            error = future.exception()
            if isinstance(error, ExciseError):
                self._tell(problem=str(error))
            elif error is not None:
                self._tell(problem=f"it failed: {type(error).__name__}: {error}")
            self._tell(does="", message="", replies=())

        self._thread.submit(work).add_done_callback(ended)

    def _tell(self, **changes: object) -> None:
        for name, value in changes.items():
            setattr(self.now, name, value)
        self.now.version += 1

    def _opened(self, folder: Path) -> OpenedRun:
        if self._run is None or self._run.folder != folder:
            self._close_chat()
            self._run = None  # freed before another is loaded
            words = self.now.does
            self._tell(does="loading the model", folder=folder, points=(), turns=(), heard=())
            self._run = open_run(folder, run_so_far(folder), trust_run=self._trust)
            self._tell(does=words)
        else:
            self._run = self._run.reread()
        return self._run

    def _close_chat(self) -> None:
        if self._chat is not None:
            self._chat.__exit__()
            self._chat = None

    def _say(self, folder: Path, points: tuple[Point, ...], message: str, manner: Manner) -> None:
        run = self._opened(folder)
        if self._chat is None or self._chat.points != points:
            self._close_chat()
            self._chat = Chat(run, points)
            self._tell(points=points, turns=())
        usual = manner_of(run)
        self._chat.manner = Manner(
            usual.system if manner.system is None else manner.system or None,
            manner.thinking,
            manner.sampling,
        )
        self._answer(self._chat, message)

    def _again(self, folder: Path) -> None:
        if self._chat is None or self._chat.run.folder != folder or not self._chat.turns:
            return
        message = self._chat.turns.pop().message
        self._tell(turns=tuple(self._chat.turns))
        self._answer(self._chat, message)

    def _answer(self, chat: Chat, message: str) -> None:
        self._tell(message=message)
        stream = chat.say(message)
        for replies in stream:
            self._tell(replies=replies)
            if self._halt.is_set():
                stream.close()
                break
        self._tell(turns=tuple(chat.turns))

    def _clear(self) -> None:
        if self._chat is not None:
            self._chat.clear()
        self._tell(turns=())

    def _read(self, folder: Path, trial: int) -> None:
        run = self._opened(folder)
        session, found = run.session, list[Heard]()
        engine = session.engine("search", from_dict(run.record.engine).plan)
        edits = run.edits(Point(trial))
        for side, prompts in session.sets.part("search").items():
            if side not in session.config.scores.show:  # not even asked for
                continue
            before, after = engine.measure([ORIGINAL, edits], [Responses(side)], {side: _READ})
            pairs = zip(before.responses[side], after.responses[side], strict=True)
            for prompt, both in zip(prompts.prompts, pairs, strict=False):
                texts = [replace_surrogates(one.text) for one in both]
                found.append(Heard(trial, side, prompt.text, *texts))
        self._tell(heard=tuple(found))
