"""Multimodal models: only the language model is edited; what the towers say of a picture stays."""

from __future__ import annotations

import families
import pytest
import torch
from safetensors import safe_open

from excise.checkpoints.loading import load
from excise.config import EditSection, ModelSection
from excise.export.merging import merge_checkpoint


def picture(name, model):
    """What the model's own method makes of a made-up picture."""
    draw = torch.Generator().manual_seed(0)
    whole = getattr(model, "model", model)
    if name.startswith("qwen"):
        patch = 3 * 2 * 4 * 4
        pixels = torch.rand(16, patch, generator=draw)
        found = whole.get_image_features(pixels, torch.tensor([[1, 4, 4]]))
    elif name == "gemma4":
        pixels = torch.rand(1, 16, 3 * 4 * 4, generator=draw)
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
        found = whole.get_image_features(pixels, places)
    elif name == "mistral3":
        pixels = torch.rand(1, 3, 16, 16, generator=draw)
        found = whole.get_image_features(pixels, image_sizes=torch.tensor([[16, 16]]))
    else:
        found = whole.get_image_features(torch.rand(1, 3, 16, 16, generator=draw))
    return found


def sound(model):
    """What Gemma 4 makes of a made-up clip."""
    clip = torch.rand(1, 48, 128, generator=torch.Generator().manual_seed(1))
    return model.model.get_audio_features(clip, torch.ones(1, 48, dtype=torch.bool))


def tensors(found):
    """All tensors of an output, in order."""
    if isinstance(found, torch.Tensor):
        return [found]
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list | tuple):
        return [t for part in found for t in tensors(part)]
    return []


SEEING = ("gemma3", "gemma4", "qwen3_vl", "qwen3_5", "mistral3", "llama4")


@pytest.mark.parametrize("name", SEEING)
def test_towers_see_and_hear_the_same(name, tmp_path):
    source = families.save(families.model(name), tmp_path / "source")
    before = load(ModelSection(source=str(source), dtype="float32"))
    assert before.anatomy.tower
    assert type(before.model).__name__.endswith("ForConditionalGeneration")
    method = families.method(before.anatomy)
    edits = method.edits(families.flat(before.anatomy))
    named = {w.name: e for w, e in zip(method.writers, edits, strict=True)}
    assert all("language_model" in key for key in named)
    merge = merge_checkpoint(source, tmp_path / "out", named, method.writers)
    after = load(ModelSection(source=str(tmp_path / "out"), dtype="float32"))
    seen = [tensors(picture(name, one.model)) for one in (before, after)]
    if name == "gemma4":
        heard = [tensors(sound(one.model)) for one in (before, after)]
        seen = [a + b for a, b in zip(seen, heard, strict=True)]
    assert sum(t.is_floating_point() for t in seen[0]) >= 1
    for ours, theirs in zip(*seen, strict=True):
        assert torch.equal(ours, theirs)
    towers = 0
    for shard in source.glob("*.safetensors"):
        with safe_open(shard, "pt") as old, safe_open(tmp_path / "out" / shard.name, "pt") as new:
            for key in old.keys():  # noqa: SIM118  (not a dict)
                if "language_model" not in key:
                    towers += 1
                    assert key not in merge.tensors
                    assert torch.equal(old.get_tensor(key), new.get_tensor(key))
    assert towers > 5
    ids = torch.randint(3, 290, (1, 6))
    assert not torch.equal(before.model(ids).logits, after.model(ids).logits)


def test_what_is_not_edited_is_said():
    found = families.loaded(families.model("gemma4")).anatomy
    assert any("towers" in line for line in found.coverage().not_edited)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl", "opt"])
def test_an_adapter_fits_the_language_model(name, tmp_path):
    """Also where towers stand beside it, and where no data row names the writers."""
    from peft import PeftModel

    from excise.checkpoints.discovery import anatomy_of
    from excise.export.adapter import export_adapter

    model = families.model(name)
    method = families.method(anatomy_of(model), EditSection(row_norms="none"))
    edits = method.edits(families.flat(method_anatomy := anatomy_of(model)))
    named = {w.name: e for w, e in zip(method.writers, edits, strict=True) if e is not None}
    alone = families.merged(model, method.writers, edits)
    export_adapter("base", tmp_path / "a", named, method.writers, rank=1)
    ids = torch.tensor([[3, 40, 50, 60]])
    expected = alone(ids).logits
    again = PeftModel.from_pretrained(model, tmp_path / "a").merge_and_unload()
    carried = torch.allclose(again(ids).logits, expected, atol=1e-3)
    assert carried or any(w.bias is not None for w in method.writers)
    assert anatomy_of(again).components == method_anatomy.components
