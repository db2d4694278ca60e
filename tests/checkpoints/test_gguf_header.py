"""The header of a GGUF: read as llama.cpp writes it, and refused in one line where no model has such."""

from __future__ import annotations

import os
import random
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from excise.checkpoints.gguf_header import LongArray, check_sizes, read_gguf, read_shards
from excise.config import ExportSection
from excise.errors import ModelError
from excise.gguf.export import plan_gguf

U32, F32, TEXT, ARRAY, U64 = 4, 6, 8, 9, 10
HUGE = (1 << 64) - 1


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name.encode()) + struct.pack("<I", kind) + value


def number(name: str, value: int, kind: int = U32) -> bytes:
    return key(name, kind, struct.pack("<I" if kind == U32 else "<Q", value))


def tensor(name: str, shape: tuple[int, ...], at: int = 0, kind: int = 0) -> bytes:
    """Shape as the format has it, the fastest dimension first."""
    sides = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name.encode()) + sides + struct.pack("<IQ", kind, at)


def write(
    path: Path,
    keys: list[bytes],
    tensors: list[bytes],
    data: int = 4096,
    counts: tuple[int, int] | None = None,
) -> Path:
    head = b"GGUF" + struct.pack("<IQQ", 3, *(counts or (len(tensors), len(keys))))
    path.write_bytes(head + b"".join(keys) + b"".join(tensors) + bytes(data))
    return path


ARCHITECTURE = key("general.architecture", TEXT, text(b"llama"))
LAYERS = number("llama.block_count", 1)
SIZES = [number(f"llama.{name}_length", 8) for name in ("context", "embedding")]
SIZES.append(key("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", 1e-6)))
GOOD = tensor("blk.0.attn_output.weight", (8, 4))


def test_what_the_format_holds_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    writer.add_block_count(1)
    writer.add_context_length(8)
    writer.add_embedding_length(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_token_list([f"t{n}" for n in range(2000)])
    writer.add_array("some.short", ["a", "b"])
    writer.add_token_scores([0.5] * 2000)
    writer.add_tensor("blk.0.ffn_down.weight", np.arange(32, dtype=np.float32).reshape(4, 8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf(tmp_path / "a.gguf")
    check_sizes([found])
    assert found.keys["tokenizer.ggml.tokens"] == LongArray(2000)
    assert found.keys["tokenizer.ggml.scores"] == LongArray(2000)
    assert found.keys["some.short"] == ["a", "b"]
    place = found.tensors["blk.0.ffn_down.weight"]
    assert place.shape == (4, 8)
    raw = (tmp_path / "a.gguf").read_bytes()[place.start : place.stop]
    assert np.frombuffer(raw, np.float32).tolist() == list(range(32))


NESTED = struct.pack("<IQ", ARRAY, 2) + struct.pack("<IQ", ARRAY, 1 << 20) * 2
WRONG: dict[str, tuple[list[bytes], list[bytes], dict[str, Any]]] = {
    "tensors": ([], [], {"counts": (HUGE, 0)}),
    "keys": ([], [], {"counts": (0, 1 << 62)}),
    "an alignment of 0": ([number("general.alignment", 0)], [], {}),
    "an alignment of 24": ([number("general.alignment", 24)], [], {}),
    "an alignment of 'x'": ([key("general.alignment", TEXT, text(b"x"))], [], {}),
    "an array of arrays": ([key("a", ARRAY, NESTED)], [], {}),
    "an array of 18,446": ([key("a", ARRAY, struct.pack("<IQ", TEXT, HUGE))], [], {}),
    "an array of 1,099": ([key("a", ARRAY, struct.pack("<IQ", U32, 1 << 40))], [], {}),
    "runs past the end": ([key("a", ARRAY, struct.pack("<IQ", U32, 1 << 19))], [], {}),
    "list of texts": ([key("a", ARRAY, struct.pack("<IQ", TEXT, 1 << 19))], [], {"data": 1 << 14}),
    "a text that is not UTF-8": ([key("a", TEXT, text(b"\xff"))], [], {}),
    "does not say 'llama.attention.head_count'": (
        [LAYERS],
        [tensor("blk.0.attn_q.weight", (8, 4))],
        {},
    ),
    "a text of": ([key("a", TEXT, struct.pack("<Q", HUGE))], [], {}),
    "runs past": ([key("a", TEXT, struct.pack("<Q", 1 << 20))], [], {}),
    "two values of 'a'": ([number("a", 1), number("a", 1)], [], {}),
    "value type 99": ([key("a", 99, b"")], [], {}),
    "dimensions": ([], [tensor("a", (1, 1, 1, 1, 1))], {}),
    "has 0 dimensions": ([], [tensor("a", ())], {}),
    "has the shape": ([], [tensor("a", (33,), kind=8)], {}),
    "the shape (0,)": ([], [tensor("a", (0,))], {}),
    "of type 77": ([], [tensor("a", (1,), kind=77)], {}),
    "tensors end at": ([], [tensor("a", (1 << 62, 1 << 62, 1 << 62))], {}),
    "end at": ([], [tensor("a", (32,), at=HUGE)], {}),
    "two tensors of one name": ([], [tensor("a", (32,)), tensor("a", (32,), at=128)], {}),
    "upon each other": ([], [tensor("a", (32,)), tensor("b", (32,), at=64)], {}),
    "'llama.block_count' = 1,000,000,000": ([number("llama.block_count", 10**9)], [GOOD], {}),
    "(block_count)": ([key("llama.block_count", TEXT, text(b"one"))], [GOOD], {}),
    "None layers": ([], [GOOD], {}),
    "no tensor of layer 1 ": ([number("llama.block_count", 2)], [GOOD], {}),
    "'llama.vocab_size' = 9,223": ([LAYERS, number("llama.vocab_size", 1 << 63, U64)], [GOOD], {}),
    "512 experts": ([LAYERS, number("llama.expert_count", 512)], [GOOD], {}),
    "is no language model": ([key("general.type", TEXT, text(b"adapter"))], [GOOD], {}),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_no_model_has_is_refused_at_once(tmp_path: Path, words: str) -> None:
    keys, tensors, more = WRONG[words]
    path = write(tmp_path / "a.gguf", [ARCHITECTURE, *SIZES, *keys], tensors, **more)
    begun = time.monotonic()
    with pytest.raises(ModelError) as error:
        plan_gguf(ExportSection(from_gguf=str(path)))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("left", range(3))
def test_a_size_that_is_not_said_is_missed(tmp_path: Path, left: int) -> None:
    """Transformers would take its own default for it."""
    keys = [ARCHITECTURE, LAYERS, *SIZES[:left], *SIZES[left + 1 :]]
    path = write(tmp_path / "a.gguf", keys, [GOOD])
    with pytest.raises(ModelError, match="it is incomplete"):
        check_sizes(read_shards(path))


def test_a_long_header_of_nothing_is_not_read_for_minutes(tmp_path: Path) -> None:
    """A sparse file of many gigabytes: empty texts without end."""
    begin = b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 16)
    path = tmp_path / "a.gguf"
    path.write_bytes(begin + key("a", ARRAY, struct.pack("<IQ", TEXT, 1 << 19)))
    os.truncate(path, 1 << 36)
    begun = time.monotonic()
    with pytest.raises(ModelError, match="two values of"):
        read_gguf(path)
    assert time.monotonic() - begun < 20


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    for path, words in (
        (tmp_path / "pipe.gguf", "is a pipe"),
        (Path("/dev/zero"), "is a pipe, socket or device"),
        (tmp_path, "is a folder"),
        (tmp_path / "none.gguf", "does not exist"),
        (tmp_path / ("x" * 300), "cannot be read"),
    ):
        with pytest.raises(ModelError, match=words):
            read_shards(path)


def test_changed_bytes_are_one_line_or_nothing(tmp_path: Path) -> None:
    keys = [
        ARCHITECTURE,
        *SIZES,
        LAYERS,
        key("a", ARRAY, struct.pack("<IQ", TEXT, 2) + text(b"x") * 2),
    ]
    whole = bytearray(write(tmp_path / "a.gguf", keys, [GOOD], 256).read_bytes())
    draw, path, said = random.Random(0), tmp_path / "b.gguf", []
    for _ in range(600):
        changed = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 8))):
            changed[draw.randrange(len(whole) - 256)] = draw.choice((0, 1, 127, 255, 9, 10, 8, 4))
        path.write_bytes(changed[: draw.choice((len(changed), draw.randrange(len(changed)) + 1))])
        try:
            check_sizes(read_shards(path))
        except ModelError as error:
            said.append(str(error))
    assert len(said) > 100
    assert not any("\n" in line for line in said)


