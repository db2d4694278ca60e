"""A parameter's values, wherever they are: in memory, offloaded until they are used, or packed.

Offloaded: `device_map` leaves a parameter on the meta device, and accelerate's hook brings its values
for the length of a forward pass. Packed: bitsandbytes keeps 4- and 8-bit codes in its place.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

_PACKED = ("Params4bit", "Int8Params")


def values(module: Any, name: str) -> Tensor | None:
    """Return the values of `module.name`: the parameter itself where it is in memory and not packed.

    Packed values are dequantised, to the dtype that bitsandbytes computes in.
    """
    parameter: Tensor | None = getattr(module, name, None)
    if parameter is None or not (parameter.is_meta or type(parameter).__name__ in _PACKED):
        return parameter
    with present(module, name):
        found: Tensor = getattr(module, name)
        if type(found).__name__ in _PACKED:
            from transformers.integrations.bitsandbytes import dequantize_bnb_weight

            with torch.no_grad():
                return dequantize_bnb_weight(found, state=getattr(module, "state", None))  # type: ignore[no-any-return]
        return found.detach()


def present(module: Any, name: str = "weight") -> AbstractContextManager[Any]:
    """Keep the parameters of `module` in memory in this context."""
    parameter = getattr(module, name, None)
    if parameter is None or not parameter.is_meta:
        return nullcontext()
    from accelerate.utils import align_module_device

    context: AbstractContextManager[Any] = align_module_device(module)
    return context


def is_packed(module: Any) -> bool:
    """Return whether the module's weight is quantised to 4 or 8 bits."""
    return type(getattr(module, "weight", None)).__name__ in _PACKED


def device_of(module: Any, name: str = "weight") -> torch.device:
    """Return the device on which `module` computes."""
    parameter: Tensor = getattr(module, name)
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device(device) if parameter.is_meta and device is not None else parameter.device


def shape_of(module: Any, name: str = "weight") -> tuple[int, ...]:
    """Return the unpacked shape."""
    parameter = getattr(module, name)
    state = getattr(parameter, "quant_state", None)  # 4-bit codes are stored flat
    return tuple(parameter.shape if state is None else state.shape)


def keep_readable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit codes on a CPU.

    Some CPUs get another layout at the first use, which hides the codes and does not work for every
    width (bitsandbytes 0.50).
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


def free(module: nn.Module) -> None:
    """Free the memory of a module's parameters; it cannot run again."""
    for part in module.modules():
        for name, held in part.named_parameters(recurse=False):
            empty = torch.empty(held.shape, dtype=held.dtype, device="meta")
            part._parameters[name] = nn.Parameter(empty, requires_grad=False)


def any_offloaded(model: nn.Module) -> bool:
    """Return whether some weights are offloaded: every pass, however small, loads them again."""
    return any(parameter.is_meta for parameter in model.parameters())


def check_finite(model: nn.Module) -> str | None:
    """Return the name of the first parameter that holds a NaN or an infinity, or None."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            held = values(module, name) if parameter.is_meta else parameter
            # Both ends show any NaN or infinity, several times faster than a mask of all elements.
            if held is not None and held.numel():
                ends = torch.aminmax(held)
                if not all(map(torch.isfinite, ends)):
                    return f"{path}.{name}" if path else name
    return None
