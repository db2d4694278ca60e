"""Check that a model's weights fit into memory, by its files' headers alone, and name what would fit.

Nothing is loaded here. Keys, values and activations come on top of the weights; the engine finds room
for those itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from excise.checkpoints.model_folder import read_tensors
from excise.config import ModelSection
from excise.errors import ModelError
from excise.model.devices import accelerator, free_bytes

_SPARE = 0.95  # of the free memory: loading needs a little more than the weights
# Bytes of an element of a quantised matrix, scales included.
_QUANTISED = {"bnb-8bit": 1.05, "bnb-4bit": 0.57}


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements: of matrices inside layers, which quantisation packs, and of all else."""

    matrices: int
    other: int

    def bytes(self, dtype: torch.dtype, quantise: str | None = None) -> float:
        """Return the bytes that the weights take in memory."""
        item = dtype.itemsize
        packed = _QUANTISED[quantise] if quantise else item
        return self.matrices * packed + self.other * item


def sizes(files: Sequence[Path]) -> Sizes:
    """Count a checkpoint's elements, from its headers."""
    matrices = other = 0
    for tensor in read_tensors(files):
        count, name = tensor.elements, tensor.name
        inner = len(tensor.shape) > 1 and "embed" not in name and "lm_head" not in name
        matrices, other = matrices + count * inner, other + count * (not inner)
    return Sizes(matrices, other)


def free_memory() -> tuple[int, str]:
    """Return the bytes that weights may take now, and where."""
    device = accelerator()
    if device is not None:
        return free_bytes(device), "on the GPU"
    return free_bytes(torch.device("cpu")), "in this machine's memory"


def check_fits(section: ModelSection, files: Sequence[Path], dtype: torch.dtype) -> None:
    """Refuse a model whose weights do not fit, before any of them is read.

    A `device_map` is trusted: it may offload.

    Raises:
        ModelError: they do not fit; the message says what would.
    """
    if section.device_map is not None:
        return
    found, (free, where) = sizes(files), free_memory()
    need = found.bytes(dtype, section.quantize)
    if need <= _SPARE * free:
        return
    name = str(dtype).removeprefix("torch.")
    raise ModelError(
        f"model {section.source} needs {_gigabytes(need)} for its weights in "
        f"{section.quantize or name}, and {_gigabytes(free)} are free {where}; what would fit: "
        + ", or ".join(_alternatives(section, found, dtype, free))
    )


def _alternatives(section: ModelSection, found: Sizes, dtype: torch.dtype, free: int) -> list[str]:
    ways = []
    half = found.bytes(torch.bfloat16)
    if dtype.itemsize > 2 and section.quantize is None and half <= _SPARE * free:
        ways.append(f"--set model.dtype=bfloat16 ({_gigabytes(half)})")
    for name in _QUANTISED:
        need = found.bytes(torch.bfloat16, name)
        if name != section.quantize and need <= _SPARE * free:
            ways.append(f"--quantize {name} --set model.dtype=bfloat16 ({_gigabytes(need)})")
    ways.append("--set model.device_map=auto, which keeps what does not fit on disk and is slow")
    return ways


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
