"""What runs in a worker: the session of a run, opened again, which measures what it is sent.

A worker loads the model itself, by the settings of the run. Directions, and what the method captured, come
from the driver, so that nothing is captured twice. It knows no study: parameters in, scores out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from excise.checkpoints.loading import load
from excise.config import validate
from excise.engine.batch_sizing import from_dict
from excise.errors import RunStateError
from excise.prompts.sets import load_prompt_sets
from excise.runs import setup
from excise.runs.results import versions
from excise.runs.run_folder import DIRECTIONS, read_opening
from excise.runs.session import EditingSession
from excise.runs.study_identity import digests, identity
from excise.search.evaluation import measurer
from excise.search.loop import Measured
from excise.search.scoring import scoring_by_judge


class Worker:
    """A run's session in a process of its own."""

    def __init__(
        self,
        config: Mapping[str, Any],
        files: Mapping[str, bytes],
        sizing: Mapping[str, Any],
        threads: int,
    ) -> None:
        """Open it.

        Args:
            config: the run's settings, as plain data.
            files: directions and captured tensors, by the names that they have in the run folder.
            sizing: the sizes of passes that the study was started with.
            threads: of the CPU, as the workers of a machine share it.
        """
        torch.set_num_threads(threads)
        self._session = _open(validate(dict(config)), files)
        sizes = from_dict(dict(sizing))
        engine = self._session.engine("search", sizes.plan)
        self._panel = self._session.panel(engine, "search", self._session.scoring.every_trial)
        self._measure = measurer(self._session.edits, self._panel, engine.keeping_drafts)
        self._batch = sizes.batch

    def facts(self) -> dict[str, Any]:
        """Return what its figures belong to: hashes by part, and versions of the libraries."""
        return facts_of(self._session, self._batch)

    def calibrate(self, params: Mapping[str, Any]) -> Measured:
        """Measure one candidate, alone and before all others."""
        return self._panel.measure([self._session.edits(params)])[0]

    def measure(self, params: list[dict[str, Any]]) -> list[Measured]:
        """Measure candidates, in order."""
        return self._measure(params)


def facts_of(session: EditingSession, batch: int) -> dict[str, Any]:
    """Return what a session's figures belong to, the same for all workers of a study."""
    return {**digests(identity(session, batch)), **versions()}


def _open(config: Any, files: Mapping[str, bytes]) -> EditingSession:
    scoring = scoring_by_judge(config, lambda _event: None)
    session = setup.open_session(
        config,
        load(config.model),
        load_prompt_sets(config.prompts),
        scoring,
        lambda _event: None,
    )
    with TemporaryDirectory(prefix="excise-worker-") as name:
        folder = Path(name)
        for file, data in files.items():
            (folder / Path(file).name).write_bytes(data)
        opening = read_opening(folder / DIRECTIONS)
        if opening is None:
            raise RunStateError(f"the {DIRECTIONS} that the worker was sent cannot be read")
        return setup.restore(setup.open_responses(session, opening), folder)
