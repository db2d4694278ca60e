"""Two devices over host memory that PyTorch takes for GPUs: no op may mix them, and all they do is counted.

What it says of a GPU: which tensors live where, how many kernels are launched, how often Python waits for a
result, how much memory is held. What it does not: how long anything takes.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from filelock import FileLock
from torch.utils import cpp_extension

NAME = "standin"
SOURCE = Path(__file__).with_suffix("").parent / "standin.cpp"


@dataclass(frozen=True)
class Counted:
    """What the devices did: operations by name."""

    launches: dict[str, int]
    waits: dict[str, int]
    uploads: dict[str, int]

    @property
    def totals(self) -> tuple[int, int, int]:
        """Return launches, waits and uploads."""
        return tuple(sum(kind.values()) for kind in (self.launches, self.waits, self.uploads))


class _Module(types.ModuleType):
    """What `torch.standin` is, as `torch.cuda` is for NVIDIA's GPUs."""

    available = False

    def is_available(self) -> bool:
        return self.available

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return torch.accelerator.current_device_index()

    def device_count(self) -> int:
        return 2 if self.available else 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Do nothing: random numbers are the CPU's."""

    def get_rng_state(self, _device: object) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, _device: object) -> None:
        torch.set_rng_state(state)

    def mem_get_info(self, device: object) -> tuple[int, int]:
        return torch.accelerator.get_memory_info(device)

    def empty_cache(self) -> None:
        """Do nothing: no memory is held in reserve."""


@cache
def load() -> _Module:
    """Load the devices, and name them; before the first gradient, when PyTorch counts what it has."""
    torch.ops.load_library(_library())
    torch.ops.standin.start()
    torch.utils.rename_privateuse1_backend(NAME)
    torch.utils.generate_methods_for_privateuse1_backend()
    module = _Module(NAME)
    torch._register_device_module(NAME, module)
    return module


def _library() -> Path:
    """Return the built library: half a minute's work where this source and torch never met.

    It is built in a folder of its own, and moved when it is whole: a build that is killed leaves a lock
    that every later one in its folder would wait for.
    """
    built_of = SOURCE.read_bytes() + torch.__version__.encode()
    name = f"excise_standin_{sha256(built_of).hexdigest()[:16]}"
    kept = Path(cpp_extension.get_default_build_root()) / f"{name}.so"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_suffix(".lock")), TemporaryDirectory(dir=kept.parent) as folder:
        if not kept.exists():
            options = {
                "build_directory": folder,
                "extra_cflags": ["-O1"],
                "is_python_module": False,
            }
            beside = str(Path(sys.executable).parent)  # where pip puts ninja
            with patch.dict(os.environ, PATH=os.pathsep.join((beside, os.environ["PATH"]))):
                cpp_extension.load(name, [str(SOURCE)], **options)
            (Path(folder) / f"{name}.so").rename(kept)
    return kept


@contextmanager
def devices(limit: int = 0) -> Iterator[None]:
    """Have two devices for a while, of `limit` bytes each (0: as much as there is)."""
    module = load()
    _have(module, yes=True, limit=limit)
    torch.ops.standin.reset()
    try:
        yield
    finally:
        _have(module, yes=False, limit=0)


def _have(module: _Module, *, yes: bool, limit: int) -> None:
    module.available = yes
    torch.ops.standin.available(yes)
    for device in range(2):
        torch.ops.standin.limit(limit, device)
        if yes:
            torch.accelerator.reset_peak_memory_stats(device)
            torch.accelerator.reset_accumulated_memory_stats(device)


@contextmanager
def no_waits() -> Iterator[None]:
    """Raise RuntimeError where Python would wait for a device, so that the traceback says where."""
    torch.ops.standin.refuse_waits(True)
    try:
        yield
    finally:
        torch.ops.standin.refuse_waits(False)


def counted() -> Counted:
    """Return what was counted since `devices` began, or since the last `reset`."""
    kinds = (torch.ops.standin.counted(kind) for kind in ("launches", "waits", "uploads"))
    return Counted(*({n: int(t) for n, t in (e.rsplit(" ", 1) for e in kind)} for kind in kinds))


def reset() -> None:
    """Count from here on."""
    torch.ops.standin.reset()
