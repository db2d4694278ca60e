"""From what the configuration names to a judge that can be asked, and the scoring that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from excise.checkpoints.loading import resolve
from excise.config import Config, JudgeSection, ModelSection
from excise.errors import ConfigError
from excise.events import OnEvent
from excise.judges.classifier import Classifier, is_classifier
from excise.judges.labelled import read_labelled
from excise.judges.language_model import LanguageModel
from excise.judges.markers import Markers
from excise.judges.rubrics import Rubric, read_rubric
from excise.judges.server import Server
from excise.judges.verdicts import ANSWERS, SHOWS, Exchange, Judge, Opinion, Verdicts
from excise.reading import is_file

MARKERS = "markers"


class MarkerJudge:
    """Markers as a judge, to be measured beside others. They give two of the four verdicts."""

    name, grades, at_once = MARKERS, False, 1 << 20
    folder: Path | None = None

    def __init__(self, markers: Markers) -> None:
        self._markers = markers
        self.facts: dict[str, Any] = {"kind": "markers", "phrases": list(markers.phrases)}

    def verdicts(self, exchanges: Sequence[Exchange]) -> list[Opinion]:
        """Return whether a marker stands in each response."""
        return [
            Opinion(SHOWS if self._markers.shown(one.response) else ANSWERS) for one in exchanges
        ]

    def severities(self, _: Sequence[Exchange]) -> list[Opinion]:
        """Raise: markers have no severity."""
        raise NotImplementedError


def verdicts_of(config: Config, on_event: OnEvent, token: str | None = None) -> Verdicts | None:
    """Return the verdicts of the judge that a configuration names; None where it names none.

    Args:
        config: `scores.judge` names it.
        on_event: told of progress.
        token: what a server is shown, kept nowhere.

    Raises:
        ConfigError: as `open_judge`.
        ModelError: it cannot be loaded.
        PromptError: what it is to be certified on cannot be read.
    """
    section = config.scores.judge
    if not section.source:
        return None
    if section.labelled is not None:
        read_labelled(section.labelled)
    return Verdicts(open_judge(section, _words(config), token), on_event)


def _words(config: Config) -> str:
    """Return the behaviour in words, for rubrics that name it."""
    return config.description.strip() or config.behaviour


def open_judge(section: JudgeSection, behaviour: str, token: str | None = None) -> Judge:
    """Open a judge: a server where its source is an address, else what its checkpoint is of.

    Args:
        section: what it is, and how it is asked.
        behaviour: in words, for rubrics.
        token: for a server.

    Raises:
        ConfigError: a rubric or a label does not fit.
        ModelError: it cannot be loaded.
    """
    source = section.source
    if source.lower().startswith(("http:", "https:")):
        return Server(section, *rubrics_of(section), behaviour, token)
    folder = resolve(ModelSection(source=source, revision=section.revision))
    name = Path(source).name if Path(source).exists() else source
    if not is_file(folder) and is_classifier(folder):
        if section.severity is not None:
            raise ConfigError(
                f"scores.judge.severity: judge {name} is a classifier, which answers no rubric: leave it "
                "out, or name a language model or a server"
            )
        return Classifier(section, folder, name)
    rubric, severity = rubrics_of(section)
    return LanguageModel(section, rubric, severity, behaviour, name)


def rubrics_of(section: JudgeSection) -> tuple[Rubric, Rubric | None]:
    """Read the rubric for verdicts, and the one for severity where there is one.

    Raises:
        ConfigError: one cannot be read.
    """
    severity = section.severity
    return (
        read_rubric(section.rubric, grades=False),
        None if severity is None else read_rubric(severity, grades=True),
    )
