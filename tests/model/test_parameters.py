"""Weights that are offloaded or packed give the figures, statistics and edits of those in memory."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import builders
import families
import pytest
import torch
from conftest import job
from safetensors.torch import load_file

from excise.capture.residuals import mean, residual_pass
from excise.checkpoints import loading
from excise.checkpoints.loading import load
from excise.cli import main as cli
from excise.config import ExportSection, ModelSection
from excise.engine.engine import Engine
from excise.engine.requests import Divergence, Responses
from excise.engine.stacking import ORIGINAL
from excise.errors import ConfigError, ModelError, UnknownArchitecture
from excise.export.exporter import exporters
from excise.export.merging import find_tensors
from excise.methods.directional import DirectionalMethod
from excise.model.parameters import check_finite, is_packed, values
from excise.prompts.tokens import batches

WRITERS = ("attn.o_proj", "mlp.down_proj")


@pytest.fixture(scope="module", params=["gemma4", "qwen3"])
def pair(request, tmp_path_factory):
    """The same checkpoint in memory, and with every other layer on disk."""
    folder = tmp_path_factory.mktemp(request.param)
    builders.checkpoint(folder, request.param, dtype=torch.float32)
    return load(ModelSection(source=str(folder))), offloaded(folder, request.param)


def offloaded(folder: Path, family: str):
    names = [name for name, _ in builders.model(family).model.named_children() if name != "layers"]
    spread = {f"model.{name}": "cpu" for name in names} | {"lm_head": "cpu"}
    spread |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(builders.LAYERS)}
    # The configuration takes Transformers' words only ("auto" and the like): a map is for tests.
    section = ModelSection(source=str(folder)).model_copy(update={"device_map": spread})
    found = load(section)
    assert any(p.is_meta for p in found.model.parameters())
    return found


def figures(loaded, seed=0):
    """Responses and divergences of candidates, stacked."""
    writers = loaded.anatomy.select(WRITERS)
    method = DirectionalMethod(writers, builders.directions(), builders.EditSection())
    edits = [method.edits(c) for c in builders.candidates(4, seed)]
    prompts = {"target": builders.token_ids(5, 1), "contrast": builders.token_ids(5, 2)}
    engine = Engine(loaded, writers, prompts, max_new_tokens=6)
    requests = [Responses("target"), Divergence("contrast")]
    return edits, engine.measure([ORIGINAL, *edits], requests)


def test_offloaded_weights_give_the_same_figures(pair):
    (edits, here), (others, there) = (figures(loaded) for loaded in pair)
    for mine, yours in zip(chain(*edits), chain(*others), strict=True):
        assert (mine is None) == (yours is None)
        if mine is not None:
            assert torch.equal(mine.left, yours.left)
            assert torch.equal(mine.right, yours.right)
    for mine, yours in zip(here, there, strict=True):
        assert [r.tokens for r in mine.responses["target"]] == [
            r.tokens for r in yours.responses["target"]
        ]
        # What is in memory runs lean, so the last digits may differ.
        for a, b in zip(mine.divergence["contrast"], yours.divergence["contrast"], strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-8)


def test_offloaded_layers_are_not_fetched_for_a_beginning_alone(pair, pass_shapes):
    passes = []
    for loaded in pair:
        prompts = {"target": [[5, 6, 7, 8, *row] for row in builders.token_ids(5, 1)]}
        engine = Engine(loaded, loaded.anatomy.select(WRITERS), prompts, max_new_tokens=6)
        pass_shapes.clear()
        said = [response.tokens for response in engine.original("target").responses]
        passes.append((len(pass_shapes), said))
    (here, mine), (there, yours) = passes
    assert mine == yours
    assert here > there


def test_offloaded_layers_give_the_same_residuals(pair):
    chunks = batches(builders.token_ids(7), 3, 0, torch.device("cpu"))
    here, there = (mean(residual_pass(loaded.anatomy, chunks, None)) for loaded in pair)
    assert torch.equal(here, there)


def test_offloaded_writers_are_found_in_the_checkpoint(pair):
    here, there = pair
    places = [find_tensors(loaded.folder, loaded.anatomy.writers) for loaded in pair]
    assert places[0] == places[1]
    for mine, yours in zip(here.anatomy.writers, there.anatomy.writers, strict=True):
        assert torch.equal(mine.weight, yours.weight)
        assert mine.shape == yours.shape == tuple(mine.weight.shape)
        assert mine.like.device == yours.like.device == mine.weight.device
        assert (mine.gain is None) == (yours.gain is None)
    assert there.device == here.device


def test_an_adapter_of_offloaded_weights_is_refused_before_the_work(pair):
    """PEFT cannot merge it, so it could not be measured."""
    whole, spread = pair
    writers = spread.anatomy.select(WRITERS)
    checkpoint, adapter = exporters(ExportSection(), ["safetensors", "adapter"])
    adapter.check(whole, writers)
    checkpoint.check(spread, writers)
    with pytest.raises(ConfigError, match="where weights are offloaded"):
        adapter.check(spread, writers)


def test_offloaded_weights_are_checked_too(tmp_path):
    builders.checkpoint(tmp_path, "qwen3", dtype=torch.float32)
    loaded = offloaded(tmp_path, "qwen3")
    assert check_finite(loaded.model) is None
    held = loaded.model.model.layers[1].mlp.down_proj
    values(held, "weight")  # what is read does not stay
    assert held.weight.is_meta


def test_fused_experts_can_be_offloaded(tmp_path):
    model = families.model("qwen3_moe")
    model.save_pretrained(tmp_path)
    builders.tokenizer().save_pretrained(tmp_path)
    whole = load(ModelSection(source=str(tmp_path), dtype="float32"))
    count = len(whole.anatomy.layers)
    spread = {f"model.{n}": "cpu" for n, _ in whole.model.model.named_children() if n != "layers"}
    spread |= {f"model.layers.{i}": "disk" for i in range(count)} | {"lm_head": "cpu"}
    section = ModelSection(source=str(tmp_path), dtype="float32")
    parts = load(section.model_copy(update={"device_map": spread}))
    for mine, yours in zip(whole.anatomy.writers, parts.anatomy.writers, strict=True):
        assert mine.shape == yours.shape
        assert torch.equal(mine.weight, yours.weight)
    found = []
    for loaded in (whole, parts):
        method = families.method(loaded.anatomy)
        edits = [method.edits(c) for c in families.candidates(loaded.anatomy, 3)]
        prompts = {"contrast": builders.token_ids(5, 2)}
        engine = Engine(loaded, method.writers, prompts, max_new_tokens=5)
        found.append(engine.measure(edits, [Divergence("contrast")]))
    for mine, yours in zip(*found, strict=True):
        for a, b in zip(mine.divergence["contrast"], yours.divergence["contrast"], strict=True):
            assert torch.equal(a, b)
            assert a.abs().max() > 0


# -- packed in 4 and 8 bits ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A checkpoint with rows of whole blocks, as real models have them."""
    folder = tmp_path_factory.mktemp("wide")
    builders.model("qwen3", intermediate_size=128).bfloat16().save_pretrained(folder)
    builders.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("how", ["bnb-4bit", "bnb-8bit"])
