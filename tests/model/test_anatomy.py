"""Where writers are, what gains they pass, and what is said of those that nobody edits."""

from __future__ import annotations

import builders
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import XGLMConfig, XGLMForCausalLM

from excise.errors import ConfigError, UnknownArchitecture
from excise.model import anatomy
from excise.model.anatomy import (
    ArchitectureRow,
    WriterRow,
    architectures,
    describe,
    row_for,
)

WRITERS = {
    "llama": {"attn.o_proj": "self_attn.o_proj", "mlp.down_proj": "mlp.down_proj"},
    "qwen3": {"attn.o_proj": "self_attn.o_proj", "mlp.down_proj": "mlp.down_proj"},
    "gemma4": {
        "attn.o_proj": "self_attn.o_proj",
        "mlp.down_proj": "mlp.down_proj",
        "ple.projection": "per_layer_projection",
    },
}


def moe(**changes):
    """Gemma 4 with experts: two norms in a chain, one per branch and one after the sum."""
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
    return builders.model("gemma4", moe_intermediate_size=32, **experts, **changes)


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_the_writers_of_each_family(family):
    model = builders.model(family)
    found = describe(model)
    assert len(found.layers) == builders.LAYERS
    assert found.width == builders.WIDTH
    assert found.components == tuple(WRITERS[family])
    assert found.model_type == model.config.model_type
    assert found.backbone is model.model
    expected = [
        (component, layer, f"model.layers.{layer}.{module}")
        for layer in range(builders.LAYERS)
        for component, module in WRITERS[family].items()
    ]
    assert [(w.component, w.layer, w.name) for w in found.writers] == expected
    for writer in found.writers:
        assert writer.module is model.get_submodule(writer.name)
        assert writer.module.weight.shape[0] == builders.WIDTH
        assert writer.key == f"{writer.component}@{writer.layer}"


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_writers_are_all_that_is_added_to_the_residual(family):
    """With every writer silenced, what comes out of the last layer is what went into the first."""
    model = builders.model(family)
    found = describe(model)
    for writer in found.writers:
        writer.module.weight.zero_()
        if writer.module.bias is not None:
            writer.module.bias.zero_()
    states = {}
    found.layers[0].register_forward_pre_hook(
        lambda _m, args, kwargs: states.__setitem__("in", args[0].clone()), with_kwargs=True
    )
    found.layers[-1].register_forward_hook(lambda _m, _a, out: states.__setitem__("out", out))
    model(torch.tensor(builders.token_ids(1, 3)))
    assert torch.equal(states["in"], states["out"])


def test_gains_are_the_post_norms_weights():
    model = builders.model("gemma4")
    norms = {
        "attn.o_proj": "post_attention_layernorm",
        "mlp.down_proj": "post_feedforward_layernorm",
        "ple.projection": "post_per_layer_input_norm",
    }
    for writer in describe(model).writers:
        norm = model.model.layers[writer.layer].get_submodule(norms[writer.component])
        assert torch.equal(writer.gain, norm.weight.float())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_without_post_norms_there_is_no_gain(family):
    assert all(writer.gain is None for writer in describe(builders.model(family)).writers)


@pytest.mark.parametrize("gain", ["weight", "1+weight"])
def test_gains_multiply_along_a_chain_of_norms(gain, monkeypatch):
    names = ("post_feedforward_layernorm_1", "post_feedforward_layernorm")
    row = ArchitectureRow(
        model_types=("gemma4_text",),
        backbone="model",
        layers="model.layers",
        gain=gain,
        writers=(WriterRow(component="mlp", module="mlp.down_proj", post_norms=names),),
    )
    monkeypatch.setattr(anatomy, "architectures", lambda: {"gemma4_text": row})
    model = moe()
    found = describe(model)
    assert found.skippable == builders.LAYERS
    plus = 1.0 if gain == "1+weight" else 0.0
    for writer in found.writers:
        layer = model.model.layers[writer.layer]
        weights = [layer.get_submodule(name).weight + plus for name in names]
        assert torch.allclose(writer.gain, weights[0] * weights[1])


