"""Contexts that replace something and restore it exactly: modules' `forward`, the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def replaced_forward(
    steps: Mapping[nn.Module, Callable[..., Any]], *, fetched: bool = False
) -> Iterator[None]:
    """Replace modules' `forward` in this context, and restore it whatever happens.

    With `fetched` the replacement runs with offloaded weights loaded: there accelerate's `forward` loads
    them and calls the old one, which is then what is replaced.
    """
    names = {
        module: "_old_forward" if fetched and hasattr(module, "_hf_hook") else "forward"
        for module in steps
    }
    before = {module: module.__dict__.get(name) for module, name in names.items()}
    try:
        for module, step in steps.items():
            module.__dict__[names[module]] = step
        yield
    finally:
        for module, name in names.items():
            if before[module] is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = before[module]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with `count` threads here, and in threads that start within."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
