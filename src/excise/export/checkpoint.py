"""The format `safetensors`: the source checkpoint with the edits folded in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from excise.checkpoints.loading import Loaded, load
from excise.config import ModelSection
from excise.events import OnEvent, ignore
from excise.export.exporter import EditedModel, Exported, TransformersExporter, exported
from excise.export.matching import check_stored
from excise.export.merging import merge_checkpoint
from excise.model.anatomy import Writer
from excise.model.edits import Edit


def export_safetensors(
    source: Path,
    destination: Path,
    edits: Mapping[str, Edit],
    writers: Sequence[Writer],
    on_event: OnEvent = ignore,
    extra_files: Mapping[str, str] | None = None,
) -> Exported:
    """Write the source checkpoint with the edits folded in; all else is copied byte for byte.

    Args and Raises: as `merging.merge_checkpoint`.

    Returns:
        What was written. Its details: `tensors`, the names of the edited tensors; `left_out`, files
        that were not copied; `unindexed`, weight files outside the checkpoint, copied unedited.
    """
    merge = merge_checkpoint(source, destination, edits, writers, on_event, extra_files)
    details = {
        "tensors": list(merge.tensors),
        "left_out": list(merge.left_out),
        "unindexed": list(merge.unindexed),
    }
    return exported(destination, "safetensors", merge.bytes, details)


class CheckpointExporter(TransformersExporter):
    """Whole models, as `AutoModelForCausalLM.from_pretrained` loads them."""

    def check(self, loaded: Loaded, writers: Sequence[Writer]) -> None:
        """See `Exporter.check`: the checkpoint must store the writers' weights in plain form."""
        check_stored(loaded.folder, writers)

    def write(
        self, edited: EditedModel, to: Path, files: Mapping[str, str], on_event: OnEvent
    ) -> Exported:
        """See `Exporter.write`."""
        source = edited.loaded.folder
        return export_safetensors(source, to, edited.edits, edited.writers, on_event, files)

    def load(self, path: Path, original: ModelSection) -> Loaded:
        """See `TransformersExporter.load`."""
        return load(original.model_copy(update={"source": str(path), "revision": None}))
