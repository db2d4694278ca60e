"""`excise chat`: a conversation in the terminal, its replies in columns or below each other."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from excise.chat.conversation import Chat, Manner, Reply, manner_of
from excise.chat.opened_run import BASE, open_run, points_of
from excise.chat.run_so_far import run_so_far
from excise.chat.sampling import Sampling
from excise.cli import console, terminal
from excise.cli.progress import Reporter
from excise.cli.signals import Haltable
from excise.errors import ConfigError, ExciseError, OutputError
from excise.files import check_destination
from excise.visible import visible

_NARROWEST = 28  # characters of a column that can be read
_REDRAWN = 12  # times a second that columns are redrawn

Replies = tuple[Reply, ...]
Stream = Generator[Replies, None, None]


def talk(arguments: argparse.Namespace) -> None:
    """Open a run and talk to its points until there is nothing more to say.

    Raises:
        ExciseError: it cannot be opened, or the one message of `--prompt` not be answered.
    """
    sampling = Sampling(arguments.temperature, arguments.max_new_tokens, arguments.seed)
    if arguments.save is not None:
        _check_new(arguments.save)
    record = run_so_far(arguments.folder)
    points = points_of(record, arguments.trial, base=arguments.base)
    with Reporter(quiet=arguments.json) as on_event:
        trust = arguments.trust_run
        run = open_run(arguments.folder, record, trust_run=trust, on_event=on_event)
    usual = manner_of(run)
    system = usual.system if arguments.system is None else arguments.system or None
    thinking = usual.thinking if arguments.thinking is None else arguments.thinking == "on"
    with Chat(run, points, Manner(system, thinking, sampling)) as chat:
        _Conversation(chat, arguments).run(arguments.prompt)


def _check_new(path: Path) -> None:
    """Refuse a file that is there already.

    Raises:
        OutputError: it is, or cannot be made there.
    """
    check_destination(path)
    if path.exists():
        raise OutputError(f"{path} exists: give --save a new file")


@dataclass(frozen=True)
class _Word:
    """A command within the chat: what it takes, what it does, and what does it."""

    takes: str
    does: str
    run: Callable[[str], None]


class _Conversation:
    """A chat on standard input and output."""

    def __init__(self, chat: Chat, arguments: argparse.Namespace) -> None:
        self._chat = chat
        self._json: bool = arguments.json
        self._in_turn: bool = arguments.in_turn
        self._file: Path | None = arguments.save
        self._words = {
            "/again": _Word("", "answer the last message once more", lambda _: self._again()),
            "/new": _Word("", "begin a new conversation", lambda _: chat.clear()),
            "/points": _Word(
                "base 3 12", "talk to other points, in a new conversation", self._points
            ),
            "/system": _Word("TEXT", "another system prompt; none without a text", self._system),
            "/temperature": _Word("X", "how freely tokens are drawn; 0: the likeliest", self._heat),
            "/limit": _Word("N", "most tokens of a reply", self._limit),
            "/thinking": _Word("on|off", "let the model think, or not", self._thinking),
            "/first": _Word("", "how likely the first tokens were", lambda _: self._first()),
            "/save": _Word(
                "FILE", "write the conversation to a new file, and go on with it", self._save
            ),
            "/help": _Word("", "this list", lambda _: console.show(self._help())),
        }

    def run(self, prompt: str | None) -> None:
        """Answer `prompt`, or every line of standard input up to its end or `/quit`."""
        if prompt is not None:
            self._show(self._chat.say(prompt))
            return
        if terminal.is_watched():
            names = ", ".join(point.name for point in self._chat.points)
            terminal.say(f"Talking to {names}. /help lists commands, Ctrl-C stops a reply.")
        while (line := terminal.ask("\n> ")) is not None:
            name, _, rest = line.strip().partition(" ")
            if name == "/quit":
                return
            try:
                self._obey(name, rest.strip(), line)
            except ExciseError as error:  # of one message; what was said stays
                if not terminal.is_watched():
                    raise
                terminal.complain(str(error))

    def _obey(self, name: str, rest: str, line: str) -> None:
        if name in self._words:
            self._words[name].run(rest)
        elif name.startswith("/") and name[1:].isalpha():
            raise ConfigError(f"no command {name}: /help lists them")
        elif line.strip():
            self._show(self._chat.say(line))

    # -- replies -----------------------------------------------------------------------------------

    def _show(self, stream: Stream) -> None:
        """Show replies as they come, and what was said in the end; keep it."""
        live = terminal.is_watched() and not self._json
        if live:
            shown = Console()
            with Live(console=shown, transient=True, refresh_per_second=_REDRAWN) as page:
                _follow(stream, lambda said: page.update(self._drawn(said, shown.height - 3)))
        else:
            _follow(stream, lambda _: None)
        turn = self._chat.turns[-1]
        if self._file is not None:
            self._chat.save(self._file)
        if self._json:
            terminal.show_json(turn.as_dict(), indent=None)
        elif live:
            console.show(self._drawn(turn.replies))
        else:
            several = len(turn.replies) > 1
            for reply in turn.replies:
                text = visible(reply.text, lines=True)
                terminal.out(f"{reply.name}: {text}\n" if several else f"{text}\n")

    def _drawn(self, replies: Sequence[Reply], most: int | None = None) -> RenderableType:
        """Draw replies; with `most`, only the last lines that fit so many."""
        if self._in_turn or Console().width < _NARROWEST * len(replies):
            parts = [p for r in replies for p in (Text(r.name, style="bold"), _tail(r, most))]
            return Group(*parts)
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), expand=True)
        for reply in replies:
            table.add_column(Text(reply.name), ratio=1, overflow="fold")
        table.add_row(*(_tail(reply, most) for reply in replies))
        return table

    # -- commands ----------------------------------------------------------------------------------

    def _again(self) -> None:
        self._show(self._chat.again())

    def _points(self, text: str) -> None:
        names = text.replace(",", " ").split()
        if not names or not all(name == BASE or name.isdecimal() for name in names):
            raise ConfigError("name points as in: /points base 3 12")
        self._chat.run = self._chat.run.reread()
        trials = [int(name) for name in names if name != BASE]
        points = points_of(self._chat.run.record, trials, base=BASE in names)
        self._chat.choose(points)

    def _system(self, text: str) -> None:
        self._chat.manner = replace(self._chat.manner, system=text or None)

    def _thinking(self, text: str) -> None:
        if text not in ("on", "off"):
            raise ConfigError("say /thinking on or /thinking off")
        self._chat.manner = replace(self._chat.manner, thinking=text == "on")

    def _heat(self, text: str) -> None:
        try:
            value = float(text)
        except ValueError:
            raise ConfigError("say how freely: /temperature 0.8") from None
        self._sample(temperature=value)

    def _limit(self, text: str) -> None:
        if not text.isdecimal():
            raise ConfigError("say how many: /limit 200")
        self._sample(limit=int(text))

    def _sample(self, **changes: float) -> None:
        manner = self._chat.manner
        sampling = replace(manner.sampling, **changes)  # type: ignore[arg-type]
        self._chat.manner = replace(manner, sampling=sampling)

    def _save(self, text: str) -> None:
        if not text:
            raise ConfigError("name a file: /save talk.jsonl")
        path = Path(text)
        _check_new(path)
        self._chat.save(path)
        self._file = path

    def _first(self) -> None:
        if not self._chat.turns:
            raise ConfigError("nothing was said yet")
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        replies = self._chat.turns[-1].replies
        for reply in replies:
            table.add_column(Text(reply.name))
        for row in zip(*(reply.first for reply in replies), strict=True):
            table.add_row(*(Text(f"{100 * p:5.1f} %  {visible(repr(t)[1:-1])}") for t, p in row))
        console.show(table)

    def _help(self) -> Table:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for name, word in self._words.items():
            table.add_row(f"{name} {word.takes}".strip(), Text(word.does, style="dim"))
        table.add_row("/quit", Text("leave; so does Ctrl-D", style="dim"))
        return table


def _follow(stream: Stream, each: Callable[[Replies], None]) -> None:
    """Pass on all replies of a stream; Ctrl-C ends it, and keeps what was said."""
    with Haltable() as halt:
        for replies in stream:
            each(replies)
            if halt.asked:
                stream.close()
                return


def _tail(reply: Reply, most: int | None) -> Text:
    """Return a reply's text, or as many of its last characters as may fit so many lines."""
    text = visible(reply.text, lines=True)
    if most is not None:
        text = "\n".join(text.split("\n")[-max(1, most) :])
    mark = "" if reply.ended or reply.open else " …"
    return Text(text + mark if text or reply.open else "(nothing)")
