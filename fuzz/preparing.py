"""Libraries, loaded once so that each input costs a fork and no import; and the ground, made in a fork."""

from __future__ import annotations

import gc
import importlib
import logging
from collections.abc import Sequence
from pathlib import Path

from fuzz import ground as made
from fuzz.kinds import KINDS
from fuzz.running import run

_LIBRARIES = (
    *(
        "torch",
        "excise.cli.main",
        "excise.runs.pipeline",
        "excise.runs.finished_run",
        "excise.runs.reproduce",
        "excise.cli.console",
    ),
    *(
        "excise.cli.inspect_model",
        "excise.export.hub",
        "optuna",
        "sklearn.ensemble",
        "pyarrow.parquet",
        "pandas",
        "yaml",
    ),
    *("gguf", "transformers.models.qwen3.modeling_qwen3", "transformers.integrations.ggml"),
    *("transformers.modeling_gguf_pytorch_utils", "peft", "huggingface_hub"),
)


def load_libraries() -> None:
    """Import all that commands import; no tensor is computed, so no thread is there when it forks."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of a kernel it has not
    for name in _LIBRARIES:
        importlib.import_module(name)
    import torch
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    torch.set_num_threads(1)
    get_checkpoint_conversion_mapping("qwen3")  # compiles a thousand patterns at its first call
    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, every page


def ground(folder: Path) -> made.Ground:
    """The ground, made in a process of its own."""
    place = folder / "ground"

    def build() -> int:
        made.build(place)
        return 0

    found = run(build, folder, seconds=600)
    if found.code != 0:
        raise RuntimeError(f"the ground cannot be made:\n{found.err}")
    return made.Ground(place)


def numbers(count: int, only: Sequence[str] | None) -> list[int]:
    """The numbers of the first `count` inputs, or those of some kinds among them."""
    kinds = list(KINDS)
    return [n for n in range(count) if not only or kinds[n % len(kinds)] in only]
