"""Peak memory of patching a GGUF, and its time beside `cp` of the same file.

    python bench/patch_memory.py [--gigabytes 2] [--types Q8_0,Q4_K,F16] [--dir DIR]

A GGUF with the matrices of a Qwen3 4B model is written tensor by tensor; every o_proj and down_proj is
then edited in a process of its own. The source's values are at hand, as they are in an export: they are
views of one pool of random numbers, so that the model itself takes next to no memory. Both contenders
end when the data is on the disk; each runs twice, in turns, and its better time counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from export_memory import hash_of, status

RUNS = 2
D, HEADS, KV, INNER = 2560, 4096, 1024, 9728
SHAPES = {
    "attn_q": (HEADS, D),
    "attn_k": (KV, D),
    "attn_v": (KV, D),
    "attn_output": (D, HEADS),
    "ffn_gate": (INNER, D),
    "ffn_up": (INNER, D),
    "ffn_down": (D, INNER),
}
WRITERS = ("attn_output", "ffn_down")


def pool() -> Any:
    import torch

    return torch.empty(1 << 26, dtype=torch.bfloat16).normal_(
        0.0, 0.02, generator=torch.Generator().manual_seed(0)
    )


def values(numbers: Any, layer: int, name: str) -> Any:
    """The matrix (O, I) of this name: a view of the pool."""
    o, i = SHAPES[name]
    start = hash_of(f"{layer}.{name}") % (numbers.numel() - o * i)
    return numbers[start : start + o * i].view(o, i)


def make_gguf(path: Path, kind: str, gigabytes: float) -> int:
    """Write the file; returns its number of layers."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    from excise.gguf.ggml import from_float

    qtype = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[qtype]
    layer_bytes = sum(o * i for o, i in SHAPES.values()) // block * size
    layers = max(1, round(gigabytes * 1e9 / layer_bytes))
    out = GGUFWriter(path, "qwen3")
    out.add_block_count(layers)
    names = [(layer, name) for layer in range(layers) for name in SHAPES]
    for layer, name in names:
        o, i = SHAPES[name]
        total = o * i // block * size
        title = f"blk.{layer}.{name}.weight"
        if kind == "F16":
            out.add_tensor_info(title, (o, i), np.dtype("float16"), total)
        else:
            out.add_tensor_info(title, (o, i // block * size), np.dtype("uint8"), total, qtype)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    numbers = pool()
    for layer, name in names:
        rows = values(numbers, layer, name).float().numpy()
        raw = from_float(rows, qtype)
        out.write_tensor_data(raw.view("float16") if kind == "F16" else raw)
    out.close()
    return layers


def patch(source: Path, destination: Path, layers: int) -> dict[str, Any]:
    """Run in its own process: the patch, and before it a model of views."""
    import torch
    from torch import nn
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from excise.gguf.patching import patch_gguf
    from excise.model.anatomy import describe
    from excise.model.edits import Edit

    config = Qwen3Config(
        hidden_size=D,
        num_attention_heads=HEADS // 128,
        num_key_value_heads=KV // 128,
        head_dim=128,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        vocab_size=64,
    )
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    writers, numbers = describe(model).writers, pool()
    edits = {}
    for writer in writers:
        name = "attn_output" if "o_proj" in writer.name else "ffn_down"
        view = values(numbers, writer.layer, name)
        writer.module.weight = nn.Parameter(view, requires_grad=False)
        o, i = view.shape
        draw = torch.Generator().manual_seed(writer.layer)
        left, right = (torch.randn(*s, generator=draw) for s in ((o, 1), (1, i)))
        edits[writer.name] = Edit(0.001 * left, right, 1 + 0.01 * left[:, 0])
    before = status("VmRSS")
    begun = time.perf_counter()
    done = patch_gguf(source, destination, edits, writers, model)
    os.sync()
    return {
        "seconds": time.perf_counter() - begun,
        "used_bytes": status("VmHWM") - before,
        "tensors": len(done.tensors),
    }


def copy(source: Path, destination: Path) -> float:
    begun = time.perf_counter()
    subprocess.run(["cp", str(source), str(destination)], check=True)
    os.sync()
    return time.perf_counter() - begun


def compare(folder: Path, kind: str, gigabytes: float) -> dict[str, Any]:
    source = folder / f"{kind}.gguf"
    layers = make_gguf(source, kind, gigabytes)
    os.sync()
    copies, patches = [], []
    for _ in range(RUNS):
        copies.append(copy(source, folder / "copy.gguf"))
        (folder / "copy.gguf").unlink()
        command = [
            sys.executable,
            __file__,
            "--patch",
            str(source),
            str(folder / "out"),
            str(layers),
        ]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        patches.append(json.loads(result.stdout))
        shutil.rmtree(folder / "out")
        os.sync()
    best = min(patches, key=lambda found: found["seconds"])
    size = source.stat().st_size
    source.unlink()
    total = sum(o * i for o, i in SHAPES.values())
    return {
        "gigabytes": round(size / 1e9, 3),
        "tensors_edited": best["tensors"],
        "edited_share": round(sum(SHAPES[n][0] * SHAPES[n][1] for n in WRITERS) / total, 3),
        "seconds_patch": [round(one["seconds"], 2) for one in patches],
        "seconds_cp": [round(one, 2) for one in copies],
        "time_ratio": round(best["seconds"] / min(copies), 2),
        "used_mb": round(max(one["used_bytes"] for one in patches) / 1e6, 1),
        "largest_tensor_mb": round(size * D * INNER / (total * layers) / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--types", default="Q8_0,Q4_K,F16")
    parser.add_argument("--dir", type=Path, default=None, help="a folder on the disk to measure")
    parser.add_argument("--patch", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.patch:
        source, destination, layers = arguments.patch
        print(json.dumps(patch(Path(source), Path(destination), int(layers))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.dir, prefix="excise-bench-") as folder:
        found = {
            kind: compare(Path(folder), kind, arguments.gigabytes)
            for kind in arguments.types.split(",")
        }
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
