"""One input: where it lies, what was changed, the command that meets it, and who judges the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from fuzz import checks
from fuzz.ground import Ground, Setup
from fuzz.mutations import change_file, copy_folder

Change = Callable[[bytes, Random], tuple[bytes, str]]
OUT = "out"
_IN_PLACE = 0.06  # share of changes that put something else in a file's place
_HARMLESS = 0.08  # share of changes that mean nothing, where there are such


@dataclass(frozen=True)
class Case:
    """A command, and what it may have done.

    Attributes:
        arguments: of `excise`.
        check: what is wrong with what it gave, where it ended with 0.
        kept: folders that bad input leaves as they are.
        absent: places where bad input leaves nothing.
    """

    arguments: list[str]
    check: Callable[[str], Iterable[str]]
    kept: tuple[Path, ...] = ()
    absent: tuple[Path, ...] = ()


@dataclass
class Place:
    """Where an input is made. `sound`: nothing is changed, to see that the undamaged one passes."""

    ground: Ground
    folder: Path
    draw: Random
    sound: bool = False
    said: list[str] = field(default_factory=list)
    harmless: bool = False  # what was changed means nothing

    def copied(self, name: str) -> Path:
        """A copy of a part of the ground."""
        source, to = self.ground.folder / name, self.folder / name
        if source.is_dir():
            return copy_folder(source, to)
        to.write_bytes(source.read_bytes())
        return to

    def change(self, path: Path, *ways: Change, harmless: Sequence[Change] = ()) -> None:
        """Change a file by one of the ways, or put something else in its place, or change it harmlessly."""
        if self.sound:
            return
        chance = self.draw.random()
        if chance < _IN_PLACE:
            self.said.append(change_file(path, self.draw))
            return
        self.harmless = bool(harmless) and chance > 1 - _HARMLESS
        data, what = self.draw.choice(harmless if self.harmless else ways)(
            path.read_bytes(), self.draw
        )
        path.write_bytes(data)
        self.said.append(f"{path.name}: {what}")

    def put(self, path: Path, text: str | bytes, what: str) -> None:
        """Write a file that was not there, or was another."""
        if not self.sound:
            path.write_bytes(
                text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
            )
            self.said.append(f"{path.name}: {what}")

    def setup(self, **changes: Any) -> Setup:
        """The undamaged job with some of it replaced."""
        return replace(self.ground.setup, **changes)

    def job(self, setup: Setup) -> Case:
        """A run of that job."""
        out = self.folder / OUT
        return Case(setup.run(out), lambda _: checks.check_run(setup, out), absent=(out,))

    def unmeasured(self, setup: Setup) -> Case:
        """A run whose settings make its figures others than the judge knows how to measure."""
        out = self.folder / OUT
        return Case(
            setup.run(out), lambda _: checks.check_run(setup, out, measured=False), absent=(out,)
        )

    def model(self, model: Path, *, run: float = 0.6) -> Case:
        """A command that meets this model: a run of so great a share, else a look or a comparison."""
        chance = self.draw.random()
        if chance < run or self.sound:
            return self.job(self.setup(model=model))
        if chance < run + 0.6 * (1 - run):
            arguments = ["inspect", str(model), "--json"]
            return Case(arguments, lambda out: checks.check_inspect(model, out))
        setup = self.setup()
        return Case(setup.evaluate(model), lambda out: checks.check_evaluate(setup, model, out))
