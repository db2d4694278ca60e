"""The device that a model runs on: any GPU that PyTorch knows, by the same lines, or the CPU."""

from __future__ import annotations

import psutil
import torch


def accelerator() -> torch.device | None:
    """Return the first GPU that PyTorch can use here, None where there is none."""
    found = torch.accelerator.current_accelerator()
    usable = found is not None and torch.accelerator.is_available()
    return torch.device(found.type, 0) if found is not None and usable else None


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on the device now, in bytes."""
    asked = getattr(torch.get_device_module(device), "mem_get_info", None)
    # The CPU has no such function, nor has Apple's GPU, which shares the CPU's memory.
    return psutil.virtual_memory().available if asked is None else int(asked(device)[0])


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the device computes in bfloat16 natively, as far as it says so."""
    asked = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return asked is None or bool(asked())


def finish(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def release(device: torch.device) -> None:
    """Give memory that PyTorch holds in reserve back to the device."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
