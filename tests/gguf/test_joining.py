"""One file for Ollama: the language model as it was, and the towers under the names that Ollama reads.

The tables here were read from Ollama's converter and its models' own structures; Ollama itself is not run.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import builders
import families
import gguf_models
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from records import make_record
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from excise.checkpoints.gguf_header import read_gguf
from excise.checkpoints.loading import load
from excise.config import ExportSection, ModelSection
from excise.errors import ConfigError, ExportError
from excise.events import ignore
from excise.export.exporter import EditedModel, exporters
from excise.formats import FORMATS
from excise.gguf import export, joining, llamacpp
from excise.gguf.engine import GgufModel
from excise.gguf.export import export_gguf, plan_gguf
from excise.model.anatomy import describe
from excise.model.edits import Edit

PROMPT = [2, 300, 401, 502, 17, 30, 77, 640]
# What Transformers calls a tensor of Gemma 4's towers, and what Ollama does.
GEMMA4 = {
    "vision_tower.patch_embedder.input_proj.weight": "v.patch_embd.weight",
    "vision_tower.patch_embedder.position_embedding_table": "v.position_embd.weight",
    "vision_tower.encoder.layers.1.input_layernorm.weight": "v.blk.1.ln1.weight",
    "vision_tower.encoder.layers.1.pre_feedforward_layernorm.weight": "v.blk.1.ln2.weight",
    "vision_tower.encoder.layers.1.post_attention_layernorm.weight": "v.blk.1.attn_post_norm.weight",
    "vision_tower.encoder.layers.1.self_attn.o_proj.linear.weight": "v.blk.1.attn_out.weight",
    "vision_tower.encoder.layers.1.mlp.gate_proj.linear.weight": "v.blk.1.ffn_gate.weight",
    "vision_tower.encoder.layers.1.mlp.down_proj.input_max": "v.blk.1.ffn_down.input_max",
    "embed_vision.embedding_projection.weight": "mm.input_projection.weight",
    "embed_audio.embedding_projection.weight": "mm.a.input_projection.weight",
    "audio_tower.output_proj.weight": "mm.a.fc.weight",
    "audio_tower.output_proj.bias": "mm.a.fc.bias",
    "audio_tower.subsample_conv_projection.input_proj_linear.weight": "a.pre_encode.out.weight",
    "audio_tower.subsample_conv_projection.layer1.conv.weight": "a.conv1d.1.weight",
    "audio_tower.subsample_conv_projection.layer0.norm.weight": "a.conv1d.0.norm.weight",
    "audio_tower.layers.1.norm_pre_attn.weight": "a.blk.1.ln1.weight",
    "audio_tower.layers.1.norm_post_attn.weight": "a.blk.1.ln2.weight",
    "audio_tower.layers.1.norm_out.weight": "a.blk.1.layer_pre_norm.weight",
    "audio_tower.layers.1.self_attn.relative_k_proj.weight": "a.blk.1.linear_pos.weight",
    "audio_tower.layers.1.self_attn.post.linear.weight": "a.blk.1.attn_out.weight",
    "audio_tower.layers.1.self_attn.q_proj.output_min": "a.blk.1.attn_q.output_min",
    "audio_tower.layers.1.self_attn.per_dim_scale": "a.blk.1.per_dim_scale.weight",
    "audio_tower.layers.1.lconv1d.depthwise_conv1d.weight": "a.blk.1.conv_dw.weight",
    "audio_tower.layers.1.lconv1d.pre_layer_norm.weight": "a.blk.1.conv_norm.weight",
    "audio_tower.layers.1.lconv1d.conv_norm.weight": "a.blk.1.norm_conv.weight",
    "audio_tower.layers.1.lconv1d.linear_end.linear.weight": "a.blk.1.conv_pw2.weight",
    "audio_tower.layers.1.feed_forward2.ffw_layer_1.linear.weight": "a.blk.1.ffn_up_1.weight",
    "audio_tower.layers.1.feed_forward1.post_layer_norm.weight": "a.blk.1.ffn_post_norm.weight",
}
KEYS4 = {
    "vision.block_count": 2,
    "vision.embedding_length": 16,
    "vision.feed_forward_length": 24,
    "vision.attention.head_count": 2,
    "vision.patch_size": 4,
    "vision.num_channels": 3,
    "vision.projector.scale_factor": 2,
    "vision.attention.layer_norm_epsilon": pytest.approx(1e-6),
    "audio.block_count": 2,
    "audio.embedding_length": 16,
    "audio.feed_forward_length": 64,
    "audio.attention.head_count": 2,
    "audio.attention.layer_norm_epsilon": pytest.approx(1e-6),
    "audio.conv_kernel_size": 5,
}
GEMMA3 = {
    "embeddings.patch_embedding.weight": "v.patch_embedding.weight",
    "embeddings.patch_embedding.bias": "v.patch_embedding.bias",
    "embeddings.position_embedding.weight": "v.position_embedding.weight",
    "post_layernorm.weight": "v.post_layernorm.weight",
    "encoder.layers.0.layer_norm1.weight": "v.blk.0.layer_norm1.weight",
    "encoder.layers.0.layer_norm2.bias": "v.blk.0.layer_norm2.bias",
    "encoder.layers.0.self_attn.q_proj.weight": "v.blk.0.attn_q.weight",
    "encoder.layers.0.self_attn.out_proj.weight": "v.blk.0.attn_output.weight",
    "encoder.layers.0.mlp.fc1.weight": "v.blk.0.mlp.fc1.weight",
    "encoder.layers.0.mlp.fc2.bias": "v.blk.0.mlp.fc2.bias",
}


def values(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {t.name: np.array(t.data) for t in GGUFReader(path).tensors}


def greedy(path: Path) -> tuple[int, ...]:
    with GgufModel(path, 64, None) as model:
        return model.greedy(PROMPT, frozenset(), 16)


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, Any]:
    """The joined file of an edited Gemma 4, the two that it was made of, and the model in memory."""
    root = tmp_path_factory.mktemp("joined")
    folder = gguf_models.multimodal(root / "model")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    writers = describe(model).writers
    draw = torch.Generator().manual_seed(0)
    edits = {
        w.name: Edit(
            0.3 * torch.randn(w.shape[0], 1, generator=draw),
            0.3 * torch.randn(1, w.shape[1], generator=draw),
        )
        for w in writers
    }
    own = joining.join_projector

    def keep(text: Path, projector: Path, *rest: Any) -> None:
        shutil.copy(text, root / "text.gguf")
        shutil.copy(projector, root / "projector.gguf")
        own(text, projector, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "join_projector", keep)
        plan = plan_gguf(ExportSection(quantize=("F32",)))
        done = export_gguf(
            folder,
            root / "out",
            edits,
            writers,
            plan,
            "mm",
            describe=lambda head, name, projector: f"{head.architecture} {name} {projector}",
            join=True,
        )
    (file,) = done.details["files"]
    assert (done.format, file["file"], file["part"]) == ("ollama", "mm-F32.gguf", "model")
    assert done.details["joined"]
    assert sorted(p.name for p in done.path.iterdir()) == ["Modelfile", "mm-F32.gguf"]
    assert (done.path / "Modelfile").read_text() == "gemma4 mm-F32.gguf None"
    return done.path / "mm-F32.gguf", root / "text.gguf", root / "projector.gguf", model


def test_the_language_model_is_the_one_of_the_two_files(joined: Any, tmp_path: Path) -> None:
    file, text, _, _ = joined
    whole, alone = read_gguf(file), read_gguf(text)
    assert {k: v for k, v in whole.keys.items() if k in alone.keys} == alone.keys
    stored, expected = values(file), values(text)
    for name, tensor in expected.items():
        assert whole.tensors[name].type == alone.tensors[name].type
        assert np.array_equal(stored[name], tensor)
    joining.text_part(file, tmp_path / "text.gguf")
    assert values(tmp_path / "text.gguf").keys() == expected.keys()
    assert greedy(tmp_path / "text.gguf") == greedy(text)
    factors = stored["rope_freqs.weight"]
    assert set(factors.tolist()) == {1.0, np.float32(1e30)}


def test_every_tensor_of_the_projector_is_there(joined: Any) -> None:
    """With the same bytes, but for the patch embedding in F16; and the packed bounds besides."""
    file, text, projector, _ = joined
    stored, towers, own = values(file), values(projector), values(text)
    extra = {name: tensor for name, tensor in stored.items() if name not in own}
    assert len(extra) == len(towers) + 1
    layout = joining.layout_of(projector)
    assert layout is not None
    for name, tensor in towers.items():
        found = extra[layout.rename(name)]
        assert found.shape == tensor.shape
        assert np.array_equal(found, tensor.astype(found.dtype))
        assert (found.dtype == tensor.dtype) or name == "v.patch_embd.weight"
    assert read_gguf(file).tensors["v.patch_embd.weight"].type == Type.F16
    assert not [key for key in read_gguf(file).keys if key.startswith("clip.")]


def test_keys_are_those_that_ollama_reads(joined: Any) -> None:
    keys = read_gguf(joined[0]).keys
    assert keys["general.architecture"] == "gemma4"
    found = {
        k.removeprefix("gemma4."): v for k, v in keys.items() if re.search(r"\.(vision|audio)\.", k)
    }
    assert found == KEYS4


def test_names_and_values_are_those_of_ollamas_converter(joined: Any) -> None:
    file, _, _, model = joined
    stored, own = values(file), model.model.state_dict()
    for theirs, name in GEMMA4.items():
        expected = own[theirs].float()
        if name.endswith("per_dim_scale.weight"):
            expected = torch.nn.functional.softplus(expected)
        if name == "v.patch_embd.weight":
            size = model.config.vision_config.patch_size
            expected = expected.view(-1, size, size, 3).permute(0, 3, 1, 2)
        found = torch.from_numpy(stored[name]).float()
        torch.testing.assert_close(found.flatten(), expected.flatten(), atol=1e-3, rtol=1e-3)


def test_the_bounds_are_packed_by_layer_linear_and_end(joined: Any) -> None:
    file, _, _, model = joined
    found = values(file)["v.clamp_data"]
    own = model.model.vision_tower.state_dict()
    linears = [f"self_attn.{one}_proj" for one in "qkvo"]
    linears += [f"mlp.{one}_proj" for one in ("gate", "up", "down")]
    expected = [
        float(own[f"encoder.layers.{layer}.{linear}.{end}"])
        for layer in range(2)
        for linear in linears
        for end in ("input_min", "input_max", "output_min", "output_max")
    ]
    assert found[:-4].tolist() == pytest.approx(expected)
    assert len(found) == (2 * 7 + 1) * 4
    # The projection has no bounds here: what stands for them must clamp nothing.
    assert found[-4] == found[-2] < -1e38
    assert found[-3] == found[-1] > 1e38


def test_gemma_3_has_names_of_its_own(tmp_path: Path) -> None:
    text, more, parts = families.MULTIMODAL["gemma3"]
    small = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16}
    inner = CONFIG_MAPPING[text](**small | {"num_key_value_heads": 2} | more)
    torch.manual_seed(0)
    config = CONFIG_MAPPING["gemma3"](text_config=inner.to_dict(), **parts)
    model = families.randomised(AutoModelForImageTextToText.from_config(config))
    model.save_pretrained(tmp_path / "model")
    weights = (
        tmp_path / "model" / "model.safetensors"
    )  # the tower's names as published ones have them
    named = {
        k.replace("vision_tower.", "vision_tower.vision_model."): t
        for k, t in load_file(weights).items()
    }
    save_file(named, weights, metadata={"format": "pt"})
    builders.tokenizer().save_pretrained(tmp_path / "model")
    means = '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "image_seq_length": 4}'
    (tmp_path / "model" / "preprocessor_config.json").write_text(means)
    tools = llamacpp.find_tools(None)
    plain, projector = llamacpp.plain_copy(tmp_path / "model", tmp_path / "p"), tmp_path / "mm.gguf"
    llamacpp.convert(tools, plain, projector, "F32", "Tiny", mmproj=True)
    gguf_models.gguf_file(tmp_path / "text.gguf", architecture="gemma3")
    layout = joining.layout_of(projector)
    assert layout is not None
    joining.join_projector(
        tmp_path / "text.gguf", projector, layout, config.to_dict(), tmp_path / "out.gguf"
    )
    stored, tower = values(tmp_path / "out.gguf"), model.model.vision_tower.state_dict()
    tower = {name.removeprefix("vision_model."): tensor for name, tensor in tower.items()}
    for theirs, name in GEMMA3.items():
        found = torch.from_numpy(stored[name]).float()
        torch.testing.assert_close(
            found.flatten(), tower[theirs].flatten().float(), atol=1e-3, rtol=1e-3
        )
    own = model.model.multi_modal_projector
    norm = torch.from_numpy(stored["mm.mm_soft_emb_norm.weight"])
    torch.testing.assert_close(norm, 1 + own.mm_soft_emb_norm.weight.float())
    assert stored["mm.mm_input_projection.weight"].shape == tuple(
        own.mm_input_projection_weight.shape
    )
    head = read_gguf(tmp_path / "out.gguf")
    vision = model.config.vision_config
    expected = {
        "block_count": vision.num_hidden_layers,
        "embedding_length": vision.hidden_size,
        "feed_forward_length": vision.intermediate_size,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_channels": 3,
        "attention.head_count": vision.num_attention_heads,
        "attention.layer_norm_epsilon": pytest.approx(1e-6),
    }
    begin = "gemma3.vision."
    assert {
        k.removeprefix(begin): v for k, v in head.keys.items() if k.startswith(begin)
    } == expected
    assert head.keys["gemma3.mm.tokens_per_image"] == 4
    with pytest.raises(ExportError, match="both hold "):
        joining.join_projector(
            tmp_path / "out.gguf", projector, layout, config.to_dict(), tmp_path / "twice.gguf"
        )
    assert not (tmp_path / "twice.gguf").exists()


@pytest.mark.parametrize("split", [{}, {"split_max_tensors": 20}])
def test_a_gguf_that_is_the_model_is_patched_itself(tmp_path: Path, split: dict[str, int]) -> None:
    """Its own types, without another flag; every part of a split one."""
    gguf_models.gguf_file(tmp_path / "tiny-Q8_0.gguf", **split)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 1 or not split
    loaded = load(ModelSection(source=str(parts[-1]), dtype="float32"))
    writers = loaded.anatomy.writers
    left = 0.3 * torch.ones(writers[0].shape[0], 1)
    edits = [Edit(left, 0.3 * torch.ones(1, w.shape[1])) if w.layer else None for w in writers]
    (maker,) = exporters(ExportSection(), ["gguf"])
    maker.check(loaded, writers)
    edited = EditedModel.of(make_record(), loaded, writers, edits)
    done = maker.write(edited, tmp_path / "out", {}, ignore)
    assert [one["type"] for one in done.details["files"]] == ["Q8_0"] * len(parts)
    changed = set()
    for part in parts:
        before, after = read_gguf(part), read_gguf(done.path / f"edited-{part.name}")
        assert (after.tensors, after.keys) == (before.tensors, before.keys)
        old, new = values(before.path), values(after.path)
        changed |= {name for name in old if not np.array_equal(old[name], new[name])}
    assert changed == set(done.details["tensors"])
    assert len(changed) == sum(edit is not None for edit in edits)


def test_other_projectors_have_no_such_layout(tmp_path: Path) -> None:
    gguf_models.gguf_file(tmp_path / "a.gguf")
    assert joining.layout_of(tmp_path / "a.gguf") is None


def test_a_file_to_patch_is_for_another_format() -> None:
    section = ExportSection(from_gguf="base.gguf")
    assert "from_gguf" not in FORMATS["ollama"].options
    with pytest.raises(ConfigError, match="--from-gguf"):
        exporters(section, ["ollama"])
