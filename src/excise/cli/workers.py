"""The flags that share a search out, as the workers that they ask for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from excise.errors import ConfigError

if TYPE_CHECKING:
    from excise.cluster.workers import Workers
    from excise.config import Config


def add_flags(sub: argparse.ArgumentParser) -> None:
    """Add the flags of workers to a command."""
    group = sub.add_argument_group("workers", "One search on several GPUs or machines, by Ray.")
    text = "workers in all, this process among them"
    group.add_argument("--workers", type=_count, metavar="N", help=text)
    text = "Ray cluster that runs already: host:port, or auto"
    group.add_argument("--ray", metavar="ADDRESS", help=text)
    text = "GPUs of each worker, where there are any (default: 1)"
    group.add_argument("--gpus-per-worker", type=_count, default=1, metavar="K", help=text)


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count from 1 to 10000")
    return int(text)


def workers_of(
    arguments: argparse.Namespace, config: Config, judge_token: str | None
) -> Workers | None:
    """Return what shares out the search, None where this process does it alone.

    Raises:
        ConfigError: Ray is not there, GPUs are too few, or a judge is shown a token.
    """
    asked = vars(arguments)
    count, address = asked.get("workers"), asked.get("ray")
    if count is None and address is None:
        return None
    if config.scores.judge.source and judge_token:
        raise ConfigError(
            "a judge that is shown a token is asked from this process alone, as the token is sent nowhere "
            "else: leave out --workers and --ray"
        )
    from excise.cluster.workers import Workers  # it loads torch

    workers = Workers(count or 2, address, asked["gpus_per_worker"])
    workers.check()
    return workers
