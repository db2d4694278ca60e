"""Merging: exact where edited, byte for byte elsewhere, and all or nothing on the disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sharded_checkpoints import MODELS, apply_in_memory, load, make_checkpoint, random_edits
from torch import Tensor

from excise import files
from excise.errors import ExportError, OutputError, StorageError
from excise.events import Event, Notice, Progress
from excise.export import merging
from excise.export.merging import find_tensors, merge_checkpoint
from excise.files import sha256_of
from excise.model.anatomy import describe
from excise.model.edits import Edit


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change a checkpoint's tensors and store them again in two shards."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
        file.unlink()
    tensors = change(tensors)
    names = sorted(tensors)
    shards = {"model-a.safetensors": names[::2], "model-b.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({k: tensors[k].clone() for k in keys}, folder / file, metadata={"format": "pt"})
    weight_map = {key: file for file, keys in shards.items() for key in keys}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def all_tensors(folder: Path) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        out.update(load_file(file))
    return out


def make_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def header(file: Path) -> bytes:
    data = file.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def files_of(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "source", "llama")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("kind", MODELS)
def test_reloaded_equals_merged_in_memory_bit_for_bit(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    source = make_checkpoint(tmp_path / "source", kind, dtype)
    assert len(list(source.glob("*.safetensors"))) > 2
    model = load(source)
    writers = describe(model).writers
    edits = random_edits(writers, rank=2)
    merge_checkpoint(source, tmp_path / "out", edits, writers)
    expected = apply_in_memory(model, edits).state_dict()
    found = load(tmp_path / "out").state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("kind", MODELS)
def test_whatever_is_not_edited_keeps_every_byte(tmp_path: Path, kind: str) -> None:
    source = make_checkpoint(tmp_path / "source", kind)
    writers = describe(load(source)).writers
    edits = random_edits(writers[::2])
    merge = merge_checkpoint(source, tmp_path / "out", edits, writers)
    assert files_of(tmp_path / "out") == files_of(source)
    edited = {f"{name}.{part}" for name in edits for part in ("weight", "bias")}
    shards = sorted(source.glob("*.safetensors"))
    for name in files_of(source) - {shard.name for shard in shards}:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    changed = set()
    for shard in shards:
        assert header(tmp_path / "out" / shard.name) == header(shard)
        before, after = load_file(shard), load_file(tmp_path / "out" / shard.name)
        for key in before:
            if not torch.equal(before[key], after[key]):
                changed.add(key)
    assert changed == set(merge.tensors)
    assert changed <= edited
    assert changed >= {f"{name}.weight" for name in edits}
    assert merge.bytes == sum((source / name).stat().st_size for name in files_of(source))


def test_nothing_to_edit_is_a_copy(tmp_path: Path, source: Path) -> None:
    merge = merge_checkpoint(source, tmp_path / "out", {}, ())
    assert merge.tensors == ()
    assert sha256_of(tmp_path / "out") == sha256_of(source)


def test_blocks_do_not_change_the_result(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = describe(load(source)).writers
    edits = random_edits(writers)
    threads = torch.get_num_threads()
    merge_checkpoint(source, tmp_path / "whole", edits, writers)
    assert torch.get_num_threads() == threads
    monkeypatch.setattr(merging, "_BLOCK", 7 * 32)  # O = 32 is no multiple of 7
    merge_checkpoint(source, tmp_path / "blocks", edits, writers)
    assert sha256_of(tmp_path / "blocks") == sha256_of(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe"])
def test_experts_in_blocks_are_the_edited_experts(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored (E, I, O), as in gpt-oss, a block holds some of the inputs; else, some of the outputs."""
    monkeypatch.setattr(merging, "_BLOCK", 7 * families.WIDTH)
    model = families.model(kind)
    model.save_pretrained(tmp_path / "source")
    writers = [writer for writer in describe(model).writers if writer.expert is not None]
    assert {writer.transposed for writer in writers} == {kind == "gpt_oss"}
    assert min(min(writer.shape) for writer in writers) > 2 * 7
    draw = torch.Generator().manual_seed(0)
    edits = [
        Edit(torch.randn(o, 1, generator=draw), torch.randn(1, i, generator=draw))
        for o, i in (writer.shape for writer in writers)
    ]
    named = {writer.name: edit for writer, edit in zip(writers, edits, strict=True)}
    merge_checkpoint(tmp_path / "source", tmp_path / "out", named, writers)
    expected = families.merged(model, writers, edits)
    found = load(tmp_path / "out", torch.float32)
    for (name, ours), theirs in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5), name