# -- parts of a split file -------------------------------------------------------------------------


def part(folder: Path, number_: int, count: int, total: int, name: str | None = None) -> Path:
    split = [number("split.no", number_), number("split.count", count)]
    split.append(number("split.tensors.count", total))
    keys = [ARCHITECTURE, *SIZES, LAYERS, *split] if number_ == 0 else split
    path = folder / (name or f"m-{number_ + 1:05d}-of-{count:05d}.gguf")
    return write(path, keys, [tensor(f"blk.0.t{number_}.weight", (8, 4))])


def test_any_part_leads_to_all(tmp_path: Path) -> None:
    paths = [part(tmp_path, n, 3, 3) for n in range(3)]
    for path in paths:
        assert [shard.path for shard in read_shards(path)] == paths
    check_sizes(read_shards(paths[2]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "m-00002-of-00003.gguf").unlink(), "is missing beside it"),
        (lambda folder: part(folder, 1, 3, 3, "m-00003-of-00003.gguf"), "is not part 3 of 3"),
        (lambda folder: part(folder, 0, 3, 4), "hold 4 tensors in all, and they hold 3"),
        (lambda folder: part(folder, 0, 3, 3, "m.gguf").rename(folder / "m-00001-of-00003.gguf")
         and part(folder, 1, 4, 3, "m-00002-of-00003.gguf"), "is not part 2 of 3"),
    ],
)  # fmt: skip
def test_parts_that_do_not_belong_together(tmp_path: Path, change: Any, words: str) -> None:
    for n in range(3):
        part(tmp_path, n, 3, 3)
    change(tmp_path)
    with pytest.raises(ModelError, match=words):
        read_shards(tmp_path / "m-00001-of-00003.gguf")


def test_a_part_that_was_renamed_is_known_as_one(tmp_path: Path) -> None:
    path = part(tmp_path, 0, 3, 3, "model.gguf")
    with pytest.raises(ModelError, match="llama-gguf-split --merge"):
        read_shards(path)
