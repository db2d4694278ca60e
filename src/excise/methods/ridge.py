"""Ridge ablation bound to a model's writers: its capture, its search space, and any candidate's edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from torch import Tensor

from excise.capture.directions import Directions
from excise.capture.moments import (
    LastRows,
    MomentObserver,
    RowObserver,
    SketchObserver,
    TokenMoments,
    rarely_reached,
    sketch_draws,
    stacked_biases,
)
from excise.capture.sweep import Observer, Seen
from excise.config import Config
from excise.errors import ConfigError
from excise.methods.profiles import Profile, hill_of, share_key, shares_of
from excise.methods.ridge_math import RidgePoint, RidgeStats, basis_for, build, nearest
from excise.methods.search_space import followers, hill
from excise.model.anatomy import Anatomy, Writer
from excise.model.edits import Edit

MOST_NEIGHBOURS = 60
MOMENT_BYTES = 2 * 2**30  # of sums in all of input space, for writers that are kept in a basis
_SUMS_BYTES = 3 * 8  # of an entry of those: three sums in float64


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


class RidgeCapture:
    """What ridge ablation captures of every writer, under "WRITER/what".

    S_keep is over the tokens that predict the model's own responses to contrast prompts, from the
    prompt's last token on; S_prompt over the tokens before that one. Responses to prompts of the keep set
    make half of S_keep where there are any, whatever their number. Where a writer has more in
    features than `ridge.basis`, everything is kept in a basis of that many dimensions. The basis depends on
    all tokens: moments are summed in all of input space where they fit `MOMENT_BYTES`, else by a second
    sweep.
    """

    responses = True

    def __init__(self, writers: Sequence[Writer], size: int) -> None:
        """`size`: dimensions of a basis."""
        self.writers = writers
        self._size = size
        self._large = [n for n, w in enumerate(writers) if w.shape[1] > size]
        whole = sum(_SUMS_BYTES * writers[n].shape[1] ** 2 for n in self._large) <= MOMENT_BYTES
        wide = set() if whole else set(self._large)
        self._target, self._contrast = RowObserver(writers), RowObserver(writers)
        bases = {n: None for n in range(len(writers)) if n not in wide}
        self._in_full = bases
        self._keep = MomentObserver(writers, "written", bases)
        self._prompts = MomentObserver(writers, "before", bases)
        self._sketches = SketchObserver(writers, sorted(wide), size // 2)

    def observers(self, side: str) -> Sequence[Observer]:
        """Return the observers of a side's texts."""
        if side == "target":
            return [self._target]
        return [self._contrast, self._keep, self._prompts, self._sketches]

    def tensors(self, seen: Seen, _directions: Directions | None = None) -> dict[str, Tensor]:
        """Return what is stored with the run.

        Raises:
            MeasurementError: inputs or outputs are not finite.
            MemoryExhausted: one prompt does not fit in the second sweep.
        """
        target, contrast = self._target.rows(), self._contrast.rows()
        others = [MomentObserver(self.writers, "written", self._in_full)] * ("keep" in seen.texts)
        if others:
            seen.again("keep", [*others, self._sketches], "capture keep")
        bases = self._bases(target, contrast, others)
        keep, prompts = self._moments(seen, "contrast", bases, self._keep, self._prompts)
        (also,) = self._moments(seen, "keep", bases, *others) if others else ({},)
        out: dict[str, Tensor] = {}
        for number, (writer, x, xc) in enumerate(zip(self.writers, target, contrast, strict=True)):
            basis = bases.get(number)
            moment, square = _half_each(keep[number], also.get(number))
            parts = {
                "keep": moment.cpu(),
                "prompts": prompts[number].mean().cpu(),
                "first": _gram(xc.inputs if basis is None else xc.inputs @ basis.T),
                "target": x.inputs if basis is None else x.inputs @ basis.T,
                "outputs": x.outputs,
                "contrast": xc.outputs,
                "diagonal": torch.tensor(square / writer.shape[1]),
            }
            if basis is not None:
                parts["basis"] = basis
            out |= {f"{writer.name}/{what}": t.contiguous() for what, t in parts.items()}
        return out

    def _bases(
        self,
        target: Sequence[LastRows],
        contrast: Sequence[LastRows],
        others: Sequence[MomentObserver],
    ) -> dict[int, Tensor]:
        """Choose a basis for each writer whose input space is too large as it is.

        It spans target rows first, then contrast rows, then where most of the tokens lie.
        """
        sketches = self._sketches.sums
        if not sketches:
            draws = sketch_draws(self.writers, self._large, self._size // 2)
            sums = {n: self._keep.sums[n].moment + self._prompts.sums[n].moment for n in draws}
            for one in others:
                sums = {n: some + one.sums[n].moment for n, some in sums.items()}
            sketches = {n: (draws[n].T.to(sums[n]) @ sums[n]).float() for n in draws}
        return {
            n: joint_basis([target[n].inputs, contrast[n].inputs, sketch.cpu()], self._size)
            for n, sketch in sketches.items()
        }

    def _moments(
        self, seen: Seen, texts: str, bases: Mapping[int, Tensor], *observers: MomentObserver
    ) -> list[dict[int, TokenMoments]]:
        """Return what these observers sum over some texts, in a writer's basis where it has one."""
        if self._sketches.sums:
            again = [MomentObserver(self.writers, one.span, bases) for one in observers]
            seen.again(texts, again, "capture moments")
            return [one.sums | more.sums for one, more in zip(observers, again, strict=True)]
        return [
            {n: some.within(bases[n]) if n in bases else some for n, some in one.sums.items()}
            for one in observers
        ]


def _half_each(a: TokenMoments, b: TokenMoments | None) -> tuple[Tensor, float]:
    """Return the mean of two moments per token, and of their squares per token.

    One of no tokens, as of an expert that these texts do not reach, does not count.
    """
    parts = [part for part in (a, b) if part is not None and part.tokens] or [a]
    moment = torch.stack([part.mean() for part in parts]).mean(0)
    return moment, sum(part.square / max(part.tokens, 1) for part in parts) / len(parts)


def _gram(rows: Tensor) -> Tensor:
    return rows.T @ rows / max(len(rows), 1)


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
