"""The format `adapter`: a PEFT LoRA of the chosen edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from excise.checkpoints.discovery import anatomy_of
from excise.checkpoints.loading import Loaded, load
from excise.config import ModelSection
from excise.errors import ConfigError, StorageError
from excise.events import OnEvent, ignore
from excise.export.exporter import EditedModel, Exported, TransformersExporter, exported
from excise.export.low_rank import adapter_factors, check_low_rank, rank_of, relative_error
from excise.files import add_files, check_destination, staged, usual_mode
from excise.model.anatomy import Writer
from excise.model.edits import Edit
from excise.model.parameters import any_offloaded


def export_adapter(
    base: str | None,
    destination: Path,
    edits: Mapping[str, Edit],
    writers: Sequence[Writer],
    *,
    rank: int,
    revision: str | None = None,
    on_event: OnEvent = ignore,
    extra_files: Mapping[str, str] | None = None,
) -> Exported:
    """Write a PEFT LoRA that adds the best rank-R approximation of W' - W to each edited matrix.

    Args:
        base: Hub id of the model that the adapter is for, and its `revision`; None where it has none.
        destination: a new or empty folder; it is seen when all of it is there.
        edits: writer name -> edit.
        writers: the loaded model's writers, holding their original values.
        rank: R, the same for every module.
        on_event: told of each module.
        extra_files: name -> text of files to add.

    Returns:
        What was written. Its details: `rank`; `error`, the relative Frobenius error over all modules;
        `errors`, the same by module; `not_carried`, modules whose edit also changes a bias.

    Raises:
        OutputError: `destination` holds something, or no folder can be made there.
        ExportError: there is nothing to edit, or a writer's values are not in memory.
        StorageError: the disk is full or a write failed; nothing is left behind.
    """
    check_destination(destination)
    factors = adapter_factors(edits, writers, rank, on_event)
    tensors: dict[str, Tensor] = {}
    for module in factors.modules:
        tensors[f"base_model.model.{module.name}.lora_A.weight"] = module.a.cpu().contiguous()
        tensors[f"base_model.model.{module.name}.lora_B.weight"] = module.b.cpu().contiguous()
    names = [module.name for module in factors.modules]
    size = sum(tensor.nbytes for tensor in tensors.values())
    with staged(destination, size) as folder:
        _save(folder, tensors, _lora_config(base, revision, rank, names))
        add_files(folder, extra_files or {})
    details = {
        "rank": rank,
        "error": relative_error([module.squares for module in factors.modules]),
        "errors": {module.name: relative_error([module.squares]) for module in factors.modules},
        "not_carried": list(factors.not_carried),
    }
    size = sum(path.stat().st_size for path in destination.iterdir())
    return exported(destination, "adapter", size, details)


def _lora_config(base: str | None, revision: str | None, rank: int, modules: list[str]) -> Any:
    from peft import LoraConfig

    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=True,
        r=rank,
        lora_alpha=rank,  # a scale of one
        lora_dropout=0.0,
        bias="none",
    )
    config.target_modules = modules  # whole paths; set here because the constructor makes a set
    return config


def _save(folder: Path, tensors: dict[str, Tensor], config: Any) -> None:
    path = folder / "adapter_model.safetensors"
    try:
        with usual_mode(path):
            save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise StorageError(f"cannot write the adapter's weights: {error}") from error
    config.save_pretrained(str(folder))


class AdapterExporter(TransformersExporter):
    """LoRA adapters, as PEFT merges them into the base model."""

    def check(self, loaded: Loaded, writers: Sequence[Writer]) -> None:
        """See `Exporter.check`. PEFT cannot merge where weights are offloaded."""
        if any_offloaded(loaded.model):
            raise ConfigError(
                "format adapter: it cannot be merged, and so not measured, where weights are "
                "offloaded: export safetensors, or give the model enough memory to stay in"
            )
        check_low_rank(self.form.name, writers, self.section.adapter_rank)

    def write(
        self, edited: EditedModel, to: Path, files: Mapping[str, str], on_event: OnEvent
    ) -> Exported:
        """See `Exporter.write`."""
        return export_adapter(
            edited.loaded.published,
            to,
            edited.edits,
            edited.writers,
            rank=rank_of(self.section, edited.edits, edited.writers),
            revision=edited.loaded.revision,
            on_event=on_event,
            extra_files=files,
        )

    def load(self, path: Path, original: ModelSection) -> Loaded:
        """See `TransformersExporter.load`."""
        from peft import PeftModel

        base = load(original)
        merged: Any = PeftModel.from_pretrained(base.model, path).merge_and_unload()
        merged.eval().requires_grad_(False)
        return Loaded(
            model=merged,
            tokenizer=base.tokenizer,
            anatomy=anatomy_of(merged),
            source=str(path),
            revision=None,
            folder=base.folder,
            dtype=base.dtype,
        )
