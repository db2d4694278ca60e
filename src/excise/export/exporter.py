"""What each export format does: write a chosen edit, and measure what was written as its users load it.

`formats` has a row for each format, which names its `Exporter`.
"""

from __future__ import annotations

import gc
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from excise.checkpoints.loading import Loaded
from excise.checkpoints.model_folder import library_errors
from excise.config import ExportSection, ModelSection
from excise.engine.engine import Engine
from excise.errors import ConfigError
from excise.events import OnEvent, phase
from excise.files import hashes_of, weights_sha256
from excise.formats import FORMATS, OPTIONS, Format
from excise.model.anatomy import Writer
from excise.model.devices import release
from excise.model.edits import Edit
from excise.record import Record, Scores
from excise.search.evaluation import Measures


@dataclass(frozen=True)
class Exported:
    """What was written. `details` are JSON-ready; `files` are `hashes_of` the folder, `sha256` of its
    weights.
    """

    path: Path
    format: str
    sha256: str
    bytes: int
    details: dict[str, Any]
    files: dict[str, str]


def exported(folder: Path, form: str, size: int, details: dict[str, Any]) -> Exported:
    """Return what stands in `folder` now, with its hashes."""
    files = hashes_of(folder)
    return Exported(folder, form, weights_sha256(files), size, details, files)


@dataclass(frozen=True)
class EditedModel:
    """A chosen edit and the model that it is of.

    Attributes:
        record: of the run.
        loaded: the model; its weights are the source's own, unpacked.
        writers: of the model, holding their original values.
        edits: writer name -> edit; writers without one are left alone.
    """

    record: Record
    loaded: Loaded
    writers: Sequence[Writer]
    edits: Mapping[str, Edit]

    @classmethod
    def of(
        cls,
        record: Record,
        loaded: Loaded,
        writers: Sequence[Writer],
        edits: Sequence[Edit | None],
    ) -> EditedModel:
        """Make it of one edit per writer, None where that is left alone."""
        named = {w.name: e for w, e in zip(writers, edits, strict=True) if e is not None}
        return cls(record, loaded, writers, named)


@dataclass(frozen=True)
class Measurement:
    """What exports are measured by: the search's prompts and scorers, beside its original model.

    Attributes:
        loaded: the model that was searched.
        source: the settings that it was loaded with.
        engine: the one that it was searched with.
        scores: gives what every scorer says of an engine's model, with no edit on top.
    """

    loaded: Loaded
    source: ModelSection
    engine: Engine
    scores: Callable[[Measures], Scores]


class Exporter(ABC):
    """One format, at work on one export.

    Lifecycle: made of the settings, before anything is loaded; `check`, once the model is; `write`;
    `measure`.

    Raises:
        ConfigError: (all along the lifecycle up to `check`) settings, tools or model do not fit.
    """

    def __init__(self, form: Format, section: ExportSection) -> None:
        self.form = form
        self.section = section

    @abstractmethod
    def check(self, loaded: Loaded, writers: Sequence[Writer]) -> None:
        """Check that edits of these writers can be written: all that is known before the work.

        Raises:
            ConfigError: the format cannot carry them.
            ModelError: the checkpoint stores what cannot be edited.
        """

    @abstractmethod
    def write(
        self, edited: EditedModel, to: Path, files: Mapping[str, str], on_event: OnEvent
    ) -> Exported:
        """Write the export to the new folder `to`, with `files` (name -> text) beside it.

        Raises:
            ExportError: it would not be the measured edit.
            OutputError, StorageError: as `files.staged`.
        """

    @abstractmethod
    def measure(
        self, made: Exported, by: Measurement, on_event: OnEvent
    ) -> tuple[Exported, Scores]:
        """Load the export as its users do, and measure it; `by.loaded` cannot be run afterwards.

        Returns:
            The export, with what was found on the way among its details, and its scores; none where it
            cannot be run here.

        Raises:
            ModelError, ExportError: it cannot be loaded.
        """


class TransformersExporter(Exporter):
    """A format that comes to be a Transformers model when it is loaded."""

    @abstractmethod
    def load(self, path: Path, original: ModelSection) -> Loaded:
        """Load the export at `path`; `original` are the settings that load what it was made of."""

    def load_again(self, path: Path, loaded: Loaded, source: ModelSection) -> Loaded:
        """Load the export at `path` in the dtype of `loaded`, the model that was searched."""
        name = str(loaded.dtype).removeprefix("torch.")
        fields = {"source": str(loaded.folder), "gguf_file": None, "dtype": name}
        return self.load(path, source.model_copy(update=fields))

    def measure(
        self, made: Exported, by: Measurement, on_event: OnEvent
    ) -> tuple[Exported, Scores]:
        """See `Exporter.measure`. The original's layers are freed first, to make room."""
        searched = by.engine
        reference = searched.reference()
        by.loaded.free_layers()
        with phase(f"measure {self.form.name}", on_event):
            with library_errors(f"the {self.form.name} export"):
                again = self.load_again(made.path, by.loaded, by.source)
            engine = Engine(
                again,
                (),
                searched.prompts,
                max_new_tokens=searched.limit,
                plan=searched.fitted_plan,
                reference=reference,
                spoken=searched.spoken,
                on_event=on_event,
            )
            scores = by.scores(engine)
            del again, engine
        gc.collect()
        release(by.loaded.device)
        return made, scores


def exporter(name: str, section: ExportSection) -> Exporter:
    """Return the exporter of the format that is called `name`."""
    form = FORMATS[name]
    made: Exporter = pkgutil.resolve_name(form.exporter)(form, section)
    return made


def exporters(section: ExportSection, formats: Sequence[str]) -> list[Exporter]:
    """Return the exporters of `formats`, in their order.

    Raises:
        ConfigError: a setting is for another format, or does not fit; a tool is missing.
        ModelError: a file that is named is not a whole one.
    """
    taken = frozenset().union(*(FORMATS[name].options for name in formats))
    for option in OPTIONS:
        if getattr(section, option) and option not in taken:
            other = next(form for form in FORMATS.values() if option in form.options)
            flags = [flag for key, flag in OPTIONS.items() if key in other.options - taken]
            listed = " and ".join(filter(None, [", ".join(flags[:-1]), flags[-1]]))
            are = "are" if len(flags) > 1 else "is"
            raise ConfigError(f"{listed} {are} for --format {other.name}: add it")
    return [exporter(name, section) for name in formats]
