"""Write a chosen edit as a model that others can load: a whole checkpoint, or a PEFT adapter.

Nothing is measured here: whether the written model is the measured one is for the caller to find
out by loading it again.

Shapes: O and I a writer's out and in features, R the adapter's rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from excise.config import ExportSection
from excise.errors import ConfigError, ExportError, StorageError
from excise.events import Notice, OnEvent, ignore, track
from excise.export.merging import merge_checkpoint
from excise.files import (
    add_files,
    check_destination,
    hashes_of,
    staged,
    usual_mode,
    weights_sha256,
)
from excise.model.anatomy import Writer
from excise.model.edits import Edit

# Up to this many rows or columns the exact decomposition takes well under a second.
_EXACT_SVD = 512
# The randomised one: columns beyond the rank, and power iterations. Row scales leave a slowly
# falling tail of singular values, which is what these are for.
_OVERSAMPLE = 16
_POWER_PASSES = 4
# A bias that moves by less than this share of its largest value has moved by rounding only.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Exported:
    """What was written. `details` are JSON-ready; `sha256` is `sha256_of` the folder, `files` its
    `hashes_of`.

    `details` of "safetensors": `tensors`, the names of the edited tensors; `left_out`, files that
    were not copied; `unindexed`, weight files outside the checkpoint, copied unedited.
    `details` of "adapter": `rank`; `error`, the relative Frobenius error over all modules;
    `errors`, the same by module; `not_carried`, modules whose edit also changes a bias.
    """

    path: Path
    format: str
    sha256: str
    bytes: int
    details: dict[str, Any]
    files: dict[str, str]


def export_safetensors(
    source: Path,
    destination: Path,
    edits: Mapping[str, Edit],
    writers: Sequence[Writer],
    on_event: OnEvent = ignore,
    extra_files: Mapping[str, str] | None = None,
) -> Exported:
    """The source checkpoint with the edits folded in; everything else is copied byte for byte.

    Args and Raises: as `merging.merge_checkpoint`.
    """
    merge = merge_checkpoint(source, destination, edits, writers, on_event, extra_files)
    details = {
        "tensors": list(merge.tensors),
        "left_out": list(merge.left_out),
        "unindexed": list(merge.unindexed),
    }
    return exported(destination, "safetensors", merge.bytes, details)


def exported(folder: Path, form: str, size: int, details: dict[str, Any]) -> Exported:
    """What stands in `folder` now, with its hashes."""
    files = hashes_of(folder)
    return Exported(folder, form, weights_sha256(files), size, details, files)


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
    """A PEFT LoRA that adds the best rank-R approximation of W' - W to each edited matrix.

    An edit that keeps row norms scales every row of W by its own factor, so its difference has full
    rank, and a low rank carries it only nearly: `details` say how nearly.

    Args:
        base: Hub id of the model that the adapter is for, and its `revision`; None where it has none.
        destination: a new or empty folder; it is seen when all of it is there.
        edits: writer name -> edit.
        writers: the loaded model's writers, holding their original values.
        rank: R, the same for every module.
        on_event: told of each module.
        extra_files: name -> text of files to add.

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


@dataclass(frozen=True)
class Factors:
    """One module of an adapter: B (O, R), A (R, I), and |error|^2 and |difference|^2 of B A."""

    name: str
    b: Tensor
    a: Tensor
    squares: tuple[float, float]


@dataclass(frozen=True)
class AdapterFactors:
    """All modules, and the names of those whose edit also changes a bias, which no LoRA carries."""

    modules: tuple[Factors, ...]
    not_carried: tuple[str, ...]


def check_formats(
    formats: Sequence[str],
    writers: Sequence[Writer],
    *,
    offloaded: bool = False,
    rank: int | None = None,
) -> None:
    """Whether these writers' edits can be written in these formats: before the work, not after it.

    Raises:
        ConfigError: an adapter of fused experts, whose matrices share a module, or of a model of
            which weights are `offloaded`, where PEFT cannot merge it to be measured; a `rank` of it
            that no matrix has.
    """
    if offloaded and "adapter" in formats:
        raise ConfigError(
            "format adapter: it cannot be merged, and so not measured, where weights are offloaded: "
            "export safetensors, or give the model enough memory to stay in"
        )
    most = max((min(w.shape[-2:]) for w in writers), default=0)
    if rank is not None and rank > most and any(name.endswith("adapter") for name in formats):
        raise ConfigError(
            f"export.adapter_rank is {rank}, and no edited matrix has a rank above {most}: lower it, or "
            "leave it out"
        )
    fused = dict.fromkeys(w.component for w in writers if w.expert is not None)
    unfit = [name for name in formats if name.endswith("adapter")]
    if fused and unfit:
        raise ConfigError(
            f"format {unfit[0]}: an adapter cannot carry edits of fused experts: export "
            f"safetensors, or leave {', '.join(fused)} out of edit.components"
        )


