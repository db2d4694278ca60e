"""Exports: a checkpoint and an adapter that others load, and how near the adapter is."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from sharded_checkpoints import BIASED, MODELS, apply_in_memory, load, make_checkpoint, random_edits
from torch import Tensor

from excise.config import ExportSection
from excise.errors import ExportError, OutputError, StorageError
from excise.events import Event, Notice, Progress
from excise.export import adapter
from excise.export import low_rank as low_rank_module
from excise.export.adapter import export_adapter, settle_adapter
from excise.export.checkpoint import export_safetensors
from excise.export.low_rank import (
    factors_of_product,
    low_rank,
    own_rank,
    rank_for,
    weight_difference,
)
from excise.files import sha256_of
from excise.model.anatomy import Writer, describe
from excise.model.edits import Edit
from excise.record import CoverageRecord, ScoreRecord
from excise.runs.artifacts import apart, touched_by

IDS = torch.arange(3, 23).view(2, 10)


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def source_and_writers(tmp_path: Path, kind: str = "llama") -> tuple[Path, tuple[Writer, ...]]:
    source = make_checkpoint(tmp_path / "source", kind, torch.float32)
    return source, describe(load(source)).writers


def adapted_differences(source: Path, folder: Path, writers: tuple[Writer, ...]) -> dict[str, Any]:
    """What the loaded adapter adds to each module, once merged by PEFT itself."""
    base = {w.name: w.module.weight.detach().double() for w in writers}
    merged = PeftModel.from_pretrained(load(source), folder).merge_and_unload()
    return {
        name: merged.get_submodule(name).weight.detach().double() - w for name, w in base.items()
    }


def test_safetensors_export_is_the_merge_with_its_hash(tmp_path: Path) -> None:
    source, writers = source_and_writers(tmp_path, "qwen3")
    edits = random_edits(writers)
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    extra = {"README.md": "the edited model's card", "record.json": "{}"}
    done = export_safetensors(source, tmp_path / "out", edits, writers, extra_files=extra)
    assert done.format == "safetensors"
    assert done.path == tmp_path / "out"
    assert done.sha256 == sha256_of(done.path) != sha256_of(source)
    assert done.bytes == sum(p.stat().st_size for p in done.path.rglob("*") if p.is_file())
    assert (done.path / "README.md").read_text() == extra["README.md"]
    assert done.details == {
        "tensors": sorted(f"{name}.weight" for name in edits),
        "left_out": ["pytorch_model.bin"],
        "unindexed": [],
    }
    json.dumps(done.details)
    merged = apply_in_memory(load(source), edits)
    assert torch.equal(logits(load(done.path)), logits(merged))


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in BIASED])
def test_full_rank_adapter_is_the_merged_model(tmp_path: Path, kind: str) -> None:
    source, writers = source_and_writers(tmp_path, kind)
    edits = random_edits(writers, rank=2)
    done = export_adapter(str(source), tmp_path / "out", edits, writers, rank=48)
    assert done.details["error"] < 1e-6
    base = logits(load(source))
    expected = logits(apply_in_memory(load(source), edits))
    adapted = logits(PeftModel.from_pretrained(load(source), done.path))
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(adapted, expected, atol=2e-4, rtol=2e-4)


def test_rank_one_edits_without_row_scales_are_carried_exactly(tmp_path: Path) -> None:
    source, writers = source_and_writers(tmp_path)
    edits = random_edits(writers, scale=False)
    done = export_adapter(str(source), tmp_path / "out", edits, writers, rank=1)
    assert done.details["error"] < 1e-6
    expected = logits(apply_in_memory(load(source), edits))
    adapted = logits(PeftModel.from_pretrained(load(source), done.path))
    torch.testing.assert_close(adapted, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("rank", [1, 4])
def test_the_stated_error_is_the_adapters_error(tmp_path: Path, rank: int) -> None:
    """Stated, measured on what PEFT loads, and the least that the rank allows: all three agree."""
    source, writers = source_and_writers(tmp_path)
    edits = random_edits(writers)
    done = export_adapter(str(source), tmp_path / "out", edits, writers, rank=rank)
    found = adapted_differences(source, done.path, writers)
    error = size = 0.0
    for writer in writers:
        weight = writer.module.weight.detach().double()
        wanted = edits[writer.name].apply_to_weight(weight) - weight
        off, whole = (found[writer.name] - wanted).norm(), wanted.norm()
        stated = done.details["errors"][writer.name]
        assert stated == pytest.approx(float(off / whole), rel=1e-4)
        tail = torch.linalg.svdvals(wanted)[rank:].norm()
        assert float(off) == pytest.approx(float(tail), rel=1e-4)
        error, size = error + float(off**2), size + float(whole**2)
    assert done.details["error"] == pytest.approx((error / size) ** 0.5, rel=1e-4)
    assert 0.01 < done.details["error"] < 1


@pytest.mark.parametrize("kind", MODELS)
def test_a_dora_of_the_edits_own_rank_is_the_edit(tmp_path: Path, kind: str) -> None:
    """On inputs as PEFT runs it, and merged by PEFT: the weights and biases of the exported checkpoint."""
    source, writers = source_and_writers(tmp_path, kind)
    edits = random_edits(writers, rank=2)
    done = export_adapter(None, tmp_path / "dora", edits, writers, rank=2, form="dora")
    assert done.details["error"] < 1e-6
    assert done.details["not_carried"] == []
    whole = load(export_safetensors(source, tmp_path / "whole", edits, writers).path)
    adapted = PeftModel.from_pretrained(load(source), done.path)
    assert (logits(whole) - logits(load(source))).abs().max() > 0.1
    torch.testing.assert_close(logits(adapted), logits(whole), atol=1e-5, rtol=0)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(whole), atol=1e-5, rtol=0)
    expected, found = whole.state_dict(), merged.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)
        if name.rpartition(".")[0] not in edits:
            assert torch.equal(found[name], tensor)


def test_a_dora_below_the_edits_rank_states_its_error(tmp_path: Path) -> None:
    source, writers = source_and_writers(tmp_path)
    edits = random_edits(writers, rank=3)
    done = export_adapter(None, tmp_path / "dora", edits, writers, rank=1, form="dora")
    found = adapted_differences(source, done.path, writers)
    for writer in writers:
        weight = writer.module.weight.detach().double()
        edited = edits[writer.name].apply_to_weight(weight)
        off = (found[writer.name] - (edited - weight)).norm() / (edited - weight).norm()
        assert done.details["errors"][writer.name] == pytest.approx(float(off), rel=1e-4)
        assert off > 0.01
        norms = (weight + found[writer.name]).norm(dim=1)  # the edit's own, whatever the rank
        torch.testing.assert_close(norms, edited.norm(dim=1), rtol=1e-5, atol=0)


def settled(
    edits: dict[str, Edit], writers: tuple[Writer, ...], **settings: Any
) -> tuple[str, int]:
    return settle_adapter(ExportSection.model_validate(settings), edits, writers)


def test_the_form_of_an_adapter_follows_from_the_edit(tmp_path: Path) -> None:
    """Exact where that can be, at the edit's own rank: factors that only repeat each other count once."""
    _, writers = source_and_writers(tmp_path)
    scaled, plain = random_edits(writers, 3), random_edits(writers, 3, scale=False)
    doubled = {
        name: Edit(torch.cat([e.left, e.left], 1), torch.cat([e.right, e.right]), e.scale)
        for name, e in scaled.items()
    }
    assert settled(scaled, writers) == ("dora", 3)
    assert settled(doubled, writers) == ("dora", 3)
    assert settled(plain, writers) == ("lora", 3)
    assert settled(plain, writers, adapter_form="dora") == ("dora", 3)
    assert settled(scaled, writers, adapter_rank=2) == ("dora", 2)
    assert settled(scaled, writers, adapter_rank=20) == ("dora", 3)
    form, rank = settled(scaled, writers, adapter_form="lora", adapter_error=0.01)
    assert (form, rank) == ("lora", rank_for(scaled, writers, 0.01))
    assert rank > 3


