"""Methods on small models with random weights, bound as a run binds them."""

from __future__ import annotations

import builders
import optuna
import torch

from excise.capture.directions import Directions, from_means
from excise.capture.residuals import mean, residual_pass
from excise.methods.registry import kind_of
from excise.prompts.tokens import batches
from excise.runs import setup
from excise.runs.session import Session

LIMIT = 4


def tokens_of(seed: int = 0, count: int = 12) -> dict[str, list[list[int]]]:
    return {
        "target": builders.token_ids(count, seed=seed, shortest=4),
        "contrast": builders.token_ids(count, seed=seed + 1, shortest=4),
    }


def directions_of(loaded, tokens) -> Directions:
    means = [mean(residuals(loaded, tokens[side]))[1:] for side in ("target", "contrast")]
    return from_means(*means)


def residuals(loaded, rows):
    return residual_pass(loaded.anatomy, batches(rows, 16, 0, torch.device("cpu")), None)


def bench_of(loaded, name: str, sections, count: int = 12) -> Session:
    """What a run gives a method, on a small model."""
    scores = {"max_new_tokens": LIMIT}
    return builders.session(loaded, tokens_of(count=count), method=name, scores=scores, **sections)


def bound(bench: Session, captured=None, directions=None):
    """What is captured for a bench's method, if it is not given, and the method."""
    kind, directions = (
        kind_of(bench.config),
        directions or directions_of(bench.loaded, bench.tokens),
    )
    if captured is None:
        captured = setup.captured_of(bench, directions)
    return captured, kind.bind(bench, directions, captured)


def method_of(name: str, family: str = "qwen3", **sections):
    """A method as a run makes it, on a small model with random weights."""
    loaded = builders.loaded(family)
    bench = bench_of(loaded, name, sections)
    return loaded, bench, *bound(bench)


def params_of(method, count: int, seed: int = 3):
    """Points of a method's space, drawn as the search draws its first ones."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [study.ask(method.space()).params for _ in range(count)]
