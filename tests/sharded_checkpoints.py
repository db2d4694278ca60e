"""Small checkpoints as real ones lie on the disk, random edits of them, and the edits in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from excise.model.anatomy import Writer
from excise.model.edits import Edit

_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _gemma() -> nn.Module:
    more = {
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": 16,
    }
    return Gemma4ForCausalLM(Gemma4TextConfig(**_SMALL, **more))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gemma4": _gemma,
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SMALL, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SMALL)),
    "biased": lambda: LlamaForCausalLM(LlamaConfig(**_SMALL, attention_bias=True, mlp_bias=True)),
    "conv1d": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4)),
}
BIASED = ("biased", "conv1d")


def make_checkpoint(folder: Path, kind: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A checkpoint of several shards with the files that real ones have."""
    torch.manual_seed(len(kind))
    model = MODELS[kind]()
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer.json").write_text('{"model": "ä"}', encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("the source's card")
    (folder / "figures").mkdir()
    (folder / "figures" / "loss.png").write_bytes(bytes(range(256)))
    return folder


def load(folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def random_edits(
    writers: tuple[Writer, ...], rank: int = 1, *, scale: bool = True
) -> dict[str, Edit]:
    """An edit for every writer; a shift where the writer has a bias."""
    draw = torch.Generator().manual_seed(rank)
    edits = {}
    for writer in writers:
        o, i = writer.shape
        edits[writer.name] = Edit(
            left=0.3 * torch.randn(o, rank, generator=draw),
            right=0.3 * torch.randn(rank, i, generator=draw),
            scale=1 + 0.1 * torch.randn(o, generator=draw) if scale else None,
            shift=None if writer.module.bias is None else torch.randn(o, generator=draw),
        )
    return edits


def apply_in_memory(model: Any, edits: dict[str, Edit]) -> Any:
    for name, edit in edits.items():
        module = model.get_submodule(name)
        weight = module.weight.data
        if isinstance(module, Conv1D):
            module.weight.data = edit.apply_to_weight(weight.mT).mT.to(weight.dtype)
        else:
            module.weight.data = edit.apply_to_weight(weight).to(weight.dtype)
        if module.bias is not None:
            module.bias.data = edit.apply_to_bias(module.bias.data).to(module.bias.dtype)
    return model
