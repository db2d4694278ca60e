"""The driver's side: workers are started, proven, given shares of each batch, and given up when they fail.

The driver alone owns study, journal and sampler, and it measures too: it needs the model for baseline,
holdout and export, so on one GPU there is no second copy. What is lost with a worker it measures itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from excise.cluster import ray_session
from excise.cluster.actor import Worker, facts_of
from excise.cluster.sharing import LEAST_PATIENCE, disagreement, patience, shares
from excise.errors import ConfigError, first_line
from excise.events import Notice, OnEvent
from excise.model.overrides import threads
from excise.reading import is_file
from excise.runs.pipeline import Shared
from excise.runs.run_folder import CAPTURED, DIRECTIONS
from excise.search.loop import Measure, Measured

_OPENING = 3600.0  # seconds that a worker may take to load the model


@dataclass(frozen=True)
class Member:
    """A worker by its name, 'worker 2' for the second: this process is the first."""

    name: str
    actor: Any


@dataclass
class Workers:
    """How many workers measure a study, this process among them, and where.

    Attributes:
        count: in all; at least 1.
        address: of a running cluster; None starts Ray on this machine.
        gpus: that each worker needs, where there are any.
        least_patience: seconds that a worker's answer is waited for at least.
    """

    count: int
    address: str | None = None
    gpus: int = 1
    least_patience: float = LEAST_PATIENCE
    _crew: list[Member] = field(default_factory=list)

    def check(self) -> None:
        """Refuse what cannot be had, before anything is loaded.

        Raises:
            ConfigError: Ray is not installed, or there are fewer GPUs than are asked for.
        """
        ray_session.import_ray()
        there, wanted = torch.cuda.device_count(), self.count * self.gpus
        if self.address is None and 0 < there < wanted:
            raise ConfigError(
                f"{self.count} workers with {self.gpus} GPU each need {wanted}, and this machine has "
                f"{there}: set a lower --workers or --gpus-per-worker"
            )

    @contextmanager
    def measuring(self, shared: Shared, mine: Measure) -> Iterator[Measure]:
        """Have the workers as long as a search takes; the function measures a batch on all of them."""
        files = {
            name: (shared.folder / name).read_bytes()
            for name in (DIRECTIONS, CAPTURED)
            if is_file(shared.folder / name)
        }
        sent = sum(map(len, files.values()))
        others = self.count - 1
        ray_there = (
            ray_session.started(others, sent)
            if self.address is None
            else ray_session.joined(self.address)
        )
        with ray_there as ray, threads(min(torch.get_num_threads(), self._threads())):
            self._crew = self._started(ray, shared, files)
            self._crew = [m for m in self._crew if self._proven(ray, m, shared)]
            yield lambda params: self._measure(ray, params, mine, shared.session.on_event)

    def _threads(self) -> int:
        """Return the CPU threads of a worker: on this machine they share its cores."""
        every = os.cpu_count() or 1
        return max(1, every // self.count) if self.address is None else every

    def _started(self, ray: Any, shared: Shared, files: Mapping[str, bytes]) -> list[Member]:
        config = shared.session.config.model_dump(mode="json", exclude_none=True)
        sent, sizing, made = ray.put(dict(files)), shared.sizing.as_dict(), []
        for number in range(1, self.count):
            actor = ray.remote(Worker).options(**self._place(ray, number))
            cores = self._threads()
            made.append(Member(f"worker {number + 1}", actor.remote(config, sent, sizing, cores)))
        return made

    def _place(self, ray: Any, number: int) -> dict[str, Any]:
        """Return where an actor runs: on this machine we give out the GPUs, on a cluster Ray does."""
        place: dict[str, Any] = {"num_cpus": 1, "max_restarts": 0}
        if self.address is not None:
            there = ray.cluster_resources().get("GPU", 0)
            return place | {"num_gpus": self.gpus if there else 0, "scheduling_strategy": "SPREAD"}
        if torch.cuda.device_count():
            own = range(number * self.gpus, (number + 1) * self.gpus)
            visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, own))}
            place["runtime_env"] = {"env_vars": visible}
        return place

    def _proven(self, ray: Any, member: Member, shared: Shared) -> bool:
        """Return whether a worker measures what this process does; a notice says why not."""
        mine = facts_of(shared.session, shared.sizing.batch)
        try:
            theirs = ray.get(member.actor.facts.remote(), timeout=_OPENING)
            other = [name for name, value in mine.items() if theirs.get(name) != value]
            why = f"it has another {', '.join(other)}" if other else None
            if why is None and shared.probe is not None:
                params, expected = shared.probe
                found = ray.get(member.actor.calibrate.remote(params), timeout=_OPENING)
                why = disagreement(_values(expected), _values(found))
        except ray.exceptions.RayError as error:
            why = _cause(error)
        if why is not None:
            self._give_up(ray, member, why, shared.session.on_event)
        return why is None

    def _measure(
        self, ray: Any, params: list[dict[str, Any]], mine: Measure, on_event: OnEvent
    ) -> list[Measured]:
        """Measure a batch: the first share here, one on each worker; in the order they were asked."""
        crew = list(self._crew)
        own, *theirs = shares(params, 1 + len(crew))
        asked = [
            m.actor.measure.remote(p) if p else None for m, p in zip(crew, theirs, strict=True)
        ]
        begun = time.perf_counter()
        results = list(mine(own))
        usual = time.perf_counter() - begun
        for member, part, answer in zip(crew, theirs, asked, strict=True):
            if answer is None:
                continue
            try:
                results += ray.get(answer, timeout=patience(usual, self.least_patience))
            except ray.exceptions.RayError as error:
                self._crew.remove(member)
                self._give_up(ray, member, _cause(error), on_event)
                results += mine(part)
        return results

    def _give_up(self, ray: Any, member: Member, why: str, on_event: OnEvent) -> None:
        ray.kill(member.actor)
        on_event(Notice(f"{member.name} is given up: {why}. The others measure what it had."))


def _values(measured: Measured) -> dict[str, tuple[float, int]]:
    return {name: (score.value, score.n) for name, score in measured.scores.items()}


def _cause(error: Exception) -> str:
    """Return why a worker did not answer, as one line."""
    name = type(error).__name__
    if name == "GetTimeoutError":
        return "it did not answer in many times what the others take"
    if "Died" in name or name == "RayActorError":
        return "its process ended"
    return first_line(getattr(error, "cause", None) or error)
