"""Subspace ablation bound to a model's writers: its capture, search space, and candidates' edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from torch import Tensor

from excise.capture.directions import Directions
from excise.capture.residuals import Pass
from excise.capture.sweep import SIDES, ResidualsAlone, Seen
from excise.config import Config, EditSection
from excise.errors import ConfigError
from excise.methods.directional import DirectionalMethod
from excise.methods.profiles import Candidate
from excise.methods.subspace_math import orthonormal, principal, prototypes, remove
from excise.model.anatomy import Anatomy, Writer
from excise.model.edits import Edit


@dataclass(frozen=True)
class SubspaceCandidate:
    """Directional candidate, and how strongly each further direction is removed relative to the first.

    `shares` has one entry for every direction but the first; those beyond the rank are not in it.
    """

    main: Candidate
    shares: tuple[float, ...]


@dataclass(frozen=True)
class SubspaceCapture(ResidualsAlone):
    """What subspace ablation makes of the residuals."""

    config: Config = field(kw_only=True)

    def tensors(self, seen: Seen, directions: Directions) -> dict[str, Tensor]:
        """Return what is stored with the run."""
        target, contrast = (seen.residuals[side] for side in SIDES)
        return capture(target, contrast, directions, self.config)


def capture(
    target: Pass, contrast: Pass, directions: Directions, config: Config
) -> dict[str, Tensor]:
    """Compute the directions of every layer, as "rows" (L, K, D) float32, orthonormal within a layer."""
    find = principal if config.subspace.kind == "principal" else prototypes
    t, c = (torch.cat([x[:, 1:].float().cpu() for _, x in run()]) for run in (target, contrast))
    rows = [
        find(t[:, layer], c[:, layer], first, config.subspace.rank)
        for layer, first in enumerate(directions.unit)
    ]
    return {"rows": torch.stack(rows).float().contiguous()}


class SubspaceMethod:
    """Subspace ablation, prepared once per run. An edit depends on its candidate alone."""

    name = "subspace"
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        writers: Sequence[Writer],
        directions: Directions,
        captured: Mapping[str, Tensor],
        section: EditSection,
        *,
        strengthen: bool = False,
    ) -> None:
        self.writers = writers
        self._directions = directions
        self._rows = captured["rows"]  # (L, K, D)
        self._section = section
        self._single = DirectionalMethod(writers, directions, section, strengthen=strengthen)
        self._sign = -1.0 if strengthen else 1.0

    def space(self) -> dict[str, BaseDistribution]:
        """Return the directional space, the rank, and each further direction's share of the strength."""
        rank = self._rows.shape[1]
        shares = {f"share_{j + 1}": FloatDistribution(0.0, 1.5) for j in range(1, rank)}
        return {**self._single.space(), "rank": IntDistribution(1, rank), **shares}

    def candidate(self, params: Mapping[str, Any]) -> SubspaceCandidate:
        """Make the candidate that these parameters name."""
        shares = tuple(float(params[f"share_{j + 1}"]) for j in range(1, int(params["rank"])))
        return SubspaceCandidate(self._single.candidate(params), shares)

    def edits(self, candidate: SubspaceCandidate) -> list[Edit | None]:
        """Compute one edit per writer; None where the candidate's strength is zero."""
        if not any(candidate.shares):
            return self._single.edits(candidate.main)  # rank one is directional ablation itself
        out: list[Edit | None] = []
        found: dict[tuple[int, int | None], Tensor] = {}
        for writer in self.writers:
            strength = self._sign * candidate.main.strength(writer.component, writer.layer)
            if not strength:
                out.append(None)
                continue
            gain = writer.gain if self._section.post_norms else None
            key = (writer.layer, None if gain is None else id(gain))
            if key not in found:  # shared by a layer's writers without post-norms
                found[key] = self._at(writer.layer, candidate, gain)
            strengths = [strength, *(strength * share for share in candidate.shares)]
            out.append(
                remove(
                    writer.weight,
                    writer.bias,
                    found[key],
                    strengths,
                    self._section.row_norms,
                )
            )
        return out

    def _at(self, layer: int, candidate: SubspaceCandidate, gain: Tensor | None) -> Tensor:
        """Return the directions (K, D) that are removed at a layer; see `Directions.at`.

        The first may lie between two layers. The others have no order that layers share, so they are those
        of the nearest layer.
        """
        index = candidate.main.index
        nearest = layer if index is None else min(round(index), len(self._rows) - 1)
        first = self._directions.at(layer, index).double()
        rows = self._rows[nearest, 1 : 1 + len(candidate.shares)].double()
        if self._directions.projected:
            m = self._directions.contrast[layer].double()
            rows = rows - (rows @ m)[:, None] * m
        rows = torch.cat([first[None], rows])
        if gain is not None:
            rows = rows * gain.double().to(rows.device)
        return orthonormal(rows)


def check(config: Config, prompts: int, anatomy: Anatomy) -> None:
    """Refuse a rank that neither the residual nor the prompts have room for.

    Raises:
        ConfigError: a subspace of the configured rank cannot be found.
    """
    rank = config.subspace.rank
    if rank > anatomy.width:
        raise ConfigError(
            f"subspace.rank is {rank}, and the residual has only {anatomy.width} dimensions"
        )
    if rank > prompts:
        raise ConfigError(
            f"subspace.rank is {rank}, and only {prompts} prompts of each side give directions: "
            "lower it, or raise prompts.direction_size"
        )
