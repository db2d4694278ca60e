"""Questions about ridge ablation, tried on the demo model; none of this is part of the package.

last        the last prompt token alone is kept, without the model's responses
targets     the tokens of target prompts before the last are kept as those of contrast prompts are
alike       every token is kept duplicates: responses, their prompts, and target prompts before the last
more        the search's contrast prompts and the responses to them in every moment as well
own         every target's outputs have a goal of their own, none in common
full        goals of all the rank they have
flat        the same strength at every layer that is edited
together    every component goes the whole way
direction   the layer's direction is removed on top, at a searched strength

`bench/methods.py run ridge+NAME` runs one of them as a study. `python bench/ridge_variants.py RUN` takes
the front of a finished ridge run and builds each of its edits anew with a capture after every edited
layer, beside the edits as they were, and adds both to `bench/methods.json`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from reopened import reopen
from torch import Tensor

from excise.capture.directions import Directions
from excise.capture.moments import MomentObserver
from excise.capture.sweep import ResidualsAlone, Seen, Sweep, Text, observe
from excise.config import load_config
from excise.engine.stacking import Stack
from excise.methods import registry, ridge
from excise.methods.profiles import Profile
from excise.methods.registry import Bench, Kind, edited_writers
from excise.methods.ridge import RidgeCandidate, RidgeMethod
from excise.model.edits import Edit
from excise.runs.session import Session


class Bound(RidgeMethod):
    """Ridge, from a bench."""

    def __init__(
        self, bench: Bench, directions: Directions, captured: Mapping[str, Tensor]
    ) -> None:
        layers = len(bench.loaded.anatomy.layers)
        super().__init__(edited_writers(bench), layers, captured, bench.config)
        self.directions = directions


class Own(Bound):
    """No goal in common."""

    def candidate(self, params: Mapping[str, Any]) -> RidgeCandidate:
        return super().candidate({**params, "shared": 0.0})


class Full(Bound):
    """Goals that are not cut to a rank."""

    def candidate(self, params: Mapping[str, Any]) -> RidgeCandidate:
        return super().candidate({**params, "rank": 1_000_000})


class Flat(Bound):
    """The strength at the edge is that at the peak."""

    def candidate(self, params: Mapping[str, Any]) -> RidgeCandidate:
        return super().candidate({**params, "min_weight": 1.0})


class Together(Bound):
    """MLPs go as far as attention does."""

    def candidate(self, params: Mapping[str, Any]) -> RidgeCandidate:
        return replace(super().candidate(params), shares={})


class Written(Bound):
    """Nothing but S_keep and S_first is kept."""

    def candidate(self, params: Mapping[str, Any]) -> RidgeCandidate:
        return super().candidate({**params, "prompt_tokens": 0.0})


class WithDirection(Bound):
    """After the ridge edit, `removal` of each layer's own direction; then the row norms."""

    def space(self) -> dict[str, BaseDistribution]:
        return {**super().space(), "removal": FloatDistribution(-0.25, 1.2)}

    def candidate(self, params: Mapping[str, Any]) -> Any:
        return super().candidate(params), max(params["removal"], 0.0)

    def edits(self, candidate: Any) -> list[Edit | None]:
        base, removal = candidate
        out = []
        for writer, edit in zip(self.writers, super().edits(base), strict=True):
            out.append(edit and removed(writer, edit, self.directions, removal))
        return out


def removed(writer: Any, edit: Edit, directions: Any, removal: float) -> Edit:
    w = writer.module.weight.float()
    v = directions.at(writer.layer, None)
    if writer.gain is not None:
        v = v * writer.gain
    v = v / v.norm()
    moved = w - edit.left @ edit.right
    left = torch.cat([edit.left, removal * v[:, None]], dim=1)
    right = torch.cat([edit.right, (v @ moved)[None]])
    norms = w.norm(dim=1)
    after = (w - left @ right).norm(dim=1)
    return Edit(left, right, norms / after.clamp_min(1e-12), None)


@dataclass(frozen=True)
class Variant(ResidualsAlone):
    """What ridge captures, in another way: in a sweep of its own."""

    bench: Bench = field(kw_only=True)
    how: str = field(kw_only=True)

    def tensors(self, _seen: Seen, _directions: Directions) -> dict[str, Tensor]:
        """Return what is stored with the run."""
        return _captured(self.bench, self.how)


def _ridge(bench: Bench, tokens: Mapping[str, Any], answers: Sequence[Any]) -> dict[str, Tensor]:
    capture = ridge.RidgeCapture(edited_writers(bench), bench.config.ridge.basis)
    return capture.tensors(observe(bench.loaded, capture, tokens, answers, on_event=bench.on_event))