def test_prefixed_keys_and_tensors_that_no_class_loads(tmp_path: Path, source: Path) -> None:
    model = load(source)
    writers = describe(model).writers

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {f"language_model.{key}": tensor for key, tensor in tensors.items()}
        out["mtp.layers.0.mlp.down_proj.weight"] = torch.randn(32, 48, dtype=torch.bfloat16)
        out["mtp.scale"] = torch.tensor(3.0)
        out["mtp.table"] = torch.arange(10, dtype=torch.int8)
        return out

    rewrite(source, change)
    edits = random_edits(writers)
    merge = merge_checkpoint(source, tmp_path / "out", edits, writers)
    assert merge.tensors == tuple(sorted(f"language_model.{name}.weight" for name in edits))
    before, after = all_tensors(source), all_tensors(tmp_path / "out")
    for key in before:
        assert torch.equal(before[key], after[key]) == (key not in merge.tensors), key
    apply_in_memory(model, edits)
    for name in edits:
        found = after[f"language_model.{name}.weight"]
        assert torch.equal(found, model.get_submodule(name).weight)


@pytest.mark.parametrize("loaded", [torch.bfloat16, torch.float32])
def test_mixed_dtypes_are_edited_from_the_source_and_kept(
    tmp_path: Path, source: Path, loaded: torch.dtype
) -> None:
    kinds = {"o_proj": torch.float32, "down_proj": torch.float16, "q_proj": torch.float64}

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        torch.manual_seed(1)
        for key in tensors:
            for part, dtype in kinds.items():
                if part in key:  # more digits than the loaded dtype has
                    tensors[key] = (0.3 * torch.randn(tensors[key].shape)).to(dtype)
        return tensors

    rewrite(source, change)
    writers = describe(load(source, loaded)).writers
    edits = random_edits(writers)
    merge_checkpoint(source, tmp_path / "out", edits, writers)
    before, after = all_tensors(source), all_tensors(tmp_path / "out")
    for key in before:
        assert after[key].dtype == before[key].dtype
    for name, edit in edits.items():
        weight = before[f"{name}.weight"]
        expected = edit.apply_to_weight(weight).to(weight.dtype)
        assert torch.equal(after[f"{name}.weight"], expected)


def test_values_and_not_names_decide(source: Path) -> None:
    writers = describe(load(source)).writers
    a, b = writers[0].name, writers[2].name  # o_proj of layers 0 and 1

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        first, second = f"{a}.weight", f"{b}.weight"
        tensors[first], tensors[second] = tensors[second], tensors[first]
        number = {key: n for n, key in enumerate(sorted(tensors))}
        return {f"block.{number[k]}" if "down" in k else k: t for k, t in tensors.items()}

    tensors = all_tensors(source)
    rewrite(source, change)
    places = find_tensors(source, writers)
    assert places[a].weight.key == f"{b}.weight"
    assert places[b].weight.key == f"{a}.weight"
    stored = all_tensors(source)
    for writer in writers:
        place = places[writer.name].weight
        assert place.shape == tuple(writer.module.weight.shape)
        assert torch.equal(stored[place.key], writer.module.weight)
        with safe_open(source / place.file, "pt") as file:
            assert place.key in file.keys()  # noqa: SIM118  (not a dict)
    assert len(tensors) == len(stored)


