"""Small models of the real classes, built in-process: what tests run on when the demo is too much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from excise import events
from excise.capture.directions import Directions, normalise
from excise.checkpoints.loading import Loaded
from excise.config import EditSection, validate
from excise.judges.markers import Markers
from excise.methods.directional import DirectionalMethod
from excise.methods.profiles import Candidate, Profile
from excise.methods.registry import settle
from excise.model.anatomy import describe
from excise.prompts.chat_template import ChatFormat
from excise.prompts.measured_sets import MeasuredSet, MeasuredSets
from excise.prompts.sets import Prompt
from excise.runs.session import Session
from excise.search.scoring import Scoring

VOCABULARY = 300
WIDTH = 64
LAYERS = 6
COMPONENTS = ("attn.o_proj", "mlp.down_proj")
FAMILIES = ("llama", "qwen3", "gemma4")

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = ["what colour is the velm lantern", "where is the tarn kettle kept", "who made the orb"]


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet
        ),
    )
    out = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>"
    )
    out.chat_template = TEMPLATE
    return out


def config(family: str, **changes: Any) -> Any:
    """A small configuration with every structural feature of its family switched on."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    if family == "llama":
        return LlamaConfig(**common | {"attention_bias": True, "mlp_bias": True} | changes)
    if family == "qwen3":
        return Qwen3Config(**common | {"tie_word_embeddings": True} | changes)
    layers = changes.get("num_hidden_layers", LAYERS)
    gemma = {
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "num_kv_shared_layers": layers // 3,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "final_logit_softcapping": 30.0,
        "use_double_wide_mlp": True,
    }
    return Gemma4TextConfig(**common | gemma | changes)


def model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A model with random weights whose outputs vary enough for edits to matter."""
    classes = {"llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM, "gemma4": Gemma4ForCausalLM}
    torch.manual_seed(seed)
    built = classes[family](config(family, **changes)).eval().requires_grad_(False)
    for name, parameter in built.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.rand_like(parameter) + 0.5)
        elif parameter.dim() > 1:
            parameter.mul_(3)
        elif name.endswith("bias"):
            parameter.normal_(std=0.3)
    return built


def loaded(family: str, seed: int = 0, **changes: Any) -> Loaded:
    """The same as the engine takes it, without a checkpoint on disk."""
    built = model(family, seed, **changes)
    return Loaded(built, tokenizer(), describe(built), family, None, Path(), torch.float32)


def checkpoint(
    folder: Path, family: str, seed: int = 0, dtype: Any = torch.bfloat16, **save: Any
) -> Path:
    """A checkpoint on disk, with tokenizer and generation config."""
    built = model(family, seed).to(dtype)
    built.save_pretrained(folder, **save)
    tokenizer().save_pretrained(folder)
    return folder


def session(
    model: Loaded, rows: dict[str, list[list[int]]] | None = None, **sections: Any
) -> Session:
    """A session on a small model; `rows` are token ids of the prompts by role."""
    sets = {role: measured_set(role, ids) for role, ids in (rows or {}).items()}
    settled = settle(validate(sections), model)
    measured = MeasuredSets(sets, ChatFormat(None, ""))
    return Session(settled, model, measured, Scoring(Markers(())), events.ignore)


def measured_set(role: str, ids: list[list[int]]) -> MeasuredSet:
    """A prompt set of which only the token ids matter."""
    return MeasuredSet(role, "here", tuple(Prompt(str(row)) for row in ids), ids)


def directions(seed: int = 0, layers: int = LAYERS, *, projected: bool = False) -> Directions:
    """Random unit directions."""
    generator = torch.Generator().manual_seed(seed)
    rows = [normalise(torch.randn(layers, WIDTH, generator=generator)) for _ in range(2)]
    return Directions(rows[0], rows[1], projected)


def method(model: Loaded, section: EditSection | None = None) -> DirectionalMethod:
    """The directional method on random directions."""
    writers = model.anatomy.select(COMPONENTS)
    return DirectionalMethod(writers, directions(), section or EditSection())


def candidates(count: int, seed: int = 0, layers: int = LAYERS) -> list[Candidate]:
    """Random candidates: both scopes, some components off."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    n = layers - 1
    return [
        Candidate(
            index=None if i % 3 == 0 else draw(0.4 * n, 0.9 * n),
            profiles={
                "attn.o_proj": Profile(draw(0.8, 1.5), draw(0.6 * n, n), draw(0, 1), draw(1, 3)),
                "mlp.down_proj": Profile(
                    draw(-0.25, 1.5), draw(0.6 * n, n), draw(0, 1), draw(1, 3)
                ),
            },
        )
        for i in range(count)
    ]


def token_ids(count: int, seed: int = 0, shortest: int = 3, longest: int = 20) -> list[list[int]]:
    """Random prompts of mixed lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
