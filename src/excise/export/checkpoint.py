"""The format `safetensors`: the source checkpoint with the edits folded in, packed as it was or plain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from excise.checkpoints.dequantise import Plain
from excise.checkpoints.loading import Loaded, load
from excise.config import ModelSection
from excise.errors import ConfigError
from excise.events import OnEvent, ignore
from excise.export.exporter import EditedModel, Exported, TransformersExporter, exported
from excise.export.matching import check_stored
from excise.export.merging import Merge, merge_checkpoint
from excise.export.packed import check_packed, merge_packed
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
    return exported(destination, "safetensors", merge.bytes, _details(merge))


def export_packed(
    plain: Plain,
    destination: Path,
    edits: Mapping[str, Edit],
    writers: Sequence[Writer],
    on_event: OnEvent = ignore,
    extra_files: Mapping[str, str] | None = None,
) -> Exported:
    """Write the quantised source of `plain` with the edits folded in, packed as it is.

    Args and Raises: as `packed.merge_packed`.

    Returns:
        What was written. Its details are those of `export_safetensors`, and: `packed`, the scheme;
        `packing_error` and `packing_lost`, the largest of all tensors; `packing`, both by tensor.
    """
    merge, packing = merge_packed(plain, destination, edits, writers, on_event, extra_files)
    details = {
        "packed": plain.packed,
        "packing_error": max((one.error for one in packing.values()), default=0.0),
        "packing_lost": max((one.lost for one in packing.values()), default=0.0),
        "packing": {name: asdict(one) for name, one in packing.items()},
    }
    return exported(destination, "safetensors", merge.bytes, _details(merge) | details)


def _details(merge: Merge) -> dict[str, Any]:
    return {
        "tensors": list(merge.tensors),
        "left_out": list(merge.left_out),
        "unindexed": list(merge.unindexed),
    }


class CheckpointExporter(TransformersExporter):
    """Whole models, as `AutoModelForCausalLM.from_pretrained` loads them."""

    def check(self, loaded: Loaded, writers: Sequence[Writer]) -> None:
        """See `Exporter.check`: the checkpoint must store the writers' weights, plain or packed."""
        check_stored(loaded.folder, writers)
        plain = loaded.plain
        if self.section.unpack and plain is None:
            raise ConfigError(f"--unpack: the weights of {loaded.source} are plain already")
        if plain is not None and plain.packed and not self.section.unpack:
            check_packed(plain, writers)

    def write(
        self, edited: EditedModel, to: Path, files: Mapping[str, str], on_event: OnEvent
    ) -> Exported:
        """See `Exporter.write`."""
        plain, edits, writers = edited.loaded.plain, edited.edits, edited.writers
        if plain is not None and plain.packed and not self.section.unpack:
            return export_packed(plain, to, edits, writers, on_event, files)
        return export_safetensors(edited.loaded.folder, to, edits, writers, on_event, files)

    def load(self, path: Path, original: ModelSection) -> Loaded:
        """See `TransformersExporter.load`."""
        return load(original.model_copy(update={"source": str(path), "revision": None}))
