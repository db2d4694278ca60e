"""The format `adapter`: a PEFT adapter of the chosen edit, DoRA where that is exact, else LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from excise.checkpoints.discovery import anatomy_of
from excise.checkpoints.loading import Loaded, load
from excise.config import AdapterForm, ExportSection, ModelSection
from excise.errors import ConfigError, StorageError
from excise.events import Notice, OnEvent, ignore
from excise.export.dora import choose_form, dora_factors, zero_rows
from excise.export.exporter import EditedModel, Exported, TransformersExporter, exported
from excise.export.low_rank import (
    adapter_factors,
    check_low_rank,
    own_rank,
    rank_of,
    relative_error,
    writers_of,
)
from excise.files import add_files, check_destination, staged, usual_mode
from excise.model.anatomy import Writer
from excise.model.edits import Edit
from excise.model.parameters import any_offloaded

# What the forms are called on the record and the card.
NAMES: dict[AdapterForm, str] = {"dora": "DoRA", "lora": "LoRA"}
_BIAS = ".base_layer.bias"


def export_adapter(
    base: str | None,
    destination: Path,
    edits: Mapping[str, Edit],
    writers: Sequence[Writer],
    *,
    rank: int,
    form: AdapterForm = "lora",
    revision: str | None = None,
    on_event: OnEvent = ignore,
    extra_files: Mapping[str, str] | None = None,
) -> Exported:
    """Write a PEFT adapter of rank R for the edited matrices.

    A LoRA adds the best rank-R approximation of W' - W. A DoRA is W' itself from the edits' own rank on,
    and holds edited biases too.

    Args:
        base: Hub id of the model that the adapter is for, and its `revision`; None where it has none.
        destination: a new or empty folder; it is seen when all of it is there.
        edits: writer name -> edit.
        writers: the loaded model's writers, holding their original values.
        rank: R, the same for every module.
        form: which of the two.
        on_event: told of each module.
        extra_files: name -> text of files to add.

    Returns:
        What was written. Its details: `form` and `rank`; `error`, the relative Frobenius error over all
        modules; `errors`, the same by module; `not_carried`, modules whose edit also changes a bias
        that this form does not hold; `biases`, names of those that it does.

    Raises:
        OutputError: `destination` holds something, or no folder can be made there.
        ExportError: there is nothing to edit, a writer's values are not in memory, or a DoRA cannot
            hold them.
        StorageError: the disk is full or a write failed; nothing is left behind.
    """
    check_destination(destination)
    make = _dora if form == "dora" else _lora
    tensors, squares, not_carried = make(edits, writers, rank, on_event)
    config = _config(base, revision, rank, list(squares))
    config.use_dora = form == "dora"
    if any(key.endswith(_BIAS) for key in tensors):
        config.bias = "all"  # what PEFT itself writes where an adapter holds biases of its base
    config.fan_in_fan_out = all(w.transposed for w in writers if w.name in edits)
    size = sum(tensor.nbytes for tensor in tensors.values())
    with staged(destination, size) as folder:
        _save(folder, tensors, config)
        add_files(folder, extra_files or {})
    details = {
        "form": NAMES[form],
        "rank": rank,
        "error": relative_error(list(squares.values())),
        "errors": {name: relative_error([pair]) for name, pair in squares.items()},
        "not_carried": list(not_carried),
        "biases": [key for key in tensors if key.endswith(_BIAS)],
    }
    size = sum(path.stat().st_size for path in destination.iterdir())
    return exported(destination, "adapter", size, details)


# Tensors by PEFT's names; |error|^2 and |W' - W|^2 by module; modules whose bias edits are not carried.
_Made = tuple[dict[str, Tensor], dict[str, tuple[float, float]], tuple[str, ...]]


def _lora(
    edits: Mapping[str, Edit], writers: Sequence[Writer], rank: int, on_event: OnEvent
) -> _Made:
    factors = adapter_factors(edits, writers, rank, on_event)
    tensors: dict[str, Tensor] = {}
    for module in factors.modules:
        tensors |= _pair(module.name, module.b, module.a)
    return tensors, {m.name: m.squares for m in factors.modules}, factors.not_carried


def _dora(
    edits: Mapping[str, Edit], writers: Sequence[Writer], rank: int, on_event: OnEvent
) -> _Made:
    tensors: dict[str, Tensor] = {}
    squares = {}
    for writer in writers_of(edits, writers, on_event):
        module = dora_factors(writer, edits[writer.name], rank)
        tensors |= _pair(module.name, module.b, module.a)
        tensors[f"base_model.model.{module.name}.lora_magnitude_vector"] = module.magnitude.cpu()
        if module.bias is not None:
            tensors[f"base_model.model.{module.name}{_BIAS}"] = module.bias.cpu()
        squares[module.name] = module.squares
    return tensors, squares, ()


def _pair(module: str, b: Tensor, a: Tensor) -> dict[str, Tensor]:
    return {
        f"base_model.model.{module}.lora_A.weight": a.cpu().contiguous(),
        f"base_model.model.{module}.lora_B.weight": b.cpu().contiguous(),
    }


def _config(base: str | None, revision: str | None, rank: int, modules: list[str]) -> Any:
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


def settle_adapter(
    section: ExportSection,
    edits: Mapping[str, Edit],
    writers: Sequence[Writer],
    on_event: OnEvent = ignore,
) -> tuple[AdapterForm, int]:
    """Return the form and rank that the settings name, else those that are exact.

    A rank that is named is the most of a DoRA, which needs no more than the edits' own. A LoRA that is
    asked for takes the least rank that keeps to `adapter_error`.

    Raises:
        ExportError: a writer's values are not in memory.
    """
    form = section.adapter_form or choose_form(edits, writers)
    if form == "lora" and section.adapter_form is None:
        hollow = zero_rows(edits, writers)
        if hollow is not None:
            on_event(Notice(f"a row of {hollow} is zero, which DoRA cannot hold: written as LoRA"))
        elif section.adapter_rank is None:
            return form, own_rank(edits.values())
    if form == "lora":
        return form, rank_of(section, edits, writers)
    own = own_rank(edits.values())
    return form, min(section.adapter_rank or own, own)


class AdapterExporter(TransformersExporter):
    """PEFT adapters, as PEFT merges them into the base model."""

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
        form, rank = settle_adapter(self.section, edited.edits, edited.writers, on_event)
        return export_adapter(
            edited.loaded.published,
            to,
            edited.edits,
            edited.writers,
            rank=rank,
            form=form,
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
