"""Join a language model and its projector in one GGUF, as Ollama's own converter lays it out.

Ollama runs Gemma 3 and 4 from one file: beside the language model's tensors those of the vision and audio
towers, under the names of Ollama's converter (`convert/convert_gemma3.go` and `convert_gemma4.go` there),
and keys of the language model's architecture (`gemma4.vision.block_count`) in place of the projector's
own (`clip.*`). llama.cpp refuses a file with such tensors; `text_part` leaves them out again.

Every key and tensor of the language model stays as it is, and so do the projector's tensors, under their
new names, but for the patch embedding, which Ollama's convolution takes as F16.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type

from excise.checkpoints.gguf_header import GgufFile, GgufTensor, read_gguf
from excise.errors import ExportError, StorageError
from excise.gguf.ggml import to_float

_TOWERS = ("v.", "a.", "mm.")  # how the names of a projector's tensors begin
_ALIGNMENT = 32
_CHUNK = 1 << 24  # bytes copied at a time
_CLAMPED = ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_gate", "ffn_up", "ffn_down")
_BOUNDS = ("input_min", "input_max", "output_min", "output_max")
# Where a linear has no bounds: the widest, as zeros would clamp all of it away.
_WIDEST = float(np.finfo(np.float32).max)
_U32, _F32 = (4, "<I"), (6, "<f")  # value types of the format, and their codes

Values = dict[str, int | float]


@dataclass(frozen=True)
class Layout:
    """How Ollama lays out one family.

    Attributes:
        names: the projector's parts of names -> Ollama's: whole ones, and what follows the layer's number.
        audio: the same for layers of the audio tower.
        patches: Ollama's name of the patch embedding.
        keys: finds the values of Ollama's keys, without the architecture's name before them.
        clamps: whether the bounds of the vision tower's linears are packed in one tensor too.
    """

    names: Mapping[str, str]
    patches: str
    keys: Callable[[GgufFile, Mapping[str, Any]], Values]
    audio: Mapping[str, str] = field(default_factory=dict)
    clamps: bool = False

    def rename(self, name: str) -> str:
        """Return Ollama's name of a projector's tensor."""
        block = re.match(r"([va])\.blk\.\d+\.", name)
        known = self.audio if block is not None and block[1] == "a" else self.names
        start = block.end() if block is not None else 0
        part = next((part for part in known if name[start:].startswith(f"{part}.")), None)
        return name if part is None else name[:start] + known[part] + name[start + len(part) :]


def _tower(head: GgufFile, tower: str, names: Sequence[str]) -> Values:
    """Return keys that the projector has itself; one that is missing is left to Ollama's default."""
    found = {name: head.keys.get(f"clip.{tower}.{name}") for name in names}
    return {f"{tower}.{name}": value for name, value in found.items() if value is not None}


_SHARED = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_epsilon",
)


def _gemma3_keys(head: GgufFile, config: Mapping[str, Any]) -> Values:
    values = _tower(head, "vision", (*_SHARED, "image_size", "patch_size"))
    values["vision.num_channels"] = head.tensors["v.patch_embd.weight"].shape[1]
    values["mm.tokens_per_image"] = int(config.get("mm_tokens_per_image") or 256)
    return values


def _gemma4_keys(head: GgufFile, config: Mapping[str, Any]) -> Values:
    values = _tower(head, "vision", (*_SHARED, "patch_size"))
    values["vision.num_channels"] = head.tensors["v.patch_embd.weight"].shape[1]
    vision = config.get("vision_config") or {}
    values["vision.projector.scale_factor"] = int(vision.get("pooling_kernel_size") or 3)
    values |= _tower(head, "audio", _SHARED)
    if "a.blk.0.conv_dw.weight" in head.tensors:
        values["audio.conv_kernel_size"] = head.tensors["a.blk.0.conv_dw.weight"].shape[-1]
    return values


# By the projector's own type.
_LAYOUTS = {
    "gemma3": Layout(
        {
            "v.patch_embd": "v.patch_embedding",
            "v.position_embd": "v.position_embedding",
            "v.post_ln": "v.post_layernorm",
            "ln1": "layer_norm1",
            "ln2": "layer_norm2",
            "attn_out": "attn_output",
            "ffn_up": "mlp.fc1",
            "ffn_down": "mlp.fc2",
            "mm.soft_emb_norm": "mm.mm_soft_emb_norm",
            "mm.input_projection": "mm.mm_input_projection",
        },
        "v.patch_embedding.weight",
        _gemma3_keys,
    ),
    "gemma4v": Layout(
        {"a.input_projection": "a.pre_encode.out", "a.pre_encode.out": "mm.a.fc"},
        "v.patch_embd.weight",
        _gemma4_keys,
        audio={
            "attn_pre_norm": "ln1",
            "attn_post_norm": "ln2",
            "ln2": "layer_pre_norm",
            "attn_k_rel": "linear_pos",
        },
        clamps=True,
    ),
}


def layout_of(projector: Path) -> Layout | None:
    """Return how Ollama lays out the family of this projector; None where it takes two files."""
    keys = read_gguf(projector).keys
    kind = keys.get("clip.vision.projector_type", keys.get("clip.projector_type"))
    return _LAYOUTS.get(kind) if isinstance(kind, str) else None