def writes_checkpoint(section: ExportSection, formats: Sequence[str]) -> bool:
    """Whether one of these formats holds the source's own tensors, with edits folded in."""
    return "safetensors" in formats or ("gguf" in formats and section.from_gguf is None)


def adapter_factors(
    edits: Mapping[str, Edit], writers: Sequence[Writer], rank: int, on_event: OnEvent = ignore
) -> AdapterFactors:
    """The best rank-R approximation of W' - W of each edited matrix.

    Raises:
        ExportError: there is nothing to edit, or a writer's values are not in memory.
        ConfigError: one is a fused expert.
    """
    check_formats(["adapter"], [writer for writer in writers if writer.name in edits])
    if not edits:
        raise ExportError("this candidate edits nothing, and an adapter needs something to adapt")
    chosen = [writer for writer in writers if writer.name in edits]
    assert len(chosen) == len(edits), "an edit of a writer that this model does not have"
    modules = []
    for writer in track(chosen, "export", len(chosen), on_event):
        delta = weight_difference(writer, edits[writer.name])
        b, a = low_rank(delta, rank)
        modules.append(Factors(writer.name, b, a, (_square(delta - b @ a), _square(delta))))
    not_carried = tuple(w.name for w in chosen if _moves_bias(w, edits[w.name]))
    if not_carried:
        on_event(Notice(f"the adapter does not carry the bias edits of {', '.join(not_carried)}"))
    return AdapterFactors(tuple(modules), not_carried)


def rank_for(edits: Mapping[str, Edit], writers: Sequence[Writer], error: float) -> int:
    """The least rank whose relative Frobenius error over all modules is at most `error`.

    Raises:
        ExportError: a writer's values are not in memory.
    """
    tails: list[Tensor] = []  # per module: what every rank leaves out, squared, rank 0 first
    for writer in writers:
        if writer.name in edits:
            squares = _singular_squares(weight_difference(writer, edits[writer.name]))
            tails.append(squares.flip(0).cumsum(0).flip(0))
    if not tails:
        return 1
    most = max(map(len, tails))
    left = sum(torch.nn.functional.pad(tail, (0, most + 1 - len(tail))) for tail in tails)
    assert isinstance(left, Tensor)
    small = left <= error**2 * left[0]
    return max(1, int(small.nonzero()[0].item()))


def _singular_squares(delta: Tensor) -> Tensor:
    """Squared singular values, largest first, in float64 on the CPU."""
    if min(delta.shape) <= _EXACT_SVD:
        exact: Tensor = torch.linalg.svdvals(delta.double())
        return exact.square().cpu()
    # From the smaller Gram matrix: rounding hides parts below 1e-3 of the whole, which is enough here.
    gram = delta @ delta.mT if delta.shape[0] <= delta.shape[1] else delta.mT @ delta
    values: Tensor = torch.linalg.eigvalsh(gram.double())
    return values.flip(0).clamp_min(0).cpu()


def weight_difference(writer: Writer, edit: Edit) -> Tensor:
    """W' - W (O, I) in float32, without the cancellation of subtracting the two.

    Raises:
        ExportError: the weight is offloaded.
    """
    if writer.weight.is_meta:
        raise ExportError(f"{writer.name} is offloaded: an adapter is made from values in memory")
    w = writer.weight.detach().float()
    left, right = edit.left.to(w), edit.right.to(w)
    if edit.scale is None:
        return -(left @ right)
    scale = edit.scale.to(w)[:, None]
    return torch.addcmul(-((scale * left) @ right), scale - 1.0, w)


def low_rank(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (O, R) and A (R, I) whose product is nearest to `delta` (O, I), with equal norms.

    A matrix with fewer than R singular values gets columns and rows of zeros.
    """
    smallest = min(delta.shape)
    if smallest <= _EXACT_SVD:
        u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    else:
        # The random start is drawn apart: the result is a function of the edit, and nobody else's
        # random numbers change.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(0)
            q = min(rank + _OVERSAMPLE, smallest)
            u, s, v = torch.svd_lowrank(delta, q=q, niter=_POWER_PASSES)
        vt = v.mT
    kept = min(rank, smallest)
    root = s[:kept].sqrt()
    b, a = delta.new_zeros(delta.shape[0], rank), delta.new_zeros(rank, delta.shape[1])
    b[:, :kept] = u[:, :kept] * root
    a[:kept] = root[:, None] * vt[:kept]
    return b, a


def _moves_bias(writer: Writer, edit: Edit) -> bool:
    bias = writer.bias
    if bias is None:
        return edit.shift is not None and bool(edit.shift.any())
    before = bias.detach().float()
    change = edit.apply_to_bias(before) - before
    return bool(change.abs().max() > _ROUNDING * before.abs().max())


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


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())


def relative_error(squares: list[tuple[float, float]]) -> float:
    """The relative error of these parts together; no change at all is carried exactly."""
    error, size = (sum(part) for part in zip(*squares, strict=True))
    return math.sqrt(error / size) if size else 0.0
