"""The job behind `excise judge`: one judge, put to labelled responses."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from excise.config import Config
from excise.errors import ConfigError
from excise.events import OnEvent, ignore, phase
from excise.judges.certificate import certify
from excise.judges.labelled import read_labelled
from excise.judges.markers import read_markers
from excise.judges.opening import MARKERS, MarkerJudge, verdicts_of
from excise.judges.verdicts import Verdicts
from excise.record import CertificateRecord


@dataclass(frozen=True)
class Certification:
    """A judge, what decides its verdicts, how they agree with people's, and the seconds that it took."""

    name: str
    facts: dict[str, Any]
    certificate: CertificateRecord
    seconds: float


def certify_judge(
    config: Config, on_event: OnEvent = ignore, *, judge_token: str | None = None
) -> Certification:
    """Put the labelled responses that `config.scores.judge` names to its judge.

    Args:
        config: `scores.judge` says which judge and which responses; `markers` is a judge as well.
        on_event: told of progress.
        judge_token: what a server is shown.

    Raises:
        PromptError: the labelled file cannot be used.
        ConfigError, ModelError: the judge cannot be opened.
        JudgeError: it cannot be asked, or its answers are no verdicts.
    """
    section = config.scores.judge
    if section.labelled is None:
        raise ConfigError("name the labelled responses: --labelled FILE, or builtin")
    labelled = read_labelled(section.labelled)
    with phase("load judge", on_event):
        if section.source == MARKERS:
            markers = read_markers(config.scores.markers, config.scores.markers_file)
            verdicts: Verdicts | None = Verdicts(MarkerJudge(markers), on_event)
        else:
            verdicts = verdicts_of(config, on_event, judge_token)
    if verdicts is None:
        raise ConfigError(f"name a judge: {MARKERS}, a model, or the address of a server")
    begun = time.perf_counter()
    with phase("judge", on_event, len(labelled.verdicts)):
        found = certify(verdicts, labelled)
    spent = round(time.perf_counter() - begun, 3)
    return Certification(verdicts.name, verdicts.judge.facts, found, spent)
