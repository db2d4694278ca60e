"""Peak memory of a merge, and its time beside `cp -r` of the same files.

    python bench/export_memory.py [--gigabytes 4] [--dir DIR]

A random bf16 checkpoint of eight shards with the matrices of a Qwen3 4B model is written shard by
shard; every o_proj and down_proj is then edited in a process of its own. Both contenders end when
the data is on the disk; each runs twice, in turns, and its better time counts. No model is loaded:
the places of the edited tensors are given, as `excise.export.matching.find_tensors` would prove them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHARDS = 8
RUNS = 2
EDITED = ("o_proj", "down_proj")


def shapes(gigabytes: float) -> dict[str, tuple[int, int]]:
    """Tensor name -> shape, for about this many gigabytes in bf16; a quarter as wide below one."""
    d, heads, kv, inner = (n // (1 if gigabytes >= 1 else 4) for n in (2560, 4096, 1024, 9728))
    block = {
        "self_attn.q_proj": (heads, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, heads),
        "mlp.gate_proj": (inner, d),
        "mlp.up_proj": (inner, d),
        "mlp.down_proj": (d, inner),
    }
    layers = max(1, round(gigabytes * 5e8 / sum(o * i for o, i in block.values())))
    return {
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(layers)
        for name, shape in block.items()
    }


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """Write the shards one at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3Config

    Qwen3Config().save_pretrained(folder)
    pool = torch.empty(1 << 26, dtype=torch.bfloat16).normal_(0.0, 0.02)
    names = shapes(gigabytes)
    keys = list(names)
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        tensors = {}
        for key in keys[shard * len(keys) // SHARDS : (shard + 1) * len(keys) // SHARDS]:
            o, i = names[key]
            start = hash_of(key) % (pool.numel() - o * i)
            tensors[key] = pool[start : start + o * i].view(o, i).clone()
            weight_map[key] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def hash_of(key: str) -> int:
    import zlib

    return zlib.crc32(key.encode())


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def merge(source: Path, destination: Path) -> dict[str, Any]:
    """Run in its own process: the merge, and nothing before it but imports."""
    import torch

    from excise.export.matching import WriterPlace, list_tensors
    from excise.export.merging import write_checkpoint
    from excise.files import sha256_of
    from excise.model.edits import Edit

    places = {
        tensor.key.removesuffix(".weight"): WriterPlace(tensor)
        for tensor in list_tensors(source)
        if tensor.key.split(".")[-2] in EDITED
    }
    edits = {}
    for name, place in places.items():
        o, i = place.weight.shape
        edits[name] = Edit(0.01 * torch.randn(o, 1), torch.randn(1, i), 1 + 0.01 * torch.randn(o))
    before = status("VmRSS")
    begun = time.perf_counter()
    done = write_checkpoint(source, destination, edits, places)
    os.sync()
    seconds = time.perf_counter() - begun
    # Not ru_maxrss: a child inherits its parent's peak through exec on some kernels.
    peak = status("VmHWM")
    begun = time.perf_counter()
    sha256_of(destination)
    return {
        "seconds": seconds,
        "sha256_seconds": time.perf_counter() - begun,
        "peak_bytes": peak,
        "ru_maxrss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "bytes_after_imports": before,
        "tensors_edited": len(done.tensors),
        "edited_bytes": sum(place.weight.stop - place.weight.start for place in places.values()),
        "largest_tensor_bytes": max(t.stop - t.start for t in list_tensors(source)),
    }


def merge_apart(source: Path, destination: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--merge", str(source), str(destination)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def copy(source: Path, destination: Path) -> float:
    begun = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(destination)], check=True)
    os.sync()
    return time.perf_counter() - begun


def compare(folder: Path, gigabytes: float) -> dict[str, Any]:
    source = folder / "source"
    make_checkpoint(source, gigabytes)
    os.sync()
    copies, merges = [], []
    for _ in range(RUNS):
        copies.append(copy(source, folder / "copy"))
        shutil.rmtree(folder / "copy")
        os.sync()
        merges.append(merge_apart(source, folder / "merged"))
        shutil.rmtree(folder / "merged")
        os.sync()
    best = min(merges, key=lambda found: found["seconds"])
    used = max(m["peak_bytes"] - m["bytes_after_imports"] for m in merges)
    return {
        "gigabytes": round(sum(p.stat().st_size for p in source.iterdir()) / 1e9, 3),
        "shards": SHARDS,
        "tensors_edited": best["tensors_edited"],
        "edited_share": round(
            best["edited_bytes"] / sum(2 * o * i for o, i in shapes(gigabytes).values()), 3
        ),
        "seconds_merge": [round(found["seconds"], 2) for found in merges],
        "seconds_cp": [round(seconds, 2) for seconds in copies],
        "time_ratio": round(best["seconds"] / min(copies), 2),
        "seconds_sha256": round(best["sha256_seconds"], 2),
        "peak_mb": round(max(m["peak_bytes"] for m in merges) / 1e6, 1),
        "after_imports_mb": round(best["bytes_after_imports"] / 1e6, 1),
        "used_mb": round(used / 1e6, 1),
        "largest_tensor_mb": round(best["largest_tensor_bytes"] / 1e6, 1),
        "memory_ratio": round(used / best["largest_tensor_bytes"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--dir", type=Path, default=None, help="a folder on the disk to measure")
    parser.add_argument("--merge", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.merge:
        print(json.dumps(merge(*arguments.merge)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.dir, prefix="excise-bench-") as folder:
        print(json.dumps(compare(Path(folder), arguments.gigabytes), indent=1))


if __name__ == "__main__":
    main()