def test_equal_layers_are_told_apart_by_name(source: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for key in tensors:
            if ".layers.2." in key:
                tensors[key] = tensors[key.replace(".2.", ".1.")]
        return {f"text.{key}": tensor for key, tensor in tensors.items()}

    writers = describe(load(source)).writers
    rewrite(source, lambda tensors: change(tensors))
    for writer in writers:
        if writer.layer == 2:
            twin = next(w for w in writers if w.layer == 1 and w.component == writer.component)
            writer.module.weight.data = twin.module.weight.data.clone()
    for name, place in find_tensors(source, writers).items():
        assert place.weight.key == f"text.{name}.weight"


def test_two_equal_candidates_are_refused(source: Path) -> None:
    writers = describe(load(source)).writers
    name = f"{writers[0].name}.weight"

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        twin = tensors.pop(name)
        return {**tensors, f"a.{name}": twin, f"b.{name}": twin.clone()}

    rewrite(source, change)
    with pytest.raises(ExportError, match="both hold the values"):
        find_tensors(source, writers)


def test_one_tensor_for_two_writers_is_refused(source: Path) -> None:
    writers = describe(load(source)).writers
    writers[2].module.weight = writers[0].module.weight

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        del tensors[f"{writers[2].name}.weight"]
        return tensors

    rewrite(source, change)
    with pytest.raises(ExportError, match="cannot be edited apart"):
        find_tensors(source, writers)


def test_a_writer_without_its_tensor_names_it(tmp_path: Path, source: Path) -> None:
    writers = describe(load(source)).writers
    lost = writers[3]
    lost.module.weight.data[5, 7] += 1  # one element, in a row that is not compared first
    with pytest.raises(ExportError, match=lost.name) as caught:
        merge_checkpoint(source, tmp_path / "out", random_edits(writers), writers)
    assert "edit.components" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_offloaded_weights_are_refused(source: Path) -> None:
    writers = describe(load(source)).writers
    writers[0].module.to("meta")
    with pytest.raises(ExportError, match="offloaded"):
        find_tensors(source, writers)


def test_other_formats_are_left_out_and_links_followed(tmp_path: Path, source: Path) -> None:
    """As in a Hub snapshot: every file links to a blob; some folders are the Hub's own."""
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "pytorch_model.bin.index.json").write_text("{}")
    (source / "model.Q8_0.GGUF").write_bytes(b"unedited")
    (source / "figures" / "consolidated.00.pth").write_bytes(b"pickle")
    (source / ".cache").mkdir()
    (source / ".cache" / "lock").write_text("")
    (source / ".gitattributes").write_text("*.safetensors lfs")
    blobs = tmp_path / "hub" / "models--owner--name" / "blobs"
    shutil.copytree(source, blobs)
    source = source.rename(make_folder(blobs.parent / "snapshots") / ("0" * 40))
    (source / "figures" / "loop").symlink_to(source, target_is_directory=True)
    for file in [p for p in source.rglob("*") if p.is_file() and not p.is_symlink()]:
        target = blobs / file.relative_to(source)
        file.unlink()
        file.symlink_to(target)
    writers = describe(load(source)).writers
    merge = merge_checkpoint(source, tmp_path / "out", random_edits(writers), writers)
    assert merge.left_out == (
        "figures/consolidated.00.pth",
        "model.Q8_0.GGUF",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )
    left = {*merge.left_out, ".cache/lock"}
    assert files_of(tmp_path / "out") == files_of(source) - left
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))
    for file in blobs.glob("*.safetensors"):
        assert file.read_bytes() != (tmp_path / "out" / file.name).read_bytes() or not any(
            f"{w.name}.weight" in load_file(file) for w in writers
        )


@pytest.mark.parametrize("named", [False, True])
def test_of_two_checkpoints_in_a_folder_the_loaded_one_is_edited(
    tmp_path: Path, source: Path, named: bool
) -> None:
    """Transformers takes what the configuration names, else the whole file before an index."""
    other = load(source)
    for parameter in other.parameters():
        parameter.data.neg_()
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", source)
    shards = {path.name for path in source.glob("model-*.safetensors")}
    assert len(shards) > 1
    index = "model.safetensors.index.json"
    if named:
        config = json.loads((source / "config.json").read_text())
        config["transformers_weights"] = index
        (source / "config.json").write_text(json.dumps(config))
    model = load(source)
    writers = describe(model).writers
    edits = random_edits(writers)
    merge = merge_checkpoint(source, tmp_path / "out", edits, writers)
    assert set(merge.left_out) == ({"model.safetensors"} if named else {*shards, index})
    again = {w.name: w.weight for w in describe(load(tmp_path / "out")).writers}
    for writer in writers:
        edited = edits[writer.name].apply_to_weight(writer.weight)
        assert torch.equal(again[writer.name], edited.to(writer.weight.dtype))
    kept = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert kept == (shards if named else {"model.safetensors"})