def test_a_plain_adapter_of_edits_without_row_scales_is_exact(tmp_path: Path) -> None:
    source, writers = source_and_writers(tmp_path)
    edits = random_edits(writers, 3, scale=False)
    form, rank = settle_adapter(ExportSection(), edits, writers)
    done = export_adapter(None, tmp_path / "a", edits, writers, rank=rank, form=form)
    whole = apply_in_memory(load(source), edits)
    adapted = PeftModel.from_pretrained(load(source), done.path)
    torch.testing.assert_close(logits(adapted), logits(whole), atol=1e-5, rtol=0)


def test_biases_that_move_ask_for_a_dora(tmp_path: Path) -> None:
    _, writers = source_and_writers(tmp_path, "biased")
    edits = random_edits(writers, scale=False)
    assert settled(edits, writers) == ("dora", 1)
    done = export_adapter(None, tmp_path / "a", edits, writers, rank=1, form="dora")
    assert len(done.details["biases"]) == len(writers)
    assert json.loads((done.path / "adapter_config.json").read_text())["bias"] == "all"


def test_a_row_of_zeros_is_no_dora(tmp_path: Path) -> None:
    """DoRA divides by the norms of rows: PEFT would fill such a row with NaN, without a word."""
    _, writers = source_and_writers(tmp_path)
    edits = random_edits(writers)
    writers[1].module.weight.data[3] = 0
    edits[writers[1].name].left[3] = 0
    events: list[Event] = []
    form, _ = settle_adapter(ExportSection(), edits, writers, events.append)
    assert form == "lora"
    (notice,) = (e for e in events if isinstance(e, Notice))
    assert writers[1].name in notice.message
    with pytest.raises(ExportError, match=r"is zero.*--lora"):
        export_adapter(None, tmp_path / "a", edits, writers, rank=1, form="dora")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("o", "i", "r"), [(9, 7, 3), (5, 4, 8), (4, 9, 1)])