@dataclass(frozen=True)
class _Entry:
    """A tensor to write: its name, type and shape, and its bytes or where they stand."""

    tensor: GgufTensor
    data: bytes | None = None
    file: Path | None = None

    @property
    def size(self) -> int:
        return self.tensor.stop - self.tensor.start if self.data is None else len(self.data)


def join_projector(
    text: Path, projector: Path, layout: Layout, config: Mapping[str, Any], target: Path
) -> None:
    """Write the language model `text` and its projector as one new file.

    Args:
        text: a GGUF that is not split.
        projector: the mmproj file.
        layout: from `layout_of`.
        config: the checkpoint's config.json.
        target: the new file.

    Raises:
        ExportError: both hold a tensor of one name.
        StorageError: the disk is full or a write failed.
    """
    head, other = read_gguf(text), read_gguf(projector)
    entries = [_Entry(tensor, file=text) for tensor in head.tensors.values()]
    for tensor in other.tensors.values():
        entries.append(_of_projector(tensor, layout, projector))
    if layout.clamps:
        entries += _packed_bounds(other)
    names = [entry.tensor.name for entry in entries]
    twice = next((name for n, name in enumerate(names) if name in names[:n]), None)
    if twice is not None:
        raise ExportError(
            f"{text.name} and {projector.name} both hold {twice}: they cannot be one file"
        )
    values = layout.keys(other, config)
    more = {f"{head.architecture}.{key}": value for key, value in values.items()}
    _write(target, head, more, entries)


def text_part(joined: Path, target: Path) -> None:
    """Write a joined file's language model alone, as llama.cpp takes it.

    Raises:
        StorageError: the disk is full or a write failed.
    """
    head = read_gguf(joined)
    own = [t for t in head.tensors.values() if not t.name.startswith(_TOWERS)]
    _write(target, head, {}, [_Entry(tensor, file=joined) for tensor in own])


def _of_projector(tensor: GgufTensor, layout: Layout, file: Path) -> _Entry:
    renamed = replace(tensor, name=layout.rename(tensor.name))
    if renamed.name != layout.patches or tensor.type == Type.F16:
        return _Entry(renamed, file=file)
    values = _floats(file, tensor)
    limit = np.finfo(np.float16).max
    if not np.isfinite(values).all() or np.abs(values).max(initial=0) > limit:
        raise ExportError(f"{tensor.name} holds values that F16 cannot")
    return _Entry(replace(renamed, type=Type.F16), values.astype(np.float16).tobytes())


def _packed_bounds(head: GgufFile) -> list[_Entry]:
    """Pack the bounds of the vision tower's linears: layers x linears x four, then the projection's."""
    layers = head.keys.get("clip.vision.block_count", 0)
    linears = [f"v.blk.{n}.{part}" for n in range(layers) for part in _CLAMPED]
    names = [f"{linear}.{end}" for linear in (*linears, "mm.input_projection") for end in _BOUNDS]
    if not any(name in head.tensors for name in names):
        return []
    values = np.array([_bound(head, name) for name in names], dtype="<f4")
    tensor = GgufTensor("v.clamp_data", Type.F32, values.shape, 0, values.nbytes)
    return [_Entry(tensor, values.tobytes())]


def _bound(head: GgufFile, name: str) -> float:
    if name in head.tensors:
        return float(_floats(head.path, head.tensors[name]).flat[0])
    return -_WIDEST if name.endswith("min") else _WIDEST


def _floats(file: Path, tensor: GgufTensor) -> Any:
    with file.open("rb") as opened:
        opened.seek(tensor.start)
        raw = np.frombuffer(opened.read(tensor.stop - tensor.start), dtype=np.uint8)
    return to_float(raw.reshape(-1, tensor.row_bytes), tensor.type)


def _write(target: Path, head: GgufFile, more: Values, entries: Sequence[_Entry]) -> None:
    """Write a GGUF with the keys of `head` as they stand in its file, more of them, and these tensors."""
    with head.path.open("rb") as file:
        file.seek(head.keys_start)
        keys = file.read(head.keys_stop - head.keys_start)
    keys += b"".join(_key(name, value) for name, value in more.items())
    alignment = int(head.keys.get("general.alignment", _ALIGNMENT))
    infos, at = b"", 0
    for entry in entries:
        shape = entry.tensor.shape[::-1]
        infos += _text(entry.tensor.name) + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}QIQ", *shape, entry.tensor.type, at)
        at += -(-entry.size // alignment) * alignment
    count = len(head.keys) + len(more)
    begin = b"GGUF" + struct.pack("<IQQ", 3, len(entries), count) + keys + infos
    try:
        with target.open("xb") as new:
            new.write(begin + bytes(-len(begin) % alignment))
            for entry in entries:
                _write_data(entry, new)
                new.write(bytes(-entry.size % alignment))
            new.flush()
            os.fsync(new.fileno())
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from None


def _write_data(entry: _Entry, new: io.BufferedWriter) -> None:
    if entry.data is not None:
        new.write(entry.data)
        return
    assert entry.file is not None
    with entry.file.open("rb") as file:
        file.seek(entry.tensor.start)
        for left in range(entry.size, 0, -_CHUNK):
            new.write(file.read(min(left, _CHUNK)))


def _key(name: str, value: int | float) -> bytes:
    kind, code = _F32 if isinstance(value, float) else _U32
    return _text(name) + struct.pack("<I", kind) + struct.pack(code, value)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