def test_experts_are_a_component_with_a_chain_of_gains():
    found = describe(moe())
    coverage = found.coverage()
    assert "experts.down_proj: 24 matrices, layers 0-5, 4 experts each" in coverage.edited
    layer = found.layers[0]
    last = layer.post_feedforward_layernorm.weight
    by_key = {w.key: w for w in found.writers}
    dense = layer.post_feedforward_layernorm_1.weight * last
    assert torch.allclose(by_key["mlp.down_proj@0"].gain, dense)
    expert = by_key["experts.down_proj@0.3"]
    assert torch.allclose(expert.gain, layer.post_feedforward_layernorm_2.weight * last)
    assert torch.equal(expert.weight, layer.experts.down_proj[3])
    assert expert.name == "model.layers.0.experts.3.down_proj"


def test_an_optional_writer_may_be_missing():
    found = describe(builders.model("gemma4", hidden_size_per_layer_input=0))
    assert found.components == builders.COMPONENTS
    assert len(found.writers) == 2 * builders.LAYERS


def test_a_writer_that_is_not_optional_may_not():
    model = builders.model("llama")
    del model.model.layers[2].mlp.down_proj
    with pytest.raises(UnknownArchitecture, match=r"'llama'.*mlp\.down_proj"):
        describe(model)


def test_a_writer_that_is_no_matrix():
    """Named in full: an adapter's Linear is no Linear of torch's."""
    model = builders.model("llama")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"])).base_model.model
    with pytest.raises(
        UnknownArchitecture, match=r"down_proj is a peft\.tuners\S+\.Linear, not a torch"
    ):
        describe(adapted)


def test_an_unknown_model_type_says_where_the_known_ones_are():
    small = XGLMConfig(num_layers=1, d_model=8, attention_heads=2, vocab_size=10, ffn_dim=8)
    with pytest.raises(UnknownArchitecture, match="'xglm'") as error:
        describe(XGLMForCausalLM(small))
    assert "ARCHITECTURE.md" in str(error.value)
    assert "docs/families.md" in str(error.value)


def test_every_architecture_file_is_read():
    assert {"llama", "qwen3", "gemma4_text"} <= set(architectures())
    for name, row in architectures().items():
        assert row_for(name) is row
        assert name in row.model_types
        components = [writer.component for writer in row.writers]
        assert len(set(components)) == len(components)
        assert "attn.o_proj" in components
        assert any(writer.default for writer in row.writers)


def test_select_keeps_the_order_of_the_model():
    found = describe(builders.model("gemma4"))
    chosen = found.select(("ple.projection", "attn.o_proj"))
    assert [w.key for w in chosen[:4]] == [
        "attn.o_proj@0", "ple.projection@0", "attn.o_proj@1", "ple.projection@1",
    ]  # fmt: skip
    assert len(chosen) == 2 * builders.LAYERS


def test_an_unknown_component_names_those_there_are():
    found = describe(builders.model("llama"))
    with pytest.raises(ConfigError, match=r"no component 'ple\.projection'") as error:
        found.select(("attn.o_proj", "ple.projection"))
    assert "attn.o_proj, mlp.down_proj" in str(error.value)


def test_coverage_names_what_is_edited_and_what_is_not():
    found = describe(builders.model("gemma4"))
    coverage = found.coverage(("mlp.down_proj", "attn.o_proj"))
    assert coverage.edited == (
        "attn.o_proj: 6 matrices, layers 0-5",
        "mlp.down_proj: 6 matrices, layers 0-5",
    )
    assert coverage.not_edited == (
        "embedding: not a writer of a layer",
        "ple.projection: 6 matrices, layers 0-5 (name it in edit.components to edit it)",
    )
    everything = found.coverage(found.components)
    assert len(everything.edited) == 3
    assert everything.not_edited == ("embedding: not a writer of a layer",)
    assert found.coverage() == coverage


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([0], "0"), ([0, 1, 2, 5], "0-2, 5"), ([7, 3, 4, 0], "0, 3-4, 7"), ([1, 3, 5], "1, 3, 5")],
)
def test_spans(numbers, text):
    assert anatomy.spans(numbers) == text


@pytest.mark.parametrize(
    ("family", "shared", "skippable"),
    [("llama", None, 6), ("qwen3", None, 6), ("gemma4", 0, 6), ("gemma4", 2, 2), ("gemma4", 4, 0)],
)
def test_layers_whose_keys_and_values_others_use_cannot_be_skipped(family, shared, skippable):
    changes = {} if shared is None else {"num_kv_shared_layers": shared}
    model = builders.model(family, **changes)
    assert describe(model).skippable == skippable