def test_a_broken_link_is_an_error(tmp_path: Path, source: Path) -> None:
    (source / "merges.txt").symlink_to(source / "nowhere")
    with pytest.raises(ExportError, match=r"merges\.txt links to a missing file"):
        merge_checkpoint(source, tmp_path / "out", {}, ())


@pytest.mark.parametrize("name", ["notes.txt", "figures/notes.txt", "model.bin"])
def test_a_link_out_of_the_model_is_not_followed(tmp_path: Path, source: Path, name: str) -> None:
    (tmp_path / "token").write_text("of this machine")
    (source / name).symlink_to(tmp_path / "token")
    with pytest.raises(ExportError, match="is a link out of its folder"):
        merge_checkpoint(source, tmp_path / "out", {}, ())
    assert not (tmp_path / "out").exists()


def test_weights_of_another_part_are_copied_and_named(tmp_path: Path, source: Path) -> None:
    writers = describe(load(source)).writers
    weight = writers[0].module.weight.detach()
    (source / "speech").mkdir()
    save_file({"layers.0.attention.wo.weight": weight}, source / "speech" / "lora.safetensors")
    events: list[Event] = []
    merge = merge_checkpoint(
        source, tmp_path / "out", random_edits(writers), writers, events.append
    )
    assert merge.unindexed == ("speech/lora.safetensors",)
    assert any(isinstance(e, Notice) and "lora" in e.message for e in events)
    steps = [event for event in events if isinstance(event, Progress)]
    assert steps[-1].done == steps[-1].total == len(files_of(source))


def test_without_an_index_the_usual_file_is_the_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    torch.manual_seed(0)
    MODELS["llama"]().save_pretrained(folder)
    shutil.copy(folder / "model.safetensors", folder / "model.fp32.safetensors")
    writers = describe(load(folder)).writers
    assert {p.weight.file.name for p in find_tensors(folder, writers).values()} == {
        "model.safetensors"
    }


def test_extra_files_take_the_place_of_the_sources(tmp_path: Path, source: Path) -> None:
    extra = {"README.md": "the edited model's card: ä", "record.json": "{}"}
    merge = merge_checkpoint(source, tmp_path / "out", {}, (), extra_files=extra)
    for name, text in extra.items():
        assert (tmp_path / "out" / name).read_text(encoding="utf-8") == text
    assert merge.bytes == sum(p.stat().st_size for p in (tmp_path / "out").rglob("*.*"))


def test_an_edit_that_needs_a_missing_bias_is_refused(tmp_path: Path, source: Path) -> None:
    writers = describe(load(source)).writers
    o, i = writers[0].module.weight.shape
    edit = Edit(torch.zeros(o, 1), torch.zeros(1, i), None, torch.ones(o))
    with pytest.raises(ExportError, match="bias"):
        merge_checkpoint(source, tmp_path / "out", {writers[0].name: edit}, writers)
    nothing = Edit(torch.zeros(o, 1), torch.zeros(1, i), None, torch.zeros(o))
    merge_checkpoint(source, tmp_path / "out", {writers[0].name: nothing}, writers)


