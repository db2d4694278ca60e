"""Checkpoints as they are: experts in any layout on disk, old names, extra tensors, mixed dtypes."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import families
import pytest
import torch
from safetensors.torch import load_file, save_file

from excise.checkpoints.loading import load
from excise.config import ExportSection, ModelSection
from excise.errors import ConfigError, ExportError
from excise.export.adapter import export_adapter
from excise.export.exporter import exporter
from excise.export.matching import find_tensors
from excise.export.merging import merge_checkpoint


def all_tensors(folder):
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= load_file(file)
    return out


def rewrite(folder, change, shards=2):
    """Change a checkpoint's tensors and store them again: one file, or several with an index."""
    tensors = change(all_tensors(folder))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    names = sorted(tensors)
    files = {f"model-{n}.safetensors": names[n::shards] for n in range(shards)}
    if shards == 1:
        files = {"model.safetensors": names}
    for file, keys in files.items():
        part = {key: tensors[key].contiguous() for key in keys}
        save_file(part, folder / file, metadata={"format": "pt"})
    if shards > 1:
        index = {
            "metadata": {},
            "weight_map": {key: file for file, keys in files.items() for key in keys},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def check_export(folder, out, dtype="float32"):
    """Export an edit of everything; it must load as the model with the edit in its weights."""
    before = load(ModelSection(source=str(folder), dtype=dtype))
    method = families.method(before.anatomy)
    edits = method.edits(families.flat(before.anatomy, 0.8))
    named = {w.name: e for w, e in zip(method.writers, edits, strict=True)}
    merge = merge_checkpoint(folder, out, named, method.writers)
    expected = families.merged(before.model, method.writers, edits).state_dict()
    found = load(ModelSection(source=str(out), dtype=dtype)).model.state_dict()
    for key, tensor in expected.items():
        assert torch.allclose(found[key].float(), tensor.float(), atol=1e-6, rtol=1e-2), key
    old, new = all_tensors(folder), all_tensors(out)
    assert old.keys() == new.keys()
    for key, tensor in old.items():
        assert new[key].dtype == tensor.dtype
        assert torch.equal(new[key], tensor) == (key not in merge.tensors), key
    return merge


def test_a_tensor_for_each_expert_that_loads_fused(tmp_path):
    folder = families.save(families.model("mixtral"), tmp_path / "m")
    assert any(re.search(r"experts\.3\.w2\.weight", key) for key in all_tensors(folder))
    merge = check_export(folder, tmp_path / "out")
    assert sum("experts" in key for key in merge.tensors) == families.LAYERS * 4


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_fused_on_disk(name, tmp_path):
    model = families.model(name)
    folder = families.save(model, tmp_path / "m")

    def fuse(tensors):
        out = {key: t for key, t in tensors.items() if ".experts." not in key}
        for key, t in model.state_dict().items():
            if ".experts." in key:
                out[key] = t
        return out

    rewrite(folder, fuse)
    merge = check_export(folder, tmp_path / "out")
    assert any(key.endswith("experts.down_proj") for key in merge.tensors)


@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text", "gpt2"])
def test_matrices_stored_as_in_by_out(name, tmp_path):
    folder = families.save(families.model(name), tmp_path / "m")
    loaded = load(ModelSection(source=str(folder), dtype="float32"))
    places = find_tensors(folder, loaded.anatomy.writers)
    component = "mlp.down_proj" if name == "gpt2" else "experts.down_proj"
    chosen = [w for w in loaded.anatomy.writers if w.component == component]
    assert chosen
    assert all(places[w.name].weight.transposed for w in chosen)
    check_export(folder, tmp_path / "out")


def test_experts_with_equal_values_are_told_apart_by_their_place(tmp_path):
    """As where a dense model was made into one with experts."""
    model = families.model("gpt_oss")
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.down_proj[1:] = experts.down_proj[0].clone()
        experts.down_proj_bias[1:] = experts.down_proj_bias[0].clone()
    folder = families.save(model, tmp_path / "m")
    loaded = load(ModelSection(source=str(folder), dtype="float32"))
    for name, place in find_tensors(folder, loaded.anatomy.writers).items():
        if "experts" in name:
            expert = int(name.split(".")[-2])
            assert place.weight.expert == expert
            assert place.bias.expert == expert


@pytest.mark.parametrize("shards", [1, 3])
def test_heads_that_no_class_loads_and_mixed_dtypes(shards, tmp_path):
    folder = families.save(families.model("glm4_moe"), tmp_path / "m")
    last = f"model.layers.{families.LAYERS}."

    def change(tensors):
        out = {}
        for number, (key, t) in enumerate(sorted(tensors.items())):
            out[key] = t.to((torch.float32, torch.bfloat16, torch.float16)[number % 3])
            if key.startswith(f"model.layers.{families.LAYERS - 1}."):
                # A multi-token-prediction layer looks like one more layer of the model.
                name = key.replace(f"model.layers.{families.LAYERS - 1}.", last)
                out[name] = torch.randn_like(t).to(torch.bfloat16)
        return out

    rewrite(folder, change, shards)
    merge = check_export(folder, tmp_path / "out")
    assert any(key.startswith(last) for key in all_tensors(folder))
    assert not any(key.startswith(last) for key in merge.tensors)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("gemma3", "model.language_model.", "language_model.model."),
        ("mistral3", "model.language_model.", "language_model.model."),
        ("llama", "model.", ""),
    ],
)
def test_keys_with_older_names(name, old, new, tmp_path):
    folder = families.save(families.model(name), tmp_path / "m")

    def rename(tensors):
        return {
            new + key.removeprefix(old) if key.startswith(old) else key: t
            for key, t in tensors.items()
        }

    rewrite(folder, rename)
    merge = check_export(folder, tmp_path / "out")
    assert all(key.startswith(new) for key in merge.tensors)


def test_a_changed_expert_is_not_matched(tmp_path):
    folder = families.save(families.model("mixtral"), tmp_path / "m")
    loaded = load(ModelSection(source=str(folder), dtype="float32"))
    loaded.model.model.layers[1].mlp.experts.down_proj[2, 5, 7] += 1
    with pytest.raises(ExportError, match=r"layers\.1\.mlp\.experts\.2\.down_proj"):
        find_tensors(folder, loaded.anatomy.writers)


def test_an_adapter_of_experts_is_refused_before_the_work(tmp_path):
    loaded = families.loaded(families.model("mixtral"))
    anatomy = loaded.anatomy
    adapter = exporter("adapter", ExportSection())
    with pytest.raises(ConfigError, match=r"leave experts\.down_proj out of edit\.components"):
        adapter.check(loaded, anatomy.select())
    adapter.check(loaded, anatomy.select(("attn.o_proj",)))
    method = families.method(anatomy)
    edits = method.edits(families.flat(anatomy))
    named = {w.name: e for w, e in zip(method.writers, edits, strict=True)}
    with pytest.raises(ConfigError, match="fused experts"):
        export_adapter("base", tmp_path / "a", named, method.writers, rank=1)


def test_a_matrix_that_two_layers_share_is_refused():
    from excise.errors import UnknownArchitecture
    from excise.model.anatomy import check_unshared

    writers = list(families.loaded(families.model("llama")).anatomy.writers)
    writers[2] = replace(writers[2], module=writers[0].module)
    with pytest.raises(UnknownArchitecture, match="are one matrix"):
        check_unshared(writers, "llama")
