"""What a run takes beside its search, phase by phase, over the least that each phase can take.

The floor of a phase is one prefill of the prompts that it reads and one decode of the responses that it
writes, both at the rate that a prefill reaches here. Each text counts once for each model that reads or
writes it, however often the phase does. Sizing has nothing to read: its floor is nothing.

Run by `bench/run.py`; `python bench/phases.py [demo|smollm2]` prints the figures alone.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from excise import events
from excise.config import Config, load_config
from excise.engine.engine import Engine
from excise.engine.passes import Passes
from excise.engine.requests import Response
from excise.model.forward import Forward
from excise.prompts.tokens import batches
from excise.runs import pipeline
from excise.runs.session import Session

PHASES = ("capture", "plan", "baseline", "holdout", "export")
_TIMES = 3  # that the rate of a prefill is taken
# Sizes of the real model's run, and every which prompt of the keep set it has.
_SMALL = {"prompts.direction_size": 32, "prompts.eval_size": 16, "prompts.holdout_size": 16}
_KEEP = 16

Text = tuple[int, ...]


@dataclass
class Ledger:
    """Texts that the phases read and wrote, each once for each model and edit: its number of tokens."""

    phase: str = ""
    seconds: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # of the clock, of the processor
    rate: tuple[float, float] = (0.0, 0.0)  # tokens of a prefill for each of them
    read: dict[str, dict[Any, int]] = field(default_factory=dict)
    written: dict[str, dict[Any, int]] = field(default_factory=dict)
    session: Session | None = None
    _begun: tuple[float, float] = (0.0, 0.0)

    def __call__(self, event: events.Event) -> None:
        if not isinstance(event, events.PhaseStarted | events.PhaseEnded):
            return
        if isinstance(event, events.PhaseStarted) and event.phase in (*PHASES, "search"):
            self.phase, self._begun = event.phase, now()
        elif event.phase == self.phase:
            ended = now()
            self.seconds[self.phase] = (ended[0] - self._begun[0], ended[1] - self._begun[1])
            if self.phase == "capture":
                assert self.session is not None
                sets = self.session.sets
                prompts = [*sets["target"].ids, *sets["contrast"].ids]
                self.rate = prefill_rate(self.session.loaded.forward, prompts)

    def prompt(self, of: Any, text: Sequence[int]) -> None:
        self.read.setdefault(self.phase, {})[of, tuple(text)] = len(text)

    def response(self, of: Any, prompt: Sequence[int], response: Response) -> None:
        self.written.setdefault(self.phase, {})[of, tuple(prompt)] = len(response.tokens)

    def tokens(self, phase: str) -> tuple[int, int]:
        """Tokens that a phase has to read, and to write."""
        read, written = (sum(one.get(phase, {}).values()) for one in (self.read, self.written))
        return read, written


@contextmanager
def kept_in(ledger: Ledger) -> Iterator[None]:
    """Write down what the engines and the capture of a run read and write within this context."""
    answer, diverge, observe = Engine._answer, Engine._diverge, Session.observe

    def answered(
        self: Engine, side: str, deciders: Any, passes: Passes, numbers: list[int]
    ) -> list[list[Response]]:
        found = answer(self, side, deciders, passes, numbers)
        for member, responses in enumerate(found):
            of = id(self._forward), _edit(passes, member)
            for number, response in zip(numbers, responses, strict=True):
                prompt = self.prompts[side][number]
                ledger.prompt(of, prompt)
                ledger.response(of, prompt, response)
        return found

    def compared(self: Engine, side: str) -> Callable[..., Any]:
        work = diverge(self, side)

        def noted(passes: Passes, members: list[int], chunk: list[int]) -> Any:
            for member in members:
                of = id(self._forward), _edit(passes, member)
                if of[1] is None and self._reference is self._forward:
                    continue  # what the original wrote is not read again
                for number in chunk:
                    response = self._originals[side].responses[number].tokens
                    ledger.prompt(of, [*self.prompts[side][number], *response])
            return work(passes, members, chunk)

        return noted

    def observed(self: Session, capture: Any) -> Any:
        ledger.session = self
        for side in ("target", "contrast"):
            for text in self.sets[side].ids:
                ledger.prompt((id(self.loaded.forward), None), text)
        return observe(self, capture)

    with (
        mock.patch.object(Engine, "_answer", answered),
        mock.patch.object(Engine, "_diverge", compared),
        mock.patch.object(Session, "observe", observed),
    ):
        yield


def _edit(passes: Passes, member: int) -> int | None:
    """What tells a stack's candidate from the original: None for that one."""
    layers = len(passes.forward.anatomy.layers)
    first = passes.stack.first_of(member)
    return None if first >= layers else member


