"""Discover the writers of a model that no data row describes, by generic rules, and prove them.

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
    LayerTrace,
    flat,
    layer_runs,
    probe_tokens,
    prove,
    run_backbone,
    trace_modules,
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

# Share of the hidden states' norm: rounding in half precision is below, another row's states above.
_CACHE_TOLERANCE = 0.1
# What a model may raise when it is called in a way that it was not written for.
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError)
_WINDOW = 64  # tokens: sliding windows up to this are tested past their end; longer ones take long
_PASSES = 30  # of alternating least squares


def anatomy_of(model: Any) -> Anatomy:
    """Return the anatomy of a model: from its data row, or discovered.

    Raises:
        UnknownArchitecture: neither is possible.
    """
    return describe(model) if has_row(model) else discover(model)


def discover(model: Any) -> Anatomy:
    """Discover the anatomy of a model by generic rules, and prove it.

    Candidates are the matrices in a layer whose output has the residual's width, and the norms that take
    just such an output. Those without which the layer's output is not explained are the writers. Layers are
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
    _prove_cache(model, found)
    return found


def _prove_cache(model: Any, anatomy: Anatomy) -> None:
    """Check that decoding from a cache gives what one pass gives, also after rows have left the batch.

    Raises:
        UnknownArchitecture: the model keeps state of the rows outside its cache.
    """
    who = f"model type {anatomy.model_type!r}: no data row describes it, and"
    try:
        # A prompt of one token must not be taken for a decoding step.
        cases = [(3, [1]), (1, [1, 0])]
        window = getattr(model.config.get_text_config(), "sliding_window", None)
        if isinstance(window, int) and window <= _WINDOW:
            cases.append((window + 1, [1]))
        apart = [_cache_error(model, anatomy, *case) for case in cases]
    except _FAILURES as error:
        raise UnknownArchitecture(f"{who} it cannot be decoded ({first_line(error)})") from error
    if not all(share <= _CACHE_TOLERANCE for share in apart):  # a NaN fails too
        raise UnknownArchitecture(
            f"{who} step by step it does not say what it says in one pass: it keeps states of the "
            "batch's rows outside its cache"
        )


def _cache_error(model: Any, anatomy: Anatomy, first: int, rows: list[int]) -> float:
    """Return the relative distance between hidden states of single steps and those of one pass.

    `first` tokens of all rows are prefilled; then only `rows` go on, a token at a time.
    """
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
    """Return one layer's writers: every candidate without which the layer's output is not explained."""
    candidates = {name: m for name, m in layer.named_modules() if _could_write(m, width)}
    norms = {n: m for n, m in layer.named_modules() if _is_norm(m, width)}
    seen = trace_modules(run, [*candidates.values(), *norms.values()])
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


def _chained_gain(seen: LayerTrace, norms: list[nn.Module], y: Tensor) -> Tensor | None:
    """Multiply the gains of the norms that take just this output, one after the other."""
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
    """Estimate the gain (D,) of an RMS norm, y = gain x / rms(x), whatever each token's rms is.

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
