"""Find a checkpoint's quantisation scheme from its tensors, whatever its configuration claims.

Quantising and merging leave settings behind, so plain weights are called quantised, and quantised ones
come without settings.

Shapes: O and I a writer's out and in features.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from excise.checkpoints.safetensors_headers import FP8, StoredTensor
from excise.errors import ModelError

# Suffixes of the scales of an FP8 weight; both are multiplied, whatever the name says.
SCALES = ("_scale_inv", "_scale")
SCALE_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E8M0")
# Names of tensors in other schemes; matrices of integers are another sign of one.
_UNKNOWN = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_shape|absmax|quant_map|SCB)$|\.quant_state\."
)
_CLAIM = 60  # characters of what a configuration calls a method
_WHOLE = ("U8", "I8", "I16", "U16", "I32", "U32")


@dataclass(frozen=True)
class Scheme:
    """Quantisation scheme of a checkpoint: claimed, and found.

    Attributes:
        claim: the method that its configuration names; None where it names none.
        method: "fp8", "mxfp4" or "compressed-tensors"; None where all tensors are plain.
        block: sides of the blocks that share a scale, where the configuration gives them.
    """

    claim: str | None
    method: str | None
    block: tuple[int, int] | None = None


def find_scheme(config: dict[str, Any], tensors: Sequence[StoredTensor], source: str) -> Scheme:
    """Find a checkpoint's quantisation scheme from its tensors.

    Raises:
        ModelError: it cannot be dequantised here.
    """
    found = config.get("quantization_config")
    found = _inner(config).get("quantization_config") if found is None else found
    settings = found if isinstance(found, dict) else {}
    claim = (
        None if found is None else str(settings.get("quant_method") or "an unnamed method")[:_CLAIM]
    )
    names = {tensor.name for tensor in tensors}
    foreign = next((t for t in tensors if _is_unknown(t, names, claim is not None)), None)
    floats = claim == "compressed-tensors" and settings.get("format") == "float-quantized"
    fp8 = next((t for t in tensors if t.dtype in FP8), None)
    mxfp4 = any(is_pair(t.name, names) for t in tensors)
    if foreign is None and fp8 is None and not mxfp4:
        return Scheme(claim, None)
    if foreign is not None or not (claim in (None, "fp8", "mxfp4") or floats):
        raise ModelError(_not_unpacked(claim, settings, source, foreign or fp8))
    if fp8 is not None and claim is None and not any(fp8.name + end in names for end in SCALES):
        raise ModelError(
            f"model {source} stores {fp8.name} in FP8 without its scales: use the checkpoint that it "
            "was made from"
        )
    name = "mxfp4" if mxfp4 and fp8 is None else claim if floats else "fp8"
    return Scheme(claim, name, _block(settings, source))


def _inner(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else {}


def _is_unknown(tensor: StoredTensor, names: set[str], claimed: bool) -> bool:
    """Return whether a tensor is quantised in a way that is not known here."""
    if _UNKNOWN.search(tensor.name) or tensor.dtype in ("F4", "F6_E2M3", "F6_E3M2"):
        return True
    base = re.sub("_(blocks|scales)$", "", tensor.name)
    if len(tensor.shape) < 2 or tensor.dtype not in _WHOLE or is_pair(f"{base}_blocks", names):
        return False
    return claimed or tensor.name.endswith("weight")  # masks are integers too


def is_pair(name: str, names: set[str]) -> bool:
    """Return whether a tensor holds the values of an MXFP4 pair of values and scales."""
    return name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in names


def _not_unpacked(
    claim: str | None, settings: dict[str, Any], source: str, tensor: StoredTensor | None
) -> str:
    if claim == "bitsandbytes":
        return (
            f"model {source} is stored as bitsandbytes packs it: use the checkpoint that it was made "
            "from, with --quantize bnb-4bit or bnb-8bit"
        )
    more = f" ({str(settings['format'])[:_CLAIM]})" if settings.get("format") else ""
    named = f"{claim}{more}" if claim else "a method that its configuration does not name"
    which = f" (its {tensor.name} is {tensor.dtype})" if tensor is not None else ""
    return (
        f"model {source} is quantised with {named}, which cannot be unpacked here{which}: use the "
        "checkpoint that it was made from, or one in FP8, MXFP4 or GGUF"
    )


def _block(settings: dict[str, Any], source: str) -> tuple[int, int] | None:
    block = settings.get("weight_block_size")
    if block is None:
        return None
    if isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block):
        return block[0], block[1]
    raise ModelError(
        f"model {source}: quantization_config.weight_block_size is {block!a}, not two sides of a block"
    )


def scale_layout(
    shape: Sequence[int], scale: Sequence[int], block: tuple[int, int] | None
) -> str | None:
    """Tell what each scale of an FP8 weight applies to: "one" (all of it), "rows", "blocks"; else None."""
    shape, scale = tuple(shape), tuple(scale)
    if block is not None and len(shape) > 1 and len(scale) == len(shape):
        parts = (-(-side // length) for side, length in zip(shape[-2:], block, strict=True))
        if scale == (*shape[:-2], *parts):
            return "blocks"
    if all(side == 1 for side in scale) and len(scale) <= len(shape):
        return "one"
    if len(shape) > 1 and scale in (shape[:-1], (*shape[:-1], 1)):
        return "rows"
    return None


def check_scale(tensor: StoredTensor, scale: StoredTensor, block: tuple[int, int] | None) -> None:
    """Refuse a tensor that cannot be the scales of an FP8 tensor.

    Raises:
        ModelError: dtype or shape do not fit.
    """
    if scale.dtype in SCALE_DTYPES and scale_layout(tensor.shape, scale.shape, block) is not None:
        return
    raise _damaged(scale, tensor, f" in blocks of {list(block)}" if block else "")


def check_mxfp4(blocks: StoredTensor, scales: StoredTensor) -> None:
    """Refuse two tensors that cannot be values and scales of MXFP4.

    Raises:
        ModelError: dtypes or shapes do not fit.
    """
    fits = len(blocks.shape) >= 3 and blocks.shape[-1] == 16 and scales.shape == blocks.shape[:-1]
    if not fits or (blocks.dtype, scales.dtype) != ("U8", "U8"):
        raise _damaged(scales, blocks, "")


def _damaged(scale: StoredTensor, tensor: StoredTensor, more: str) -> ModelError:
    return ModelError(
        f"{scale.name} {list(scale.shape)} ({scale.dtype}) does not scale {tensor.name} "
        f"{list(tensor.shape)} ({tensor.dtype}){more}: the checkpoint is damaged"
    )
