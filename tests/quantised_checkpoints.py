"""Small quantised checkpoints, packed as their makers pack them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import builders
import families
import templates
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

BLOCK = 16


def packed_fp8(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as FP8 checkpoints store it: e4m3 values, and one scale for each square block."""
    rows, columns = (-(-side // block) for side in weight.shape)
    scale = torch.zeros(rows, columns)
    out = torch.zeros_like(weight, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            part = weight[i * block : (i + 1) * block, j * block : (j + 1) * block].float()
            scale[i, j] = part.abs().max().clamp_min(1e-12) / 448
            values = (part / scale[i, j]).to(torch.float8_e4m3fn)
            out[i * block : (i + 1) * block, j * block : (j + 1) * block] = values
    return out, scale


def fp8_checkpoint(folder: Path, **save) -> Path:
    """A Qwen3 with FP8 matrices in its layers, as Transformers and others write them.

    What it was made from lies beside it.
    """
    builders.checkpoint(folder, "qwen3", **save)
    shutil.copytree(folder, folder.with_name(f"{folder.name}-before"))
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [n for n in tensors if "proj.weight" in n]:
            tensors[name], tensors[f"{name}_scale_inv"] = packed_fp8(tensors[name], BLOCK)
        save_file(tensors, path, metadata={"format": "pt"})
        index = folder / "model.safetensors.index.json"
        if index.exists():
            data = json.loads(index.read_text())
            data["weight_map"] |= dict.fromkeys(tensors, path.name)
            index.write_text(json.dumps(data))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def compressed_checkpoint(folder: Path, strategy: str) -> Path:
    """A Qwen3 in FP8 as compressed-tensors packs it, with a scale for each "channel" or "tensor"."""
    # Here, as it starts threads, and what forks in other tests must find none.
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy=strategy)
    builders.checkpoint(folder, "qwen3")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in [n for n in tensors if "proj.weight" in n]:
        weight = tensors[name]
        ends = (weight.amin(1, keepdim=True), weight.amax(1, keepdim=True))
        if strategy == "tensor":
            ends = (weight.min()[None], weight.max()[None])
        scale, zero = calculate_qparams(*ends, arguments)
        tensors[name] = quantize(weight, scale, zero, arguments, dtype=torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, path, metadata={"format": "pt"})
    group = {"targets": ["Linear"], "weights": arguments.model_dump(mode="json")}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


def gpt_oss_checkpoint(folder: Path) -> Path:
    """A small gpt-oss whose experts are packed on disk, with a template that has channels."""
    config = families.config("gpt_oss")
    config.intermediate_size = 64  # whole groups of 32
    torch.manual_seed(0)
    model = families.randomised(AutoModelForCausalLM.from_config(config))
    model.bfloat16().save_pretrained(folder)
    tokenizer = builders.tokenizer()
    tokenizer.chat_template = templates.GPT_OSS
    tokenizer.save_pretrained(folder)
    path = folder / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(path)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = tensors.pop(name).shape
        sides = (experts, outer, inner // 32)
        blocks = torch.randint(0, 256, (*sides, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(119, 123, sides, dtype=torch.uint8, generator=generator)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder
