"""Ridge ablation bound to a model's writers: its capture, its search space, and any candidate's edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from torch import Tensor

from excise.capture.moments import (
    LastRows,
    TokenSpan,
    last_rows,
    rarely_reached,
    stacked_biases,
    token_moments,
    token_sketches,
)
from excise.checkpoints.loading import Loaded
from excise.config import Config
from excise.errors import ConfigError
from excise.events import OnEvent
from excise.methods.profiles import Profile, hill_of, share_key, shares_of
from excise.methods.ridge_math import RidgePoint, RidgeStats, basis_for, build, nearest
from excise.methods.search_space import followers, hill
from excise.model.anatomy import Anatomy, Writer
from excise.model.edits import Edit

MOST_NEIGHBOURS = 60


@dataclass(frozen=True)
class RidgeCandidate:
    """One point of the search space: parameters of all writers, and the share of the edit at each layer.

    `shares` scale the edits of some components further: component -> share.
    """

    profile: Profile
    point: RidgePoint
    shares: Mapping[str, float]

    def share(self, writer: Writer) -> float:
        """Return the share of its edit that a writer gets; 0 leaves it alone."""
        return self.profile.strength(writer.layer) * self.shares.get(writer.component, 1.0)


def capture(
    loaded: Loaded,
    writers: Sequence[Writer],
    tokens: Mapping[str, list[list[int]]],
    responses: Sequence[Sequence[int]],
    config: Config,
    on_event: OnEvent,
) -> dict[str, Tensor]:
    """Capture what ridge ablation needs of every writer, under "WRITER/what".

    S_keep is over the tokens that predict the model's own `responses` to contrast prompts, from the
    prompt's last token on; S_prompt over the tokens before that one. Where a writer has more in
    features than `ridge.basis`, everything is kept in a basis of that many dimensions.

    Raises:
        MeasurementError: inputs or outputs are not finite.
        MemoryExhausted: one prompt does not fit.
    """
    target = last_rows(loaded, writers, tokens["target"], "capture target writers", on_event)
    contrast = last_rows(loaded, writers, tokens["contrast"], "capture contrast writers", on_event)
    pairs = list(zip(tokens["contrast"], responses, strict=True))
    whole = [[*ids, *answer[:-1]] for ids, answer in pairs]
    size = config.ridge.basis
    bases = _bases(loaded, writers, target, contrast, list(map(TokenSpan, whole)), size, on_event)
    written = [
        TokenSpan(text, begin=len(ids) - 1) for text, (ids, _) in zip(whole, pairs, strict=True)
    ]
    before = [TokenSpan(ids, spare=1) for ids, _ in pairs]
    keep = token_moments(loaded, writers, written, bases, "capture responses", on_event)
    prompts = token_moments(loaded, writers, before, bases, "capture prompts", on_event)
    out: dict[str, Tensor] = {}
    for writer, x, xc, kept, read in zip(writers, target, contrast, keep, prompts, strict=True):
        basis = kept.basis.cpu() if kept.basis is not None else None
        seen = x.inputs if basis is None else x.inputs @ basis.T
        first = xc.inputs if basis is None else xc.inputs @ basis.T
        parts = {
            "keep": kept.mean().cpu(),
            "prompts": read.mean().cpu(),
            "first": first.T @ first / max(len(first), 1),
            "target": seen,
            "outputs": x.outputs,
            "contrast": xc.outputs,
            "diagonal": torch.tensor(kept.square / max(kept.tokens, 1) / writer.shape[1]),
        }
        if basis is not None:
            parts["basis"] = basis
        out |= {f"{writer.name}/{what}": t.contiguous() for what, t in parts.items()}
    return out


def _bases(
    loaded: Loaded,
    writers: Sequence[Writer],
    target: Sequence[LastRows],
    contrast: Sequence[LastRows],
    texts: Sequence[TokenSpan],
    size: int,
    on_event: OnEvent,
) -> list[Tensor | None]:
    """Choose a basis per writer; None where its input space is small enough as it is.

    It spans target rows first, then contrast rows, then where most of the tokens lie.
    """
    large = [n for n, w in enumerate(writers) if w.shape[1] > size]
    bases: list[Tensor | None] = [None] * len(writers)
    if not large:
        return bases
    chosen = [writers[n] for n in large]
    sketches = token_sketches(loaded, chosen, texts, size // 2, "capture range", on_event)
    for n, sketch in zip(large, sketches, strict=True):
        bases[n] = joint_basis([target[n].inputs, contrast[n].inputs, sketch.cpu()], size)
    return bases


def joint_basis(parts: Sequence[Tensor], size: int) -> Tensor:
    """Build orthonormal rows (Q, I), Q <= size, from the main directions of each part in turn.

    No part takes more than its share of the rows that are left, so the last ones have a place too.
    """
    basis = parts[0][:0]
    for number, rows in enumerate(parts):
        room = -(-(size - len(basis)) // (len(parts) - number))
        rest = rows - (rows @ basis.T) @ basis
        if len(rest) and float(rest.abs().max()) > 0:
            new = basis_for(rest, room)
            new = new - (new @ basis.T) @ basis  # twice, against rounding
            basis = torch.cat([basis, basis_for(new, room)])
    return basis


class RidgeMethod:
    """Ridge ablation, prepared once per run. An edit depends on its candidate alone."""

    name = "ridge"

    def __init__(
        self, writers: Sequence[Writer], layers: int, captured: Mapping[str, Tensor], config: Config
    ) -> None:
        self.writers = writers
        self._layers = layers
        self._strengthen = config.goal == "strengthen"
        self._most = config.ridge.neighbours or MOST_NEIGHBOURS
        self._rank = config.ridge.rank
        self._followers = followers(list(dict.fromkeys(w.component for w in writers)))
        self._groups: list[tuple[list[int], RidgeStats]] = []
        alike: dict[tuple[Any, ...], list[int]] = {}
        few, self.notes = rarely_reached(writers, captured)
        for number, writer in enumerate(writers):
            if number in few:
                continue
            parts = [
                captured[f"{writer.name}/{what}"] for what in ("target", "outputs", "contrast")
            ]
            key = (writer.like.device, *writer.shape, *(s for p in parts for s in p.shape))
            alike.setdefault(key, []).append(number)
        restore = config.edit.row_norms == "full"
        for members in alike.values():
            some = [writers[n] for n in members]
            self._groups.append((members, _stats(some, captured, self._most, restore)))

    def space(self) -> dict[str, BaseDistribution]:
        """Return the search space; docs/methods.md says how its ranges were found."""
        most = max((s.nearest.shape[2] for _, s in self._groups), default=1)
        return {
            **hill(self._layers),
            # Below 0 means 0, which gets a probability above zero.
            **{share_key(name): FloatDistribution(-0.5, 1.0) for name in self._followers},
            "strength": FloatDistribution(0.03, 30.0, log=True),
            "overshoot": FloatDistribution(0.0, 4.0),
            "neighbours": IntDistribution(1, most),
            "damping": FloatDistribution(0.01, 1.0, log=True),
            "first_token": FloatDistribution(0.1, 10.0, log=True),
            "prompt_tokens": FloatDistribution(0.01, 1.0, log=True),
            "rank": IntDistribution(1, self._rank, log=True),
            # Above 1 means 1, which gets a probability above zero.
            "shared": FloatDistribution(0.0, 1.2),
        }

    def candidate(self, params: Mapping[str, Any]) -> RidgeCandidate:
        """Make the candidate that these parameters name."""
        over = float(params["overshoot"])
        return RidgeCandidate(
            hill_of(params),
            RidgePoint(
                strength=float(params["strength"]),
                overshoot=-over if self._strengthen else 1.0 + over,
                neighbours=int(params["neighbours"]),
                damping=float(params["damping"]),
                first=float(params["first_token"]),
                prompts=float(params["prompt_tokens"]),
                shared=min(1.0, float(params["shared"])),
                rank=int(params["rank"]),
            ),
            shares_of(params),
        )

    def edits(self, candidate: RidgeCandidate) -> list[Edit | None]:
        """Compute one edit per writer; None for layers that the candidate leaves alone.

        Raises:
            MeasurementError: a linear system is singular.
        """
        out: list[Edit | None] = [None] * len(self.writers)
        for members, stats in self._groups:
            shares = [candidate.share(self.writers[n]) for n in members]
            chosen = [g for g, share in enumerate(shares) if share]
            if chosen:
                asked = [shares[g] for g in chosen]
                edits = build(stats, chosen, candidate.point, asked)
                for g, edit in zip(chosen, edits, strict=True):
                    out[members[g]] = edit
        return out


def _stats(
    writers: Sequence[Writer], captured: Mapping[str, Tensor], most: int, restore: bool
) -> RidgeStats:
    device = writers[0].like.device

    def stack(what: str) -> Tensor:
        return torch.stack([captured[f"{w.name}/{what}"] for w in writers]).to(device)

    weights = torch.stack([w.weight.float() for w in writers])
    basis = stack("basis") if f"{writers[0].name}/basis" in captured else None
    outputs, contrast, target = stack("outputs"), stack("contrast"), stack("target")
    return RidgeStats(
        basis=basis,
        keep=stack("keep"),
        prompts=stack("prompts"),
        first=stack("first"),
        target=target,
        gram=target.mT @ target / target.shape[1],
        weights=weights if basis is None else weights @ basis.mT,
        squares=weights.square().sum(-1),
        outputs=outputs,
        contrast=contrast,
        nearest=nearest(outputs, contrast, most),
        mean_diagonal=stack("diagonal"),
        biases=stacked_biases(writers),
        restore_norms=restore,
    )


def check(config: Config, prompts: int, _anatomy: Anatomy) -> None:
    """Refuse settings that ridge ablation cannot work with, given this many contrast prompts.

    Raises:
        ConfigError: too many neighbours, or row norms "pre".
    """
    wanted = config.ridge.neighbours
    if wanted is not None and wanted > prompts:
        raise ConfigError(
            f"ridge.neighbours is {wanted}, and only {prompts} contrast prompts give directions: "
            "lower it, or raise prompts.direction_size"
        )
    if config.edit.row_norms == "pre":
        raise ConfigError('edit.row_norms "pre" is for directions: use "full" or "none" with ridge')
