"""Small checkpoints that llama.cpp's converter takes, and greedy tokens of a GGUF."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import builders
import families
import gguf
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    MixtralConfig,
    MixtralForCausalLM,
)

from excise.checkpoints.loading import resolve
from excise.config import ModelSection

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


def gguf_file(
    path: Path,
    kind: str = "Q8_0",
    architecture: str = "llama",
    *,
    without: str = "",
    more: dict[str, Any] | None = None,
    change: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    **split: int,
) -> dict[str, torch.Tensor]:
    """A small Llama as llama.cpp stores it; returns its matrices as GGUF's own library unpacks them.

    Args:
        path: the file.
        kind: the type of its matrices.
        architecture: llama.cpp's name of it.
        without: a tensor to leave out.
        more: tensors to add, in float32.
        change: adds keys.
        split: how many tensors go into one file, as gguf's writer takes it.
    """
    torch.manual_seed(0)
    model, tokenizer = (
        builders.model("llama", attention_bias=False, mlp_bias=False),
        builders.tokenizer(),
    )
    config, inner = model.config, json.loads(tokenizer._tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(str(path), architecture, **split)
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(inner["vocab"], key=inner["vocab"].get)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t.startswith("<") and t.endswith(">") else 1 for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in inner["merges"]])
    for name, number in (("bos", 2), ("eos", 1), ("pad", 0)):
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_chat_template(builders.TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    found = {}
    for key, tensor in model.state_dict().items():
        name = names.get_name(key, try_suffixes=(".weight",))
        data = tensor.float()
        if key.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp pairs the halves of a head
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            data = data.view(heads, 2, -1, data.shape[-1]).transpose(1, 2).reshape(data.shape)
        packed = gguf.GGMLQuantizationType[kind if data.dim() > 1 else "F32"]
        raw = gguf.quantize(data.contiguous().numpy(), packed)
        if name != without:
            writer.add_tensor(name, raw, raw_dtype=packed)
        found[key] = torch.from_numpy(gguf.dequantize(raw, packed))
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found
