"""The formats `gguf`, `ollama` and `gguf-adapter`, as exporters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from excise.checkpoints.gguf_header import read_gguf, read_shards
from excise.checkpoints.loading import Loaded
from excise.config import ExportSection
from excise.events import OnEvent
from excise.export.exporter import EditedModel, Exported, Exporter, Measurement
from excise.export.low_rank import check_low_rank, rank_of
from excise.export.matching import check_stored
from excise.formats import Format
from excise.gguf.export import (
    MODELFILE,
    GgufPlan,
    architecture_of,
    export_gguf,
    export_gguf_adapter,
    export_patched,
    file_stem,
    plan_gguf,
    plan_gguf_adapter,
)
from excise.gguf.measure import measure_gguf
from excise.gguf.ollama import modelfile_of
from excise.gguf.patching import patched_name
from excise.model.anatomy import Writer
from excise.record import Record, Scores
from excise.report.formatting import model_name


class GgufExporter(Exporter):
    """Whole models: converted and quantised, or patched into an existing file; with a Modelfile."""

    join = False

    def __init__(self, form: Format, section: ExportSection) -> None:
        super().__init__(form, section)
        self.plan = plan_gguf(section)

    def check(self, loaded: Loaded, writers: Sequence[Writer]) -> None:
        """See `Exporter.check`: to be converted, the checkpoint must store plain weights."""
        if self._plan_of(loaded).base is None:
            check_stored(loaded.folder, writers)

    def write(
        self, edited: EditedModel, to: Path, files: Mapping[str, str], on_event: OnEvent
    ) -> Exported:
        """See `Exporter.write`."""
        loaded, base = edited.loaded, self._plan_of(edited.loaded).base
        edits, writers = edited.edits, edited.writers
        describe = partial(modelfile_of, loaded, edited.record.model.license)
        if base is not None:
            files = {**files, MODELFILE: describe(read_gguf(base), patched_name(base), None)}
            return export_patched(to, edits, writers, loaded.model, base, on_event, files)
        stem = _stem(edited.record)
        return export_gguf(
            loaded.folder,
            to,
            edits,
            writers,
            self.plan,
            stem,
            on_event,
            files,
            describe,
            join=self.join,
        )

    def measure(
        self, made: Exported, by: Measurement, on_event: OnEvent
    ) -> tuple[Exported, Scores]:
        """See `Exporter.measure`: every file in llama.cpp, beside the unedited one of its type."""
        return measure_gguf(made, self._plan_of(by.loaded), by, on_event)

    def _plan_of(self, loaded: Loaded) -> GgufPlan:
        """Return the plan for this model: a GGUF of which no other type is asked is patched itself."""
        source = None if loaded.plain is None else loaded.plain.source
        if source is None or not source.is_file() or self.join or self.plan.base or self.plan.types:
            return self.plan
        return GgufPlan(base=read_shards(source)[0].path)


class OllamaExporter(GgufExporter):
    """Whole models for Ollama: one file with the towers in it, where Ollama takes that of the family."""

    join = True

    def __init__(self, form: Format, section: ExportSection) -> None:
        super().__init__(form, section.model_copy(update={"from_gguf": None}))


class GgufAdapterExporter(Exporter):
    """LoRA adapters, as llama.cpp puts them on the base model."""

    def __init__(self, form: Format, section: ExportSection) -> None:
        super().__init__(form, section)
        self.plan = plan_gguf_adapter(section)

    def check(self, loaded: Loaded, writers: Sequence[Writer]) -> None:
        """See `Exporter.check`: llama.cpp must know the architecture by name."""
        check_low_rank(self.form.name, writers, self.section.adapter_rank)
        if self.plan.base is None:
            architecture_of(loaded.anatomy.model_type, None)

    def write(
        self, edited: EditedModel, to: Path, files: Mapping[str, str], on_event: OnEvent
    ) -> Exported:
        """See `Exporter.write`."""
        anatomy = edited.loaded.anatomy
        return export_gguf_adapter(
            to,
            edited.edits,
            edited.writers,
            architecture=architecture_of(anatomy.model_type, self.plan.base),
            layers=len(anatomy.layers),
            rank=rank_of(self.section, edited.edits, edited.writers),
            name=_stem(edited.record),
            on_event=on_event,
            extra_files=files,
        )

    def measure(
        self, made: Exported, by: Measurement, on_event: OnEvent
    ) -> tuple[Exported, Scores]:
        """See `Exporter.measure`: on the base in llama.cpp, beside the base alone."""
        return measure_gguf(made, self.plan, by, on_event, adapter=True)


def _stem(record: Record) -> str:
    """Return what the files of an edited model are called, up to their type."""
    return f"{file_stem(model_name(record.model.source).rpartition('/')[2])}-edited"
