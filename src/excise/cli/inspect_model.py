"""What a model is made of: layers, writers, and what an edit would leave alone."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from excise.checkpoints.loading import load
from excise.config import ModelSection
from excise.model.anatomy import Writer
from excise.visible import visible


def inspect_model(source: str) -> dict[str, Any]:
    """Return layers, writers and coverage of a model, as plain data.

    Raises:
        ModelError: it cannot be loaded, or its architecture is unknown.
    """
    loaded = load(ModelSection(source=source))
    anatomy = loaded.anatomy
    coverage = anatomy.coverage()
    return {
        "model": source,
        "model_type": anatomy.model_type,
        "layers": len(anatomy.layers),
        "width": anatomy.width,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "writers": [
            {
                "component": w.component,
                "layer": w.layer,
                "module": w.name,
                "shape": list(w.shape),
                "expert": w.expert,
                "stored": _stored(w),
                "bias": w.bias is not None,
                "post_norm": w.gain is not None,
            }
            for w in anatomy.writers
        ],
        "multimodal": anatomy.tower,
        "edited": list(coverage.edited),
        "not_edited": list(coverage.not_edited),
    }


def _stored(writer: Writer) -> str:
    """Return the axes of the tensor that holds a writer in the loaded model."""
    axes = "I, O" if writer.transposed else "O, I"
    return f"({axes})" if writer.expert is None else f"(E, {axes})"


def inspection_table(found: dict[str, Any]) -> Any:
    """Return the same as a table: one row per component and shape."""
    head = Text(
        visible(
            f"{found['model']}: {found['model_type']}, {found['layers']} layers, "
            f"width {found['width']}, {found['parameters'] / 1e6:,.1f} M parameters"
        )
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("component", "matrices", "shape", "experts", "bias", "post-norm"):
        table.add_column(name, justify="right" if name == "matrices" else "left")
    rows: dict[tuple[Any, ...], int] = {}
    experts: dict[str, int] = {}
    for w in found["writers"]:
        key = (w["component"], tuple(w["shape"]), w["bias"], w["post_norm"])
        rows[key] = rows.get(key, 0) + 1
        if w["expert"] is not None:
            experts[w["component"]] = max(experts.get(w["component"], 0), w["expert"] + 1)
    for (component, shape, bias, norm), count in rows.items():
        table.add_row(
            Text(visible(component)),
            str(count),
            " x ".join(map(str, shape)),
            str(experts.get(component, "no")),
            "yes" if bias else "no",
            "yes" if norm else "no",
        )
    head.append("\nWriters (output projections) add to the residual stream:", style="dim")
    notes = [Text(visible(f"edited      {line}")) for line in found["edited"]]
    notes += [Text(visible(f"not edited  {line}"), style="dim") for line in found["not_edited"]]
    return Group(head, Text(), table, Text(), *notes)
