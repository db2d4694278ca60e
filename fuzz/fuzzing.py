"""Inputs by seed and number, each run and judged; the table of what came of them."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from fuzz import judge
from fuzz.case import Case, Place
from fuzz.ground import Ground
from fuzz.judge import Fault
from fuzz.kinds import KINDS
from fuzz.running import BYTES, SECONDS, run


@dataclass(frozen=True)
class Verdict:
    """What came of one input."""

    number: int
    kind: str
    changed: str
    command: str
    code: int
    seconds: float
    peak: int
    message: str
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Fuzz:
    """A series of inputs.

    Attributes:
        ground: what is damaged.
        folder: where inputs are made; those with faults stay there.
        seed: with a number it decides an input.
        kinds: the kinds that take turns; all of them by default.
        seconds: the limit of one command.
        keep: also what passed stays.
    """

    ground: Ground
    folder: Path
    seed: int = 0
    kinds: Sequence[str] = tuple(KINDS)
    seconds: float = SECONDS
    keep: bool = False

    def meet(self, number: int, *, sound: bool = False) -> Verdict:
        """Make input `number`, run its command, and judge it; `sound` leaves the input undamaged."""
        kind = self.kinds[number % len(self.kinds)]
        name = f"{'sound' if sound else 'seed'}-{self.seed}-{number}-{kind}"
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        place = Place(self.ground, folder, Random(f"{self.seed} {number} {kind}"), sound)
        case = KINDS[kind](place)
        before = {kept: judge.digest(kept) for kept in case.kept}
        found = run(lambda: command(case.arguments), folder, seconds=self.seconds, most=BYTES)
        faults = [*judge.faults_of_ending(found)]
        faults += judge.faults_of_files(found, before, case.absent, folder)
        if found.code == 0 and not found.stopped:
            faults += self.results(case, found.out, folder)
        elif (sound or place.harmless) and not faults:
            faults.append(Fault("wrong result", f"refused without need: {found.err.strip()[:300]}"))
        verdict = Verdict(
            number,
            kind,
            "; ".join(place.said),
            case.arguments[0],
            found.code,
            round(found.seconds, 2),
            found.peak,
            found.err.strip()[-600:],
            tuple(faults),
        )
        if faults or self.keep:
            (folder / "verdict.json").write_text(json.dumps(asdict(verdict), indent=1))
            (folder / "command.json").write_text(json.dumps(case.arguments))
        else:
            shutil.rmtree(folder, ignore_errors=True)
        return verdict

    def results(self, case: Case, out: str, folder: Path) -> list[Fault]:
        """What is wrong with the result, found in a process of its own."""
        place = folder / "judged"
        place.mkdir()

        def look() -> int:
            wrong = list(case.check(out))
            (place / "wrong.json").write_text(json.dumps(wrong))
            return 0

        found = run(look, place, seconds=self.seconds, most=BYTES)
        file = place / "wrong.json"
        if found.code != 0 or not file.is_file():
            last = (found.err.strip().splitlines() or [found.stopped])[-1]
            return [
                Fault("wrong result", f"exit code 0, and the judge cannot follow: {last[:250]}")
            ]
        return [Fault("wrong result", words) for words in json.loads(file.read_text())]

    def meet_all(self, numbers: Sequence[int], jobs: int, *, sound: bool = False) -> list[Verdict]:
        """All of these inputs, by so many processes at a time, in the order of their numbers."""
        results = [self.folder / f".verdicts-{job}" for job in range(jobs)]
        children = []
        for job, path in enumerate(results):
            child = os.fork()
            if child == 0:
                self._work(numbers[job::jobs], path, sound)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        lines = [line for path in results for line in path.read_text().splitlines()]
        for path in results:
            path.unlink()
        verdicts = [_verdict(line) for line in lines]
        if len(verdicts) != len(numbers):
            raise RuntimeError(f"{len(numbers)} inputs, and {len(verdicts)} verdicts")
        return sorted(verdicts, key=lambda one: one.number)

    def _work(self, numbers: Sequence[int], path: Path, sound: bool) -> None:
        code = 1
        try:
            with path.open("w") as file:
                for number in numbers:
                    file.write(json.dumps(asdict(self.meet(number, sound=sound))) + "\n")
                    file.flush()
            code = 0
        finally:
            if code:
                import traceback

                traceback.print_exc()
            os._exit(code)


def command(arguments: list[str]) -> int:
    """One command of Excise; its exit code."""
    from excise.cli.main import main

    return main(arguments)


def _verdict(line: str) -> Verdict:
    data = json.loads(line)
    faults = tuple(Fault(**fault) for fault in data.pop("faults"))
    return Verdict(**data, faults=faults)


def table(verdicts: Sequence[Verdict]) -> str:
    """Counts by kind."""
    heads = ("inputs", "done", "refused", *judge.CLASSES, "slowest s", "most GB")
    lines = [f"{'':16}" + "".join(f"{head:>13}" for head in heads)]
    for kind in [*dict.fromkeys(v.kind for v in verdicts), "all"]:
        ours = [v for v in verdicts if kind in (v.kind, "all")]
        good = [v for v in ours if not v.faults]
        kinds = Counter(
            fault.kind for v in ours for fault in {f.kind: f for f in v.faults}.values()
        )
        row = [len(ours), sum(v.code == 0 for v in good), sum(v.code != 0 for v in good)]
        row += [kinds[name] for name in judge.CLASSES]
        row_text = "".join(f"{n:>13}" for n in row)
        row_text += (
            f"{max(v.seconds for v in ours):>13.1f}{max(v.peak for v in ours) / 2**30:>13.1f}"
        )
        lines.append(f"{kind:16}{row_text}")
    return "\n".join(lines)


def listing(verdicts: Sequence[Verdict], seed: int) -> str:
    """Every fault, and what repeats its input."""
    return "\n".join(
        f"--seed {seed} --number {v.number}  {v.kind}  {v.command}  "
        f"[{fault.kind}] {fault.words}  <- {v.changed}"
        for v in verdicts
        for fault in v.faults
    )
