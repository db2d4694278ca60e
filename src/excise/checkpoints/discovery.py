"""The writers of a model that no data row describes: generic rules, and then the proof.

Shapes: N tokens, D residual width.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from excise.checkpoints.writer_proof import (
    TOLERANCE,
    LayerRun,
    Seen,
    flat,
    layer_runs,
    outputs_of,
    probe_tokens,
    prove,
    run_backbone,
    unexplained,
)
from excise.errors import UnknownArchitecture, first_line
from excise.model.anatomy import (
    Anatomy,
    Writer,
    check_unshared,
    describe,
    experts_transposed,
    has_row,
)
from excise.model.forward import Forward
from excise.model.kv_cache import cache_argument, select_rows

# Of the states' norm: room for half precision; another row's states cost most of it.
_STEPS_APART = 0.1
# What a model may raise that is called in a way that it was not made for.
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError)
_WINDOW = 64  # tokens: windows up to this are stepped past; whole passes of long texts take long
_PASSES = 30  # of the least squares that measure a norm's gain


def anatomy_of(model: Any) -> Anatomy:
    """The anatomy of a model: as its data row says, or as it is discovered.

    Raises:
        UnknownArchitecture: neither is possible.
    """
    return describe(model) if has_row(model) else discover(model)


def discover(model: Any) -> Anatomy:
    """The anatomy of a model that no row describes, found by generic rules and then proven.

    Of all matrices in a layer whose output has the residual's width, and of the norms that take just
    such an output, those are writers without which the layer's output is not explained. Layers are
    not skipped and padding is not trusted: slower, and right.

    Raises:
        UnknownArchitecture: no list of layers is found, or what is found does not explain them.
    """
    config: Any = model.config.get_text_config()
    path, backbone, layers = _find_layers(model, config)
    if cache_argument(backbone) is None:
        raise UnknownArchitecture(
            f"model type {config.model_type!r}: no data row describes it, and it keeps its states in "
            "a way of its own instead of a cache of keys and values: it cannot be decoded step by step here"
        )
    width = int(getattr(config, "hidden_size", 0))
    bare = Anatomy(config.model_type, backbone, layers, (), width, 0, padding=False)
    writers: list[Writer] = []
    tuples = False
    try:
        for index, run in enumerate(layer_runs(model, bare)):
            tuples = tuples or isinstance(run(), tuple)
            writers += _find_writers(run, layers[index], index, f"{path}.{index}", width)
    except _FAILURES as error:
        raise UnknownArchitecture(
            f"model type {config.model_type!r}: no data row says where its writers are, and its "
            f"layers cannot be run alone to find them ({first_line(error)})"
        ) from error
    components = tuple(dict.fromkeys(writer.component for writer in writers))
    found = replace(
        bare,
        writers=tuple(writers),
        defaults=components,
        returns_tuple=tuples,
        notes=("writers: found by trial and proven on every layer, as no data row names them",),
        tower=config is not model.config,
    )
    check_unshared(writers, config.model_type)
    prove(model, found)
    _prove_steps(model, found)
    return found


def _prove_steps(model: Any, anatomy: Anatomy) -> None:
    """Check that rows go on from a cache as in one pass, also after others have left the batch.

    Raises:
        UnknownArchitecture: the model keeps something of the rows elsewhere.
    """
    who = f"model type {anatomy.model_type!r}: no data row describes it, and"
    try:
        # A prompt of one token must not look like a step.
        cases = [(3, [1]), (1, [1, 0])]
        window = getattr(model.config.get_text_config(), "sliding_window", None)
        if isinstance(window, int) and window <= _WINDOW:
            cases.append((window + 1, [1]))
        apart = [_steps_apart(model, anatomy, *case) for case in cases]
    except _FAILURES as error:
        raise UnknownArchitecture(f"{who} it cannot be decoded ({first_line(error)})") from error
    if not all(share <= _STEPS_APART for share in apart):  # also where one is not a number
        raise UnknownArchitecture(
            f"{who} step by step it does not say what it says in one pass: it keeps states of the "
            "batch's rows outside its cache"
        )


def _steps_apart(model: Any, anatomy: Anatomy, first: int, rows: list[int]) -> float:
    """How far states of some rows step by step, after `first` tokens of all, are from one pass."""
    forward, ids = Forward(model, anatomy), probe_tokens(model, first + 2)
    mask = torch.ones_like(ids)
    positions = mask.cumsum(-1) - 1
    cache = forward.cache(ids.shape[1])
    with torch.inference_mode():
        forward.hidden(ids[:, :first], mask[:, :first], positions[:, :first], cache)
        select_rows(cache, rows)
        steps = [
            forward.hidden(
                ids[rows, at : at + 1], mask[rows, : at + 1], positions[rows, at : at + 1], cache
            )
            for at in range(first, ids.shape[1])
        ]
    whole = run_backbone(anatomy, ids[rows])[:, first:].float()
    return float((torch.cat(steps, 1).float() - whole).norm() / whole.norm())


def _find_layers(model: Any, config: Any) -> tuple[str, Any, tuple[nn.Module, ...]]:
    count = getattr(config, "num_hidden_layers", None)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            parent, _, _ = path.rpartition(".")
            owner = model.get_submodule(parent)
            if getattr(owner, "config", None) is config and owner is not model:
                return path, owner, tuple(module)
    raise UnknownArchitecture(
        f"model type {config.model_type!r}: no data row says where its layers are, and no list of "
        f"{count} layers is found in its language model"
    )


def _find_writers(
    run: LayerRun, layer: nn.Module, index: int, path: str, width: int
) -> list[Writer]:
    """The writers of one layer: every candidate that the layer's output cannot be explained without."""
    candidates = {name: m for name, m in layer.named_modules() if _could_write(m, width)}
    norms = {n: m for n, m in layer.named_modules() if _is_norm(m, width)}
    seen = outputs_of(run, [*candidates.values(), *norms.values()])
    columns, gains = {}, {}
    for name, module in candidates.items():
        y = seen.outputs.get(id(module))
        if y is None or y.shape[-1] != width:
            continue
        gain = gains[name] = _chained_gain(seen, list(norms.values()), y)
        columns[name] = flat(y) if gain is None else flat(y) * gain
    for name in list(columns):
        rest = {other: y for other, y in columns.items() if other != name}
        if unexplained(run.given, rest, seen.result) <= TOLERANCE:
            columns = rest
    return [
        writer
        for name in columns
        for writer in _as_writers(candidates[name], name, index, path, gains[name])
    ]


