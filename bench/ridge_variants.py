"""Open questions about ridge ablation, tried on the demo model; none of this is part of the package.

prompts     S_keep from the prompts' tokens alone, without the model's responses
last        S_keep at the last prompt token alone
profile     a strength per layer: r falls off from a searched peak
direction   the layer's direction is removed on top, at a searched strength

`bench/methods.py run ridge+NAME` runs one of them as a study. `python bench/ridge_variants.py RUN` takes
the front of a finished ridge run and builds each of its edits anew with a capture after every edited
layer, beside the edits as they were.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from torch import Tensor

from excise import events, methods, ridge_method, stage
from excise.config import load_config
from excise.edits import Edit
from excise.keeping import DIRECTIONS, read_directions
from excise.loading import load
from excise.methods import Bench, Kind, Method
from excise.panel import Panel
from excise.planning import from_dict
from excise.prompts import load_prompt_sets
from excise.record import read_record
from excise.ridge import build
from excise.ridge_method import RidgeCandidate, RidgeMethod
from excise.stacking import Stack


class Profile(RidgeMethod):
    """r at layer l is r exp(-((l - peak) / width)^2)."""

    def space(self) -> dict[str, BaseDistribution]:
        n = float(self._layers)
        return {
            **super().space(),
            "peak": FloatDistribution(0.0, n),
            "width": FloatDistribution(1.0, 2 * n),
        }

    def candidate(self, params: Mapping[str, Any]) -> Any:
        return super().candidate(params), params["peak"], params["width"]

    def edits(self, candidate: Any) -> list[Edit | None]:
        base, peak, width = candidate
        out: list[Edit | None] = [None] * len(self.writers)
        for members, stats in self._groups:
            for g, number in enumerate(members):
                layer = self.writers[number].layer
                if base.first <= layer < base.last:
                    r = base.point.strength * math.exp(-(((layer - peak) / width) ** 2))
                    out[number] = build(stats, [g], replace(base.point, strength=max(r, 1e-6)))[0]
        return out


class WithDirection(RidgeMethod):
    """After the ridge edit, `removal` of each layer's own direction; then the row norms."""

    bench: Bench

    def space(self) -> dict[str, BaseDistribution]:
        return {**super().space(), "removal": FloatDistribution(-0.25, 1.2)}

    def candidate(self, params: Mapping[str, Any]) -> Any:
        return super().candidate(params), max(params["removal"], 0.0)

    def edits(self, candidate: Any) -> list[Edit | None]:
        base, removal = candidate
        out = []
        for writer, edit in zip(self.writers, super().edits(base), strict=True):
            out.append(edit and removed(writer, edit, self.bench.directions, removal))
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


def _captured(bench: Bench, how: str) -> dict[str, Tensor]:
    nothing = [[0]] * len(bench.tokens["contrast"])  # responses of one token: none of it counts
    answers = bench.responses() if how == "all" else nothing
    found = ridge_method.capture(
        bench.loaded, bench.writers, bench.tokens, answers, bench.config, bench.on_event
    )
    if how == "last":
        for writer in bench.writers:
            first = found[f"{writer.name}/first"]
            found[f"{writer.name}/keep"] = first.clone()
            found[f"{writer.name}/diagonal"] = first.diagonal().mean()
    return found


def install(name: str) -> None:
    """Put a variant in ridge's place."""

    def bind(bench: Bench, captured: Mapping[str, Tensor]) -> Method:
        kind = {"profile": Profile, "direction": WithDirection}.get(name, RidgeMethod)
        made = kind(bench.writers, len(bench.loaded.anatomy.layers), captured, bench.config)
        made.bench = bench  # type: ignore[attr-defined]
        return made

    how = name if name in ("prompts", "last") else "all"
    methods.KINDS["ridge"] = Kind(lambda b: _captured(b, how), bind, ridge_method.check)


@dataclass(frozen=True)
class Again:
    """Edits of a candidate, each layer captured under the edits of the layers below it."""

    bench: Bench
    method: RidgeMethod

    def edits(self, candidate: RidgeCandidate) -> list[Edit | None]:
        writers = self.method.writers
        answers = self.bench.responses()
        edits: list[Edit | None] = [None] * len(writers)
        for layer in range(candidate.first, candidate.last):
            with_lower = Stack(writers, [edits])
            with_lower.select([0])
            with with_lower.applied():
                captured = ridge_method.capture(
                    self.bench.loaded,
                    writers,
                    self.bench.tokens,
                    answers,
                    self.bench.config,
                    events.ignore,
                )
            now = RidgeMethod(writers, self.method._layers, captured, self.bench.config)
            only = replace(candidate, first=layer, last=layer + 1)
            for number, edit in enumerate(now.edits(only)):
                edits[number] = edit or edits[number]
        return edits


def main(folder: Path) -> None:
    record = read_record(folder)
    config = load_config(file=folder / "config.toml")
    loaded, sets = load(config.model), load_prompt_sets(config.prompts)
    scoring = stage.scoring(config)
    tokens = stage.stored_tokens(loaded, sets, config, scoring.markers, folder)
    method: Any = stage.stored_method(loaded, tokens, config, folder, events.ignore)
    known = read_directions(folder / DIRECTIONS)
    assert known is not None
    answers = stage._responses(loaded, tokens, config)
    bench = Bench(loaded, tokens, known[0], config, lambda: answers, lambda _: None, events.ignore)
    again = Again(bench, method)
    plan = from_dict(record.engine).plan
    engine = stage.engine_for(loaded, method.writers, tokens, "holdout", config, plan)
    context = scoring.context(sets.target_holdout, sets.contrast_holdout)
    panel = Panel(engine, scoring.every_trial, context, screen=False)
    rows = []
    for number in record.front[:6]:
        candidate = method.candidate(record.trial(number).params)
        both = [method.edits(candidate), again.edits(candidate)]
        scores = [m.scores for m in panel.measure(both)]
        rows.append([{k: s[k].value for k in ("behaviour_rate", "drift")} for s in scores])
        print(number, *rows[-1], flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