def now() -> tuple[float, float]:
    """Seconds of the clock, and of the processor: what else the machine does counts in the first."""
    return time.perf_counter(), time.process_time()


def prefill_rate(forward: Forward, prompts: Sequence[list[int]]) -> tuple[float, float]:
    """Tokens a second of a prefill of these prompts in batches of like length: the best of some."""
    chunks = batches(prompts, 64, 0, forward.device)
    taken = []
    for _ in range(_TIMES):
        begun = now()
        with torch.inference_mode():
            for batch in chunks:
                forward.hidden(batch.ids, batch.mask, batch.positions)
        ended = now()
        taken.append((ended[0] - begun[0], ended[1] - begun[1]))
    count = sum(map(len, prompts))
    return count / min(t for t, _ in taken), count / min(t for _, t in taken)


def measure(config: Config) -> dict[str, Any]:
    """Seconds, floor and multiple of every phase of a run of its own."""
    ledger = Ledger()
    with tempfile.TemporaryDirectory(prefix="excise-bench-") as folder, kept_in(ledger):
        record = pipeline.run(config, Path(folder) / "run", ledger)
    phases: dict[str, Any] = {}
    for phase in PHASES:
        read, written = ledger.tokens(phase)
        phases[phase] = {"read": read, "written": written, **_over(ledger, [phase])}
    return {
        "method": record.method,
        "prefill_tokens_per_second": round(ledger.rate[0]),
        "phases": phases,
        "together": _over(ledger, PHASES),
    }


def _over(ledger: Ledger, phases: Sequence[str]) -> dict[str, Any]:
    """Seconds and floor of phases, and how many times as long they took, by clock and processor."""
    tokens = sum(sum(ledger.tokens(phase)) for phase in phases)
    seconds = [sum(ledger.seconds[phase][which] for phase in phases) for which in (0, 1)]
    floors = [tokens / rate for rate in ledger.rate]
    times = [round(s / f, 2) if f else None for s, f in zip(seconds, floors, strict=True)]
    return {
        "seconds": round(seconds[0], 2),
        "floor": round(floors[0], 2),
        "times": times[0],
        "processor_times": times[1],
    }


def demo() -> Config:
    flags = {"model.source": "demo", "search.trials": 16}
    return load_config(behaviour="demo", flags=flags)


def real(folder: Path) -> Config:
    """The real model at small sizes, with a share of the keep set."""
    lines = (files("excise") / "data" / "keep" / "prompts.jsonl").read_text("utf-8").splitlines()
    some = folder / "keep.jsonl"
    some.write_text("\n".join(lines[::_KEEP]) + "\n", encoding="utf-8")
    flags = {
        "model.source": "smollm2",
        "search.trials": 2,
        "prompts.keep": [{"source": str(some)}],
        **_SMALL,
    }
    return load_config(behaviour="disclaimers", flags=flags)


def main(names: Sequence[str] = ("demo", "smollm2")) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="excise-bench-") as folder:
        configs = {"demo": demo(), "smollm2": real(Path(folder))}
        return {name: measure(configs[name]) for name in names}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:] or ("demo", "smollm2")), indent=1))