def _captured(bench: Bench, how: str) -> dict[str, Tensor]:
    assert isinstance(bench, Session)
    tokens: Mapping[str, Any] = bench.tokens
    answers = bench.responses()
    writers = edited_writers(bench)
    if how == "last":
        answers = [[0]] * len(tokens["contrast"])  # responses of one token: none of it is read
    if how == "more":
        sets = {**bench.sets.sets, "contrast": bench.sets["contrast_eval"]}
        answers = [*answers, *replace(bench, sets=replace(bench.sets, sets=sets)).responses()]
        contrast = [*tokens["contrast"], *tokens["contrast_eval"]]
        tokens = {"target": tokens["target"], "contrast": contrast}
    found = _ridge(bench, tokens, answers)
    if how in ("targets", "alike"):
        _keep_targets(bench, found)
    if how == "alike":
        written = sum(map(len, answers))
        read = sum(len(ids) - 1 for side in ("target", "contrast") for ids in tokens[side])
        for writer in writers:
            mixed = _mixed(
                found[f"{writer.name}/keep"], written, found[f"{writer.name}/prompts"], read
            )
            found[f"{writer.name}/keep"] = mixed
            found[f"{writer.name}/diagonal"] = mixed.diagonal().mean()
    return found


def _keep_targets(bench: Bench, found: dict[str, Tensor]) -> None:
    """Put the tokens of target prompts before the last into S_prompt."""
    writers = edited_writers(bench)
    bases = [found.get(f"{writer.name}/basis") for writer in writers]
    texts = list(map(Text.of, bench.tokens["target"]))
    own = sum(len(ids) - 1 for ids in bench.tokens["contrast"])
    moments = MomentObserver(writers, "before", dict(enumerate(bases)))
    Sweep(bench.loaded, writers, [moments]).over(texts, "targets", bench.on_event)
    for writer, more in zip(writers, moments.sums.values(), strict=True):
        key = f"{writer.name}/prompts"
        found[key] = _mixed(found[key], own, more.mean().cpu(), more.tokens)


def _mixed(a: Tensor, count: int, b: Tensor, other: int) -> Tensor:
    """The mean of two means, each of as many."""
    return (count * a + other * b) / (count + other)


KINDS = {
    "own": Own,
    "full": Full,
    "flat": Flat,
    "together": Together,
    "direction": WithDirection,
    "last": Written,
    "alike": Written,
}
NAMES = (*KINDS, "targets", "more")
RIDGE = registry.KINDS["ridge"]


def install(name: str | None) -> None:
    """Put a variant in ridge's place; None puts ridge back."""
    if name is None:
        registry.KINDS["ridge"] = RIDGE
        return
    bind = KINDS.get(name, Bound)
    registry.KINDS["ridge"] = Kind(lambda bench: Variant(bench=bench, how=name), bind, RIDGE.check)


@dataclass(frozen=True)
class Again:
    """Edits of a candidate, each layer captured under the edits of the layers below it."""

    bench: Session
    method: RidgeMethod

    def edits(self, candidate: RidgeCandidate) -> list[Edit | None]:
        writers = self.method.writers
        answers = self.bench.responses()
        edits: list[Edit | None] = [None] * len(writers)
        for layer in range(self.method._layers):
            share = candidate.profile.strength(layer)
            if not share:
                continue
            with_lower = Stack(writers, [edits])
            with with_lower.applied([0]):
                captured = _ridge(self.bench, self.bench.tokens, answers)
            now = RidgeMethod(writers, self.method._layers, captured, self.bench.config)
            only = replace(candidate, profile=Profile(share, layer, 1.0, 0.5))
            for number, edit in enumerate(now.edits(only)):
                edits[number] = edit or edits[number]
        return edits


def main(folder: Path) -> None:
    from methods import store

    config = load_config(file=folder / "config.toml")
    found = reopen(folder, config)
    method: Any = found.session.method
    again = Again(found.session, method)
    rows = []
    for number in found.record.front[:6]:
        candidate = method.candidate(found.record.trial(number).params)
        both = [method.edits(candidate), again.edits(candidate)]
        scores = [m.scores for m in found.holdout.measure(both)]
        figures = [[s[k].value for k in ("behaviour_rate", "drift")] for s in scores]
        rows.append({"trial": number, "once": figures[0], "again": figures[1]})
        print(rows[-1], flush=True)
    store("again", {"trials": len(found.record.trials), "rows": rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
