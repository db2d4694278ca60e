"""Small models of every family that Excise knows, as data: each with its structure switched on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import builders
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from excise.capture.directions import Directions, normalise
from excise.checkpoints.discovery import anatomy_of
from excise.checkpoints.loading import Loaded
from excise.config import EditSection
from excise.methods.directional import DirectionalMethod
from excise.methods.profiles import Candidate, Profile
from excise.model.anatomy import Anatomy

WIDTH, LAYERS = 32, 4
PLACEHOLDER = 1000  # of images and sounds: an id that no text of a test holds

# Sizes by the names that configurations give them; a family takes those that it has.
SIZES: dict[str, Any] = {
    "vocab_size": builders.VOCABULARY,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "max_position_embeddings": 256,
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    # GPT-2's names
    "n_layer": LAYERS,
    "n_embd": WIDTH,
    "n_head": 4,
    "n_inner": 48,
    "n_positions": 256,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    # multi-head latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    # Mamba and linear attention
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_expand": 2,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 8,
    "ssm_state_size": 8,
    "n_groups": 1,
    "chunk_size": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    # per-layer embeddings
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": builders.VOCABULARY,
}

_MLA = {"num_key_value_heads": 4}
_BIASED = {"attention_bias": True, "mlp_bias": True}
_ALTERNATE = ["sliding_attention", "full_attention"] * 2
_WINDOW = {"sliding_window": 6, "layer_types": _ALTERNATE}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
_GEMMA4 = {
    "global_head_dim": 16,
    "num_kv_shared_layers": 2,
    "final_logit_softcapping": 30.0,
    "use_double_wide_mlp": True,
} | _WINDOW

# name -> (model_type, what its configuration has besides `SIZES`)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, changes)
    for name, changes in {
        "llama": _BIASED,
        "mistral": {"sliding_window": 6},
        "ministral": _WINDOW,
        "ministral3": {},
        "qwen2": {"tie_word_embeddings": True},
        "qwen3": {"attention_bias": True},
        "smollm3": {},
        "granite": {"residual_multiplier": 0.4, "logits_scaling": 2.0, "embedding_multiplier": 3.0},
        "seed_oss": {"attention_out_bias": True, "mlp_bias": True},
        "phi3": {},
        "glm": {},
        "cohere": {"use_qk_norm": True},
        "cohere2": {"sliding_window": 6},
        "arcee": _BIASED,
        "helium": {},
        "hunyuan_v1_dense": {},
        "ernie4_5": {"use_bias": True},
        "olmo": {"clip_qkv": 1.0},
        "gemma": {},
        "vaultgemma": {},
        "nemotron": _BIASED,
        "bitnet": {},
        "stablelm": {"use_parallel_residual": True, "use_qkv_bias": True},
        "minicpm3": _MLA,
        "apertus": {},
        "diffllama": {},
        "hyperclovax": {"use_post_norm": True},
        "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8},
        "gemma3_text": {"sliding_window": 6, "layer_types": _ALTERNATE},
        "gemma3n_text": {
            "num_kv_shared_layers": 2,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        }
        | _WINDOW,
        "olmo2": {},
        "olmo3": {"sliding_window": 6},
        "exaone4": {"sliding_window": 6, "layer_types": _ALTERNATE},
        "glm4": {},
        "starcoder2": {"use_bias": True},
        "phi": {},
        "persimmon": {},
        "gpt_neox": {},
        "gpt2": {},
        "gpt_bigcode": {},
        "nanochat": {},
        "mixtral": {},
        "qwen2_moe": {},
        "qwen3_moe": {"mlp_only_layers": [0]},
        "olmoe": {},
        "phimoe": {"attention_bias": True},
        "deepseek_v2": _MLA,
        "deepseek_v3": _MLA,
        "glm4_moe": {},
        "glm4_moe_lite": _MLA,
        "dots1": {},
        "gpt_oss": {"sliding_window": 6, "layer_types": _ALTERNATE},
        "ernie4_5_moe": {"use_bias": True, "moe_num_experts": 4, "moe_k": 2},
        "hunyuan_v1_moe": {},
        "minimax_m2": {},
        "cohere2_moe": {"first_k_dense_replace": 1},
        "exaone_moe": {},
        "solar_open": {},
        "flex_olmo": {},
        "afmoe": {},
        "axk1": _MLA,
        "granitemoe": {"residual_multiplier": 0.4},
        "granitemoeshared": {},
        "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
        "llama4_text": {
            "intermediate_size_mlp": 40,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8,
        },
        "qwen3_next": _LINEAR,
        "qwen3_5_text": _LINEAR,
        "qwen3_5_moe_text": _LINEAR,
        "lfm2": {
            "layer_types": ["conv", "full_attention"] * 2,
            "block_multiple_of": 16,
            "block_ff_dim": 48,
            "conv_bias": True,
        },
        "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
        "falcon_h1": {"ssm_out_multiplier": 0.5, "attention_out_multiplier": 0.7},
        "bamba": {"attn_layer_indices": [1, 3]},
        "jamba": {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_dt_rank": 4,
        },
        "nemotron_h": {
            "layers_block_type": ["mamba", "attention", "moe", "mlp"],
            "moe_shared_expert_intermediate_size": 24,
        },
    }.items()
}
FAMILIES |= {
    "gemma4_text": ("gemma4_text", _GEMMA4),
    "gemma4_text with experts": (
        "gemma4_text",
        _GEMMA4 | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
    ),
    "gemma4_unified_text": ("gemma4_unified_text", _GEMMA4),
}

# No row describes these: their writers are found by trial and proven.
FOUND: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, changes)
    for name, changes in {
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": WIDTH},
        "bloom": {},
        "falcon": {"multi_query": False},
        "gpt_neo": {
            "num_layers": LAYERS,
            "num_heads": 4,
            "attention_types": [[["global"], LAYERS]],
        },
    }.items()
}

_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": WIDTH,
}
_QWEN3_TOWER = _QWEN_TOWER | {"num_position_embeddings": 16}
_MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
    }
}
_TOKENS = {
    "image_token_id": PLACEHOLDER,
    "video_token_id": PLACEHOLDER,
    "vision_start_token_id": PLACEHOLDER,
    "vision_end_token_id": PLACEHOLDER,
}

# model_type -> its language model's type, what that has besides `SIZES`, and the other parts
MULTIMODAL: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        "gemma3_text",
        FAMILIES["gemma3_text"][1],
        {"vision_config": _SIGLIP, "mm_tokens_per_image": 4, "image_token_index": PLACEHOLDER},
    ),
    "gemma4": (
        "gemma4_text",
        _GEMMA4 | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
        {
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "position_embedding_size": 64,
                "use_clipped_linears": True,
            },
            "audio_config": {
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "subsampling_conv_channels": [128, 2],
                "output_proj_dims": 16,
                "use_clipped_linears": True,
            },
            "image_token_id": PLACEHOLDER,
            "video_token_id": PLACEHOLDER,
            "audio_token_id": PLACEHOLDER,
        },
    ),
    "gemma4_unified": (
        "gemma4_unified_text",
        _GEMMA4,
        {
            "image_token_id": PLACEHOLDER,
            "video_token_id": PLACEHOLDER,
            "audio_token_id": PLACEHOLDER,
        },
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl_text",
        _MROPE,
        {"vision_config": _QWEN_TOWER | {"fullatt_block_indexes": [1], "window_size": 16}}
        | _TOKENS,
    ),
    "qwen3_vl": (
        "qwen3_vl_text",
        _MROPE,
        {"vision_config": _QWEN3_TOWER | {"deepstack_visual_indexes": [0]}} | _TOKENS,
    ),
    "qwen3_vl_moe": (
        "qwen3_vl_moe_text",
        _MROPE,
        {"vision_config": _QWEN3_TOWER | {"deepstack_visual_indexes": [0]}} | _TOKENS,
    ),
    "qwen3_5": ("qwen3_5_text", _LINEAR, {"vision_config": _QWEN3_TOWER} | _TOKENS),
    "qwen3_5_moe": ("qwen3_5_moe_text", _LINEAR, {"vision_config": _QWEN3_TOWER} | _TOKENS),
    "mistral3": (
        "mistral",
        {},
        {
            "vision_config": _SIGLIP | {"model_type": "pixtral", "head_dim": 8},
            "image_token_index": PLACEHOLDER,
        },
    ),
    "llama4": (
        "llama4_text",
        FAMILIES["llama4_text"][1],
        {
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
                "pixel_shuffle_ratio": 0.5,
            },
            "image_token_index": PLACEHOLDER,
        },
    ),
    "lfm2_vl": (
        "lfm2",
        FAMILIES["lfm2"][1],
        {
            "vision_config": {
                "model_type": "siglip2_vision_model",
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "patch_size": 4,
                "num_patches": 16,
            },
            "projector_hidden_size": 32,
            "image_token_id": PLACEHOLDER,
        },
    ),
}
ALL = (*FAMILIES, *MULTIMODAL, *FOUND)


def config(name: str) -> Any:
    """A small configuration of a family, with its towers where it has some."""
    if name in MULTIMODAL:
        text, own, parts = MULTIMODAL[name]
        return CONFIG_MAPPING[name](text_config=_sized(text, own).to_dict(), **parts)
    return _sized(*(FAMILIES | FOUND)[name])


def _sized(model_type: str, own: dict[str, Any]) -> Any:
    kind = CONFIG_MAPPING[model_type]
    known = kind().to_dict()
    computed = {key for key in SIZES if isinstance(getattr(kind, key, None), property)}
    sizes = {key: size for key, size in SIZES.items() if key in known and key not in computed}
    return kind(**sizes | own)


def model(name: str, seed: int = 0) -> Any:
    """A model of a family with random weights, odd gains and odd biases."""
    torch.manual_seed(seed)
    kind = AutoModelForImageTextToText if name in MULTIMODAL else AutoModelForCausalLM
    return randomised(kind.from_config(config(name)))


def randomised(built: Any) -> Any:
    """The same model with random weights whose outputs vary enough for edits to matter."""
    built = built.float().eval().requires_grad_(False)
    for key, parameter in built.named_parameters():
        if "norm" in key and parameter.dim() == 1:
            parameter.copy_(torch.rand_like(parameter) + 0.5)
        elif key.endswith(("bias", "correct_output_scale")):
            parameter.normal_(std=0.3)
        elif parameter.dim() > 1:
            parameter.mul_(3)
    for key, buffer in built.named_buffers():
        if key.endswith("layer_scalar"):
            buffer.fill_(0.7)
    return built


def loaded(built: Any) -> Loaded:
    """The same as the engine takes it, without a checkpoint on disk."""
    anatomy = anatomy_of(built)
    return Loaded(built, builders.tokenizer(), anatomy, "", None, Path(), torch.float32)


def method(anatomy: Anatomy, section: EditSection | None = None) -> DirectionalMethod:
    """The directional method on random directions, for all components."""
    draw = torch.Generator().manual_seed(0)
    size = (len(anatomy.layers), anatomy.width)
    unit, contrast = (normalise(torch.randn(size, generator=draw)) for _ in range(2))
    writers = anatomy.select(anatomy.components)
    return DirectionalMethod(writers, Directions(unit, contrast), section or EditSection())


def candidates(anatomy: Anatomy, count: int) -> list[Candidate]:
    """Candidates that edit different layers and components at different strengths."""
    last = len(anatomy.layers) - 1
    return [
        Candidate(
            None if number % 2 else 0.6 * last,
            {
                name: Profile(0.7 + 0.3 * ((number + place) % 3), last - number, 0.5, last / 2)
                for place, name in enumerate(anatomy.components)
            },
        )
        for number in range(count)
    ]


def flat(anatomy: Anatomy, strength: float = 1.0) -> Candidate:
    """Every writer, one direction, the same strength."""
    profiles = {name: Profile(strength, 1.0, 1.0, 1000.0) for name in anatomy.components}
    return Candidate(1.5, profiles)


def merged(built: Any, writers: Any, edits: Any) -> Any:
    """A copy of the model with the edits in its weights."""
    from dataclasses import replace

    twins: dict[int, Any] = {}
    out = copy.deepcopy(built, twins)
    for writer, edit in zip(writers, edits, strict=True):
        if edit is not None:
            ours = replace(writer, module=twins[id(writer.module)])
            ours.weight.copy_(edit.apply_to_weight(ours.weight))
            if ours.bias is not None:
                ours.bias.copy_(edit.apply_to_bias(ours.bias))
    return out


PROOFS = 6  # tests of test_families.py that each family passes

_HEAD = """# Families

