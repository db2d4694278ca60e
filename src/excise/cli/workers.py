"""The flags that share a search out, as the workers that they ask for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from excise.errors import ConfigError

if TYPE_CHECKING:
    from excise.cluster.workers import Workers
    from excise.config import Config


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
