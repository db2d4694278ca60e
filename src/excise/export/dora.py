"""An edit as DoRA: exact adapters, whose magnitudes carry the row scales that no LoRA of low rank can.

W' = diag(scale) (W - left right) is m * rownormalise(W + B A) with B A = -left right and
m_i = scale_i |row i of W - left right|: DoRA (arXiv 2402.09353), exact at the edit's own rank. Where
row norms are kept, m is the row norms of W.

Shapes: O and I a writer's out and in features, R the adapter's rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from excise.config import AdapterForm
from excise.errors import ExportError
from excise.export.low_rank import factors_of_product, moves_bias, square, values_of
from excise.model.anatomy import Writer
from excise.model.edits import Edit


@dataclass(frozen=True)
class DoraFactors:
    """One module of a DoRA adapter.

    Attributes:
        name: of the module.
        b: (O, R) float32.
        a: (R, I) float32.
        magnitude: (O,) float32.
        bias: (O,) the edited bias, or None where it stays.
        squares: |error|^2 and |W' - W|^2 of the weight that these come to.
    """

    name: str
    b: Tensor
    a: Tensor
    magnitude: Tensor
    bias: Tensor | None
    squares: tuple[float, float]


def choose_form(edits: Mapping[str, Edit], writers: Sequence[Writer]) -> AdapterForm:
    """Choose the form of adapter that is exact; plain LoRA where it is, or where DoRA cannot hold the edit.

    Raises:
        ExportError: a writer's values are not in memory.
    """
    chosen = [writer for writer in writers if writer.name in edits]
    scaled = any(edits[w.name].scale is not None or moves_bias(w, edits[w.name]) for w in chosen)
    return "dora" if scaled and zero_rows(edits, chosen) is None else "lora"


def zero_rows(edits: Mapping[str, Edit], writers: Sequence[Writer]) -> str | None:
    """Return the first writer of which a row is zero before its scale; None where none has one.

    DoRA divides by the norms of W + B A: such a row would become NaN.
    """
    chosen = (writer for writer in writers if writer.name in edits)
    return next((w.name for w in chosen if not bool(_norms(w, edits[w.name]).all())), None)


def dora_factors(writer: Writer, edit: Edit, rank: int) -> DoraFactors:
    """Make one module of an adapter of rank R; exact from the edit's own rank on.

    Raises:
        ExportError: the weight is offloaded, or a row of it comes to zero.
    """
    b, a = factors_of_product(edit, rank)
    weight = values_of(writer)
    norms = _norms(writer, edit)
    adapted = weight + b @ a
    lengths = torch.linalg.vector_norm(adapted.double(), dim=1)
    if not bool(norms.all() and lengths.all()):
        raise ExportError(
            f"a row of {writer.name} is zero, and DoRA divides by its norm: write the adapter with --lora"
        )
    magnitude = norms if edit.scale is None else norms * edit.scale.to(norms)
    wanted = edit.apply_to_weight(weight)
    came = (magnitude / lengths)[:, None] * adapted.double()
    bias = None
    if writer.bias is not None and moves_bias(writer, edit):
        bias = edit.apply_to_bias(writer.bias.detach()).to(writer.bias.dtype)
    squares = (square(came - wanted), square(wanted - weight))
    return DoraFactors(writer.name, b, a, magnitude.float(), bias, squares)


def _norms(writer: Writer, edit: Edit) -> Tensor:
    """Return the norms of the rows of W - left right (O,), in float64."""
    weight = values_of(writer)
    cut = weight - edit.left.to(weight) @ edit.right.to(weight)
    norms: Tensor = torch.linalg.vector_norm(cut.double(), dim=1)
    return norms