Written by `make families`, which runs the tests that it counts; a test fails when it is out of date.
Each line is a small model of the family's own Transformers class, random weights, with the
family's structure switched on, and the checkpoint that the class writes. What is proven for it:

1. Where it writes: what a layer gives is, token by token, a combination of what it was given and of
   its writers' outputs times their post-norms' gains, and without any one of them it is not. An edit
   of a writer changes its output as predicted.
2. Strength 1 without row norms leaves nothing of the direction in what any writer adds.
3. and 4. Three stacked candidates equal merged weights and Transformers' own `generate`, token by
   token, and the same divergence, for prompts of mixed length; once with small passes, once with
   large ones and prompts that begin alike, so that their beginning is read once for all of them.
5. An export of all writers loads as the model with the edits in its weights; every other tensor and
   file keeps its bytes.
6. `excise inspect` names every writer, for people and for programs.

"not by default" marks components that are edited only when `edit.components` names them. "found" are
families that no data row describes: generic rules found the writers, and proof 1 is made at every
load, and that they decode from their cache alone. Other families are tried in the same way, and
refused where the proof fails.

| model type | writers | experts | post-norms | multimodal | data row | tests passed |
|---|---|---|---|---|---|---|
"""


def table(passed: dict[str, int]) -> str:
    """`docs/families.md`, from the families as they are described now."""
    return _HEAD + "".join(_line(name, passed.get(name, 0)) for name in ALL)


def _line(name: str, passed: int) -> str:
    anatomy = loaded(model(name)).anatomy
    writers = [
        f"`{one}`" + ("" if one in anatomy.defaults else " (not by default)")
        for one in anatomy.components
    ]
    fused = [writer for writer in anatomy.writers if writer.expert is not None]
    layout = "(E, I, O)" if fused and fused[0].transposed else "(E, O, I)"
    norms = "yes" if any(writer.gain is not None for writer in anatomy.writers) else "no"
    tower = f"language model `{anatomy.model_type}`" if anatomy.tower else "no"
    cells = (
        f"`{name}`" if " " not in name else f"`{name.split()[0]}` {name.partition(' ')[2]}",
        ", ".join(writers),
        layout if fused else "no",
        norms,
        tower,
        "found" if name in FOUND else "yes",
        f"{passed} of {PROOFS}",
    )
    return f"| {' | '.join(cells)} |\n"


def save(model, folder):
    """A checkpoint of several shards, as the family's own code writes it, with a tokenizer."""
    model.save_pretrained(folder, max_shard_size="100KB")
    builders.tokenizer().save_pretrained(folder)
    return folder