def test_factors_of_a_product_are_its_own(o: int, i: int, r: int) -> None:
    draw = torch.Generator().manual_seed(o)
    edit = Edit(torch.randn(o, r, generator=draw), torch.randn(r, i, generator=draw))
    product = edit.left @ edit.right
    assert own_rank([edit]) == min(o, i, r)
    b, a = factors_of_product(edit, r)
    assert (b.shape, a.shape) == ((o, r), (r, i))
    torch.testing.assert_close(b @ a, -product, atol=1e-5, rtol=0)
    b, a = factors_of_product(edit, 1)
    tail = torch.linalg.svdvals(product)[1:].norm()
    torch.testing.assert_close((b @ a + product).norm(), tail, atol=1e-5, rtol=1e-4)


def test_only_the_edited_modules_are_adapted(tmp_path: Path) -> None:
    source, writers = source_and_writers(tmp_path, "gemma4")
    chosen = writers[1::3]
    edits = random_edits(chosen)
    done = export_adapter(
        "owner/name",
        tmp_path / "out",
        edits,
        writers,
        rank=2,
        revision="abc",
        extra_files={"a": ""},
    )
    config = json.loads((done.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/name"
    assert config["revision"] == "abc"
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 2
    assert config["target_modules"] == [writer.name for writer in chosen]
    stored = load_file(done.path / "adapter_model.safetensors")
    assert set(stored) == {
        f"base_model.model.{w.name}.lora_{side}.weight" for w in chosen for side in "AB"
    }
    model = PeftModel.from_pretrained(load(source), done.path)
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {f"base_model.model.{writer.name}" for writer in chosen}
    assert done.bytes == sum(p.stat().st_size for p in done.path.iterdir())
    assert (done.path / "a").read_text() == ""
    assert done.sha256 == sha256_of(done.path)


def test_the_adapters_files_have_the_usual_permissions(tmp_path: Path) -> None:
    source, writers = source_and_writers(tmp_path)
    before = os.umask(0o027)
    try:
        done = export_adapter(None, tmp_path / "out", random_edits(writers), writers, rank=1)
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in done.path.iterdir()} == {0o640}
    assert done.path.stat().st_mode & 0o777 == 0o750
    config = json.loads((done.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    PeftModel.from_pretrained(load(source), done.path)


def test_the_same_edit_gives_the_same_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank_module, "_EXACT_SVD", 8)  # the randomised way
    source, writers = source_and_writers(tmp_path)
    edits = random_edits(writers)
    state = torch.random.get_rng_state()
    one = export_adapter(str(source), tmp_path / "one", edits, writers, rank=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    two = export_adapter(str(source), tmp_path / "two", edits, writers, rank=3)
    files = ("adapter_model.safetensors", "adapter_config.json")
    for name in files:
        a, b = ((folder / name).read_bytes() for folder in (one.path, two.path))
        assert hashlib.sha256(a).digest() == hashlib.sha256(b).digest()


@pytest.mark.parametrize("shape", [(600, 700), (700, 600)])
def test_the_randomised_decomposition_is_nearly_the_best(shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    o, i = shape
    flat = 0.02 * torch.randn(o, i, generator=draw)  # a row scale's tail
    delta = torch.randn(o, 2, generator=draw) @ torch.randn(2, i, generator=draw) + flat
    b, a = low_rank(delta, 4)
    assert b.shape == (o, 4)
    assert a.shape == (4, i)
    best = torch.linalg.svdvals(delta)[4:].norm()
    assert (delta - b @ a).norm() < 1.001 * best
    assert float(b.norm()) == pytest.approx(float(a.norm()), rel=1e-3)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("error", [0.9, 0.3, 0.1, 0.02])
def test_the_rank_for_an_error_is_the_least_that_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float, exact: bool
) -> None:
    source, writers = source_and_writers(tmp_path)
    edits = random_edits(writers)
    if not exact:  # as for a large matrix
        monkeypatch.setattr(low_rank_module, "_EXACT_SVD", 4)
    rank = rank_for(edits, writers, error)
    monkeypatch.undo()
    errors = [
        export_adapter(str(source), tmp_path / f"r{r}", edits, writers, rank=r).details["error"]
        for r in (rank, rank - 1)
        if r
    ]
    assert errors[0] <= error * 1.001
    assert rank == 1 or errors[1] > error * 0.999


def test_rank_one_is_enough_for_a_rank_one_edit(tmp_path: Path) -> None:
    _, writers = source_and_writers(tmp_path)
    assert rank_for(random_edits(writers, scale=False), writers, 0.01) == 1


def test_a_rank_beyond_the_matrix_is_padded() -> None:
    delta = torch.randn(5, 3)
    b, a = low_rank(delta, 9)
    assert b.shape == (5, 9)
    assert a.shape == (9, 3)
    torch.testing.assert_close(b @ a, delta)


@pytest.mark.parametrize("scale", [True, False])
def test_the_difference_is_the_edits(tmp_path: Path, scale: bool) -> None:
    _, writers = source_and_writers(tmp_path)
    for writer in writers:
        edit = random_edits((writer,), rank=3, scale=scale)[writer.name]
        weight = writer.module.weight.detach()
        expected = edit.apply_to_weight(weight.double()) - weight.double()
        torch.testing.assert_close(weight_difference(writer, edit).double(), expected)


def test_bias_edits_are_named_as_not_carried(tmp_path: Path) -> None:
    source, writers = source_and_writers(tmp_path, "biased")
    edits = random_edits(writers)
    first = edits[writers[0].name]
    assert first.scale is not None
    bias = writers[0].module.bias.detach()  # a row scale that the shift undoes: b' = b
    edits[writers[0].name] = Edit(first.left, first.right, first.scale, bias - first.scale * bias)
    events: list[Event] = []
    done = export_adapter(
        str(source), tmp_path / "out", edits, writers, rank=2, on_event=events.append
    )
    assert done.details["not_carried"] == [writer.name for writer in writers[1:]]
    assert [type(e) for e in events].count(Notice) == 1
    assert [type(e) for e in events].count(Progress) == len(writers)
    PeftModel.from_pretrained(load(source), done.path)


def test_an_edit_that_changes_nothing_has_no_error(tmp_path: Path) -> None:
    source, writers = source_and_writers(tmp_path)
    o, i = writers[0].module.weight.shape
    edit = Edit(torch.zeros(o, 1), torch.zeros(1, i), torch.ones(o))
    done = export_adapter(str(source), tmp_path / "out", {writers[0].name: edit}, writers, rank=1)
    assert done.details["error"] == 0.0


def test_what_cannot_be_an_adapter_is_refused(tmp_path: Path) -> None:
    source, writers = source_and_writers(tmp_path)
    with pytest.raises(ExportError, match="edits nothing"):
        export_adapter(str(source), tmp_path / "out", {}, writers, rank=1)
    edits = random_edits(writers)
    with pytest.raises(OutputError, match="already exists"):
        export_adapter(str(source), source, edits, writers, rank=1)
    writers[0].module.to("meta")
    with pytest.raises(ExportError, match="offloaded"):
        export_adapter(str(source), tmp_path / "out", edits, writers, rank=1)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "No space left on device"), StorageError),
        (SafetensorError("I/O error: No space left on device"), StorageError),
    ],
)
def test_a_failing_adapter_export_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    expected: type[BaseException],
) -> None:
    source, writers = source_and_writers(tmp_path)

    def fail(_tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(adapter, "save_file", fail)
    with pytest.raises(expected):
        export_adapter(str(source), tmp_path / "out", random_edits(writers), writers, rank=1)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_the_adapter_is_laid_out_as_vllm_loads_it(tmp_path: Path) -> None:
    """What vLLM's loader asks of a PEFT folder; vLLM itself needs a GPU build and is not run here.

    Every tensor is `base_model.model.MODULE.lora_A.weight` (R, I) or `.lora_B.weight` (O, R), in
    pairs of one rank; target modules are a list whose last parts are modules that it can adapt; no
    bias, no other variant of LoRA, no modules saved whole.
    """
    source, writers = source_and_writers(tmp_path)
    edits = random_edits(writers, rank=2)
    done = export_adapter(str(source), tmp_path / "out", edits, writers, rank=4)
    config = json.loads((done.path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 4)
    assert isinstance(config["target_modules"], list)
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"o_proj", "down_proj"}
    assert config["bias"] == "none"
    assert not any(config.get(key) for key in ("use_dora", "use_rslora", "modules_to_save"))
    tensors = load_file(done.path / "adapter_model.safetensors")
    shapes = {w.name: tuple(w.weight.shape) for w in writers}
    expected = {}
    for name, (o, i) in shapes.items():
        expected[f"base_model.model.{name}.lora_A.weight"] = (4, i)
        expected[f"base_model.model.{name}.lora_B.weight"] = (o, 4)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == expected


def test_what_a_trial_touches_is_said_by_component_and_layer(tmp_path: Path) -> None:
    _, writers = source_and_writers(tmp_path)
    edits = random_edits(writers)
    names = {w.name for w in writers if w.component == "attn.o_proj" and w.layer > 0}
    of_trial = [edits[w.name] if w.name in names else None for w in writers]
    searched = CoverageRecord(edited=["attn.o_proj", "mlp.down_proj"], not_edited=["embedding"])
    touched = touched_by(writers, of_trial, searched)
    layers = len(names) + 1
    spanned = "1" if layers == 2 else f"1-{layers - 1}"
    assert touched.edited == [f"attn.o_proj: {len(names)} of {layers} matrices, layers {spanned}"]
    assert touched.not_edited == [
        f"mlp.down_proj: {layers} matrices, left alone by this edit",
        "embedding",
    ]


def test_an_artifact_that_measures_otherwise_than_the_search_is_said() -> None:
    def scores(rate: float, drift: float) -> dict[str, ScoreRecord]:
        return {
            "behaviour_rate": ScoreRecord(value=rate, n=100),
            "drift": ScoreRecord(value=drift, n=100),
        }

    assert apart(scores(0.1, 0.01), scores(0.14, 0.0119)) == []
    (line,) = apart(scores(0.1, 0.01), scores(0.16, 0.01))
    assert line == "behaviour_rate was 0.1 in the search, is 0.16 now"
    (line,) = apart(scores(0.1, 0.01), scores(0.1, 0.0))
    assert line == "drift was 0.01 in the search, is 0 now"