def test_a_row_scale_alone_scales_the_bias(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "biased")
    model = load(source)
    writers = describe(model).writers
    edits = {
        name: Edit(edit.left, edit.right, edit.scale)
        for name, edit in random_edits(writers).items()
    }
    merge_checkpoint(source, tmp_path / "out", edits, writers)
    apply_in_memory(model, edits)
    after = all_tensors(tmp_path / "out")
    for name in edits:
        assert torch.equal(after[f"{name}.bias"], model.get_submodule(name).bias)


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_values_that_do_not_fit_are_refused(tmp_path: Path, value: float) -> None:
    source = make_checkpoint(tmp_path / "source", "llama", torch.float16)
    writers = describe(load(source)).writers
    edits = random_edits(writers)
    edits[writers[0].name].left[3, 0] = value
    edits[writers[0].name].right[:] = 1.0
    with pytest.raises(ExportError, match="holds values that F16 cannot"):
        merge_checkpoint(source, tmp_path / "out", edits, writers)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_destination_that_is_taken_is_refused(tmp_path: Path, source: Path) -> None:
    taken, file = tmp_path / "taken", tmp_path / "file"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    file.write_text("mine")
    for destination in (taken, file, source):
        with pytest.raises(OutputError, match="another folder"):
            merge_checkpoint(source, destination, {}, ())
    with pytest.raises(OutputError, match="inside the source"):
        merge_checkpoint(source, source / "new" / "out", {}, ())
    assert (taken / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "source", "taken"]


def test_empty_new_and_linked_destinations_are_used(tmp_path: Path, source: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("empty", "new/deep/out", "link"):
        merge_checkpoint(source, tmp_path / name, {}, ())
        assert files_of(tmp_path / name) == files_of(source)
    assert (tmp_path / "elsewhere" / "config.json").is_file()
    assert not list(tmp_path.rglob(".*partial*"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interrupt_leaves_nothing(
    tmp_path: Path, source: Path, error: type[BaseException]
) -> None:
    writers = describe(load(source)).writers

    def interrupt(event: Event) -> None:
        if isinstance(event, Progress) and event.done == 3:
            assert len(list(tmp_path.glob(".out.partial-*/*"))) >= 3
            assert not (tmp_path / "out").exists()
            raise error

    with pytest.raises(error):
        merge_checkpoint(source, tmp_path / "out", random_edits(writers), writers, interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_too_little_space_is_said_before_anything_is_written(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(StorageError, match="disk full") as caught:
        merge_checkpoint(source, tmp_path / "deep" / "out", {}, ())
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "disk full"), (errno.EIO, "cannot write")]
)
@pytest.mark.parametrize("place", ["copy", "write", "sync"])
def test_a_failing_write_is_a_storage_error(
    tmp_path: Path,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    number: int,
    message: str,
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    targets = {"copy": (merging, "copy_bytes"), "write": (merging.TensorPlace, "write")}
    monkeypatch.setattr(*targets.get(place, (os, "fsync")), fail)
    writers = describe(load(source)).writers
    with pytest.raises(StorageError, match=message) as caught:
        merge_checkpoint(source, tmp_path / "out", random_edits(writers), writers)
    assert str(tmp_path / "out") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("absent", [True, False])
def test_without_copies_in_the_kernel_the_result_is_the_same(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, absent: bool
) -> None:
    def unsupported(*_: Any) -> int:
        raise OSError(errno.EXDEV, "cross-device")

    writers = describe(load(source)).writers
    edits = random_edits(writers)
    merge_checkpoint(source, tmp_path / "kernel", edits, writers)
    if absent:
        monkeypatch.delattr(os, "copy_file_range")
    else:
        monkeypatch.setattr(os, "copy_file_range", unsupported)
    monkeypatch.setattr(files, "_CHUNK", 1000)
    merge_checkpoint(source, tmp_path / "out", edits, writers)
    for name in files_of(source):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "kernel" / name).read_bytes()


def test_the_hash_is_of_names_and_weights_only(tmp_path: Path) -> None:
    def folder(name: str, file: str, value: float) -> Path:
        path = tmp_path / name
        path.mkdir()
        save_file({"x": torch.full((3,), value)}, path / file)
        (path / "README.md").write_text(name)
        return path

    one = sha256_of(folder("one", "model.safetensors", 1.0))
    assert one == sha256_of(folder("same", "model.safetensors", 1.0))
    assert one != sha256_of(folder("value", "model.safetensors", 2.0))
    assert one != sha256_of(folder("name", "other.safetensors", 1.0))