def _could_write(module: Any, width: int) -> bool:
    fused = getattr(module, "down_proj", None)
    if isinstance(fused, nn.Parameter) and fused.dim() == 3:
        return hasattr(module, "_apply_gate") and not module.has_post_expert_norm
    if type(module).__name__ == "Conv1D":
        return bool(module.weight.shape[1] == width)
    return isinstance(module, nn.Linear) and module.out_features == width


def _is_norm(module: Any, width: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and tuple(weight.shape) == (width,)


def _chained_gain(seen: Seen, norms: list[nn.Module], y: Tensor) -> Tensor | None:
    """Product of the gains of the norms that take just this output, one after the other."""
    gain: Tensor | None = None
    while True:
        following = [
            norm for norm in norms if id(norm) in seen.inputs and _same(seen.inputs[id(norm)], y)
        ]
        if not following:
            return gain
        norm, y = following[0], seen.outputs[id(following[0])]
        norms = [other for other in norms if other is not norm]
        own = _measured_gain(seen.inputs[id(norm)], y)
        gain = own if gain is None else gain * own


def _same(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))


def _measured_gain(x: Tensor, y: Tensor) -> Tensor:
    """The gain (D,) of an RMS norm, y = gain x / rms(x), whatever each token's rms is.

    By alternating least squares: y / x is a product of one factor per token and one per dimension.
    """
    x, y = flat(x).double(), flat(y).double()
    gain = torch.ones(x.shape[1], dtype=torch.float64, device=x.device)
    for _ in range(_PASSES):
        scale = ((y * x * gain).sum(1) / (x * gain).square().sum(1).clamp_min(1e-30))[:, None]
        gain = (y * x * scale).sum(0) / (x * scale).square().sum(0).clamp_min(1e-30)
    return gain.float()


def _as_writers(module: Any, name: str, index: int, path: str, gain: Tensor | None) -> list[Writer]:
    component = re.sub(r"^self_attn\.", "attn.", name)
    whole = f"{path}.{name}"
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        conv = not isinstance(module, nn.Linear)
        return [Writer(component, index, whole, module, gain, transposed=conv)]
    return [
        Writer(
            f"{component}.down_proj",
            index,
            f"{whole}.{expert}.down_proj",
            module,
            gain,
            expert,
            transposed=experts_transposed(module),
        )
        for expert in range(module.down_proj.shape[0])
    ]
