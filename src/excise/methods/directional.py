"""Directional ablation bound to a model's writers: its search space, and any candidate's edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from optuna.distributions import BaseDistribution

from excise.capture.directions import Directions
from excise.config import EditSection
from excise.methods.directional_math import GroupStats, build, prepare
from excise.methods.profiles import Candidate, from_params
from excise.methods.search_space import distributions
from excise.model.anatomy import Writer
from excise.model.edits import Edit


class DirectionalMethod:
    """Directional ablation, prepared once per run. An edit depends on its candidate alone.

    `strengthen` adds the direction in place of removing it: strengths count as negative.
    """

    name = "directional"
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        writers: Sequence[Writer],
        directions: Directions,
        section: EditSection,
        *,
        strengthen: bool = False,
    ) -> None:
        self.writers = writers
        self.directions = directions
        self.layers = directions.unit.shape[0]
        self.sign = -1.0 if strengthen else 1.0
        self._groups: list[tuple[list[int], GroupStats]] = []
        alike: dict[tuple[Any, ...], list[int]] = {}
        for number, w in enumerate(writers):
            alike.setdefault((w.component, w.shape, w.like.device), []).append(number)
        for members in alike.values():
            chosen = [writers[number] for number in members]
            stats = prepare(
                [w.weight for w in chosen],
                [w.layer for w in chosen],
                directions,
                row_norms=section.row_norms,
                gains=[w.gain if section.post_norms else None for w in chosen],
                biases=[w.bias for w in chosen],
            )
            self._groups.append((members, stats))

    def space(self) -> dict[str, BaseDistribution]:
        """Return the search space: see `search_space.distributions`."""
        components = tuple(dict.fromkeys(writer.component for writer in self.writers))
        return distributions(components, self.layers)

    def candidate(self, params: Mapping[str, Any]) -> Candidate:
        """Make the candidate that these parameters name."""
        return from_params(params)

    def edits(self, candidate: Candidate) -> list[Edit | None]:
        """Compute one edit per writer; None where the candidate's strength is zero."""
        strengths = [candidate.strength(w.component, w.layer) for w in self.writers]
        out: list[Edit | None] = [None] * len(self.writers)
        for members, stats in self._groups:
            some = self.sign * torch.tensor([strengths[n] for n in members], dtype=torch.float64)
            if not bool(some.any()):
                continue
            group = build(stats, candidate.index, some)
            for g, number in enumerate(members):
                if strengths[number]:
                    out[number] = group.one(g)
        return out