def test_packed_writers_are_what_their_modules_compute_with(wide, how):
    loaded = load(ModelSection(source=str(wide), quantize=how, dtype="bfloat16"))
    plain = load(ModelSection(source=str(wide), dtype="bfloat16"))
    assert how in loaded.notes[0]
    for packed, own in zip(loaded.anatomy.writers, plain.anatomy.writers, strict=True):
        assert is_packed(packed.module)
        assert packed.shape == own.shape == tuple(packed.weight.shape)
        assert packed.like.dtype == torch.bfloat16
        x = torch.randn(5, packed.shape[1], dtype=torch.bfloat16)
        y = packed.module(x).float()
        expected = x.float() @ packed.weight.float().T
        assert torch.allclose(y, expected, atol=0.03 * float(expected.abs().max()))
        error = (packed.weight.float() - own.weight.float()).abs().max()
        assert 0 < error < 0.2 * own.weight.abs().max()


def test_stacked_edits_on_packed_weights_are_those_of_the_unpacked_matrix(wide):
    loaded = load(ModelSection(source=str(wide), quantize="bnb-4bit", dtype="float32"))
    edits, found = figures(loaded)
    writers = loaded.anatomy.select(WRITERS)
    plain = load(ModelSection(source=str(wide), dtype="float32"))
    with torch.no_grad():
        for packed, module in zip(
            [m for m in loaded.model.modules() if is_packed(m)],
            [m for n, m in plain.model.named_modules() if is_packed(loaded.model.get_submodule(n))],
            strict=True,
        ):
            module.weight.copy_(values(packed, "weight"))
        for writer, edit in zip(plain.anatomy.select(WRITERS), edits[0], strict=True):
            if edit is not None:
                writer.module.weight.copy_(edit.apply_to_weight(writer.module.weight))
    prompts = {"target": builders.token_ids(5, 1), "contrast": builders.token_ids(5, 2)}
    engine = Engine(plain, (), prompts, max_new_tokens=6)
    (merged,) = engine.measure([ORIGINAL], [Responses("target")])
    ours = [r.tokens for r in found[1].responses["target"]]
    assert ours == [r.tokens for r in merged.responses["target"]]
    assert len(writers) == len(edits[0])


