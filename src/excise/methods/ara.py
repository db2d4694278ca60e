"""Arbitrary-rank ablation bound to a model's writers: its capture, search space, and candidates' edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from torch import Tensor

from excise.capture.directions import Directions
from excise.capture.moments import RowObserver, rarely_reached, stacked_biases
from excise.capture.sweep import SIDES, Observer, Seen
from excise.config import Config
from excise.errors import ConfigError
from excise.methods.ara_math import AraPoint, AraStats, build, prepare
from excise.methods.ridge_math import basis_for
from excise.model.anatomy import Anatomy, Writer
from excise.model.edits import Edit

MOST_NEIGHBOURS = 15
# Bytes of the writers that are solved together, the optimiser's history included.
_PART_BYTES = {"cpu": 2 * 2**30, "gpu": 16 * 2**30}
_HISTORY = 24  # copies of the unknowns that the optimiser keeps


@dataclass(frozen=True)
class AraCandidate:
    """One point of the search space: layers first <= l < last are edited, all with the same parameters."""

    first: int
    last: int
    point: AraPoint


class AraCapture:
    """Every writer's inputs at the last prompt token, under "WRITER/target" and "WRITER/contrast".

    Those of the keep set, where any of it is used, are under "WRITER/keep".
    """

    responses = False

    def __init__(self, writers: Sequence[Writer]) -> None:
        self.writers = writers
        self._rows = {side: RowObserver(writers) for side in SIDES}

    def observers(self, side: str) -> Sequence[Observer]:
        """Return the observer of a side's prompts."""
        return [self._rows[side]]

    def tensors(self, seen: Seen, _directions: Directions) -> dict[str, Tensor]:
        """Return what is stored with the run.

        Raises:
            MeasurementError: inputs or outputs are not finite.
            MemoryExhausted: one prompt of the keep set does not fit.
        """
        found = dict(self._rows)
        if seen.texts.get("keep"):
            found["keep"] = RowObserver(self.writers)
            seen.again("keep", [found["keep"]], "capture keep")
        return {
            f"{writer.name}/{side}": rows.inputs
            for side, one in found.items()
            for writer, rows in zip(self.writers, one.rows(), strict=True)
        }


class AraMethod:
    """Arbitrary-rank ablation, prepared once per run. An edit depends on its candidate alone."""

    name = "ara"

    def __init__(
        self, writers: Sequence[Writer], layers: int, captured: Mapping[str, Tensor], config: Config
    ) -> None:
        self.writers = writers
        self._layers = layers
        self._iterations = config.ara.iterations
        self._groups: list[tuple[list[int], AraStats]] = []
        few, self.notes = rarely_reached(writers, captured)
        alike: dict[tuple[Any, ...], list[int]] = {}
        bases: dict[int, Tensor | None] = {}
        for number, writer in enumerate(writers):
            if number in few:
                continue
            rows = [
                captured[f"{writer.name}/{side}"]
                for side in ("target", "contrast", "keep")
                if f"{writer.name}/{side}" in captured
            ]
            bases[number] = basis = _basis(torch.cat(rows))
            span = rows[0].shape[1] if basis is None else len(basis)
            key = (writer.like.device, *writer.shape, *map(len, rows), span)
            alike.setdefault(key, []).append(number)
        for members in alike.values():
            stats = _stats([writers[n] for n in members], [bases[n] for n in members], captured,
                           keep_norms=config.edit.row_norms == "full")  # fmt: skip
            self._groups.append((members, stats))
        wanted = config.ara.neighbours or MOST_NEIGHBOURS
        contrast = max((s.contrast.shape[1] for _, s in self._groups), default=1)
        self._neighbours = min(wanted, contrast)

    def space(self) -> dict[str, BaseDistribution]:
        """Return the search space, in the published ranges."""
        half = self._layers // 2
        return {
            "first_layer": IntDistribution(0, half),
            "last_layer": IntDistribution(half + 1, self._layers),
            "preserve": FloatDistribution(0.0, 1.0),
            "steer": FloatDistribution(1e-4, 1.0, log=True),
            "overshoot": FloatDistribution(0.0, 1.3),
            "neighbours": IntDistribution(1, self._neighbours),
        }

    def candidate(self, params: Mapping[str, Any]) -> AraCandidate:
        """Make the candidate that these parameters name."""
        return AraCandidate(
            int(params["first_layer"]),
            int(params["last_layer"]),
            AraPoint(
                preserve=float(params["preserve"]),
                steer=float(params["steer"]),
                overshoot=float(params["overshoot"]),
                neighbours=int(params["neighbours"]),
            ),
        )

    def edits(self, candidate: AraCandidate) -> list[Edit | None]:
        """Compute one edit per writer; None for layers that the candidate leaves alone.

        Raises:
            MeasurementError: an edit diverged.
        """
        out: list[Edit | None] = [None] * len(self.writers)
        for members, stats in self._groups:
            chosen = [
                g
                for g, number in enumerate(members)
                if candidate.first <= self.writers[number].layer < candidate.last
            ]
            unknowns = stats.start[0].numel() * stats.start.element_size()
            room = _PART_BYTES["cpu" if stats.start.device.type == "cpu" else "gpu"]
            step = max(1, room // (_HISTORY * unknowns))
            for start in range(0, len(chosen), step):
                some = chosen[start : start + step]
                names = [self.writers[members[g]].key for g in some]
                edits = build(stats, some, candidate.point, self._iterations, names)
                for g, edit in zip(some, edits, strict=True):
                    out[members[g]] = edit
        return out


def _basis(rows: Tensor) -> Tensor | None:
    """Compute orthonormal rows that span these inputs; None where they are no fewer than the features."""
    if len(rows) >= rows.shape[1]:
        return None
    return basis_for(rows, len(rows))


def _stats(
    writers: Sequence[Writer],
    bases: Sequence[Tensor | None],
    captured: Mapping[str, Tensor],
    *,
    keep_norms: bool,
) -> AraStats:
    device = writers[0].like.device

    def stack(side: str) -> Tensor:
        return torch.stack([captured[f"{w.name}/{side}"] for w in writers]).to(device)

    name = f"{writers[0].name}/keep"
    kept = name in captured and len(captured[name])  # none of an expert that no such prompt reaches
    some = [basis for basis in bases if basis is not None]
    return prepare(
        torch.stack([w.weight.float() for w in writers]),
        stack("target"),
        stack("contrast"),
        torch.stack(some).to(device) if some else None,
        stacked_biases(writers),
        keep_norms=keep_norms,
        keep=stack("keep") if kept else None,
    )


def check(config: Config, prompts: int, _anatomy: Anatomy) -> None:
    """Refuse settings that arbitrary-rank ablation cannot work with, given this many contrast prompts.

    Raises:
        ConfigError: strengthening, too many neighbours, or row norms "pre".
    """
    if config.goal == "strengthen":
        raise ConfigError(
            "ara moves outputs to contrast outputs and cannot strengthen a behaviour: "
            "use --method directional, subspace or ridge"
        )
    wanted = config.ara.neighbours
    if wanted is not None and wanted > prompts:
        raise ConfigError(
            f"ara.neighbours is {wanted}, and only {prompts} contrast prompts give directions: "
            "lower it, or raise prompts.direction_size"
        )
    if config.edit.row_norms == "pre":
        raise ConfigError('edit.row_norms "pre" is for directions: use "full" or "none" with ara')
