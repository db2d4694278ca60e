"""Small checkpoints that llama.cpp's converter takes, and greedy tokens of a GGUF."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import builders
import families
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    MixtralConfig,
    MixtralForCausalLM,
)

from excise.config import ModelSection
from excise.loading import resolve

DEMO = resolve(ModelSection(source="demo"))
VOCABULARY = 1024
# Rows that K-quants can hold: a multiple of 256.
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}


def checkpoint(folder: Path, family: str, dtype: Any = torch.float32, **changes: Any) -> Path:
    """A random model of the family with the demo's tokenizer, in forms that the converter knows."""
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": 4} | changes
    if family == "gemma4":
        sizes["vocab_size_per_layer_input"] = VOCABULARY
    if family == "llama":
        sizes["tie_word_embeddings"] = False
    if family == "mixtral":
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        torch.manual_seed(0)
        built = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4))
        model = families.randomised(built).to(dtype)
    else:
        model = builders.model(family, **sizes).to(dtype)
    # With the token itself small in the residual, what the layers write decides what comes next.
    model.get_input_embeddings().weight.mul_(0.05)
    # The converter keeps some tensors in half precision whatever is asked for: no loss in these.
    for parameter in model.parameters():
        parameter.copy_(parameter.half())
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, folder)
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "do_sample": True}
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | sampling))
    if family.startswith(
        "qwen3"
    ):  # its byte-level tokenizers are known by hash; this way round takes any
        write_sentencepiece(folder)
    return folder


def multimodal(folder: Path) -> Path:
    """A Gemma 4 with vision and audio towers, and what its processor's configuration must say."""
    text, own, parts = families.MULTIMODAL["gemma4"]
    plain = {"enable_moe_block": False, "num_experts": None, "top_k_experts": None}
    sizes = {"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY}
    small = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 16}
    small |= {"num_key_value_heads": 2}
    inner = CONFIG_MAPPING[text](**small | own | plain | sizes | {"global_head_dim": 32})
    torch.manual_seed(0)
    whole = CONFIG_MAPPING["gemma4"](text_config=inner.to_dict(), **parts)
    model = families.randomised(AutoModelForImageTextToText.from_config(whole))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, folder)
    means = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(means))
    return folder


def write_sentencepiece(folder: Path) -> None:
    """The tokens of tokenizer.json as a sentencepiece model: the protocol buffer, written by hand."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    out = bytearray()
    for text, _ in sorted(vocabulary.items(), key=lambda item: item[1]):
        kind = 2 if text == "<unk>" else 3 if text.startswith("<") and text.endswith(">") else 1
        piece = text.encode()
        score = b"\x15" + b"\x00\x00\x00\x00"
        body = b"\x0a" + _varint(len(piece)) + piece + score + b"\x18" + bytes([kind])
        out += b"\x0a" + _varint(len(body)) + body
    (folder / "tokenizer.model").write_bytes(bytes(out))


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])