@pytest.mark.parametrize(
    ("how", "method"),
    [
        ("bnb-4bit", "directional"),
        ("bnb-8bit", "directional"),
        ("bnb-4bit", "ridge"),
        ("bnb-4bit", "ara"),
        ("bnb-4bit", "subspace"),
    ],
)
def test_a_packed_search_exports_the_edit_of_the_sources_own_weights(
    tiny, wide, tmp_path, how, method, capsys
):
    out = tmp_path / "run"
    formats = 'export.formats=["safetensors", "adapter"]'
    more = ("--quantize", how, "--method", method, "--set", "model.dtype=float32", "--set", formats)
    arguments = job(tiny, out, *more)
    arguments[1] = str(wide)
    assert cli.main(arguments) == 0
    record = json.loads((out / "record.json").read_text())
    assert how in record["model"]["notes"][0]
    assert how in (out / "model" / "README.md").read_text()
    artifact, adapter = record["artifacts"]
    edited = load_file(out / "model" / "model.safetensors")
    source = load_file(wide / "model.safetensors")
    changed = {name for name in source if not torch.equal(source[name], edited[name])}
    assert changed == set(artifact["details"]["tensors"])
    assert {tensor.dtype for tensor in edited.values()} == {torch.bfloat16}
    for one in (artifact, adapter):
        assert one["measured"].keys() == one["expected"].keys()
    capsys.readouterr()
    assert cli.main(["export", str(out), "--to", str(tmp_path / "again"), "--quiet"]) == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in edited.items())
    capsys.readouterr()
    assert cli.main(["reproduce", str(out), "--quiet"]) == 0
    assert capsys.readouterr().out.count("same bytes") == 2


def test_packing_without_its_package(wide, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="needs the package bitsandbytes"):
        load(ModelSection(source=str(wide), quantize="bnb-4bit"))


def test_rows_that_bitsandbytes_reads_back_wrongly_are_refused(tiny):
    with pytest.raises(ModelError, match="with 96 columns: use bnb-8bit"):
        load(ModelSection(source=str(tiny / "model"), quantize="bnb-4bit"))


def test_a_family_without_a_row_is_proven_on_weights_in_memory_only(tmp_path):
    name = next(iter(families.FOUND))
    families.model(name).save_pretrained(tmp_path)
    builders.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UnknownArchitecture, match=r"leave out --quantize and model\.device_map"):
        load(ModelSection(source=str(tmp_path), quantize="bnb-8bit"))


def test_the_first_tensor_that_is_not_finite_is_named():
    model = builders.model("qwen3")
    assert check_finite(model) is None
    model.model.layers[3].mlp.down_proj.weight[2, 3] = float("inf")
    assert check_finite(model) == "model.layers.3.mlp.down_proj.weight"
    model.model.layers[1].self_attn.q_norm.weight[0] = float("nan")
    assert check_finite(model) == "model.layers.1.self_attn.q_norm.weight"
