"""Prove on a model's own layers which modules are its writers (output projections).

A layer's output must be, token by token, a linear combination of its input and of its writers' outputs,
times the gains of their post-norms. The coefficients (norms, multipliers, gates) may differ by token.
Every layer runs alone, as a float32 copy.

Shapes: N tokens, D residual width, K vectors of one token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from excise.errors import UnknownArchitecture
from excise.model.anatomy import Anatomy, Writer
from excise.model.edits import Edit
from excise.model.experts import edited_forward, stack_experts

TOLERANCE = 3e-5  # of a layer's output, in float32; without one of its writers it is 1e-3 and more
_TOKENS = 10
_ROWS = 2


@dataclass(frozen=True)
class LayerRun:
    """One layer's call in a pass over the whole model, and a float32 copy of the layer to repeat it."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    twins: dict[int, Any]  # id of a module of the model -> its copy

    def twin(self, module: nn.Module) -> nn.Module:
        """Return the copy of one of the layer's modules."""
        found = self.twins[id(module)]
        assert isinstance(found, nn.Module)
        return found

    @property
    def given(self) -> Tensor:
        """The layer's input: hidden states (B, T, D), or (streams, B, T, D)."""
        hidden: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return hidden

    def __call__(self) -> Any:
        """Run the layer; leave its input as it is."""
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        with torch.inference_mode():
            return self.layer(*args, **kwargs)


def prove(model: nn.Module, anatomy: Anatomy) -> None:
    """Check that the anatomy's writers, and no other modules, write to the residual stream at every layer.

    Raises:
        UnknownArchitecture: something else writes, a writer does not, or an edit of one does not
            change its output as predicted.
    """
    for index, run in enumerate(layer_runs(model, anatomy)):
        writers = [writer for writer in anatomy.writers if writer.layer == index]
        passes = anatomy.passes[index] if anatomy.passes else ()
        error, shares = coverage_error(run, writers, passes)
        where = f"model type {anatomy.model_type!r}, layer {index}"
        if error > TOLERANCE:
            raise UnknownArchitecture(
                f"{where}: something besides {', '.join(_components(writers))} writes to the "
                f"residual (a share of {error:.1e} is not explained), and would be left unedited"
            )
        for component, share in shares.items():
            if share == 0.0:
                raise UnknownArchitecture(f"{where}: {component} does not write to the residual")
        for writer in writers:
            if writer.expert in (None, 0) and not _responds(run, writer):
                raise UnknownArchitecture(
                    f"{where}: an edit of {writer.name} does not change its output as predicted"
                )


def layer_runs(model: nn.Module, anatomy: Anatomy) -> Iterator[LayerRun]:
    """Yield every layer's call in one pass over random tokens, with a float32 copy of the layer."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(copy.deepcopy((args, kwargs)))

    hooks = [
        layer.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
        for layer in anatomy.layers
    ]
    try:
        run_backbone(anatomy, probe_tokens(model))
    finally:
        for hook in hooks:
            hook.remove()
    for layer, (args, kwargs) in zip(anatomy.layers, calls, strict=True):
        twins: dict[int, Any] = {}
        twin = copy.deepcopy(layer, twins).float()
        yield LayerRun(twin, _float(args), _float(kwargs), twins)


def run_backbone(anatomy: Anatomy, ids: Tensor) -> Tensor:
    """Return the final hidden states (B, T, D) of token ids (B, T), without a cache."""
    with torch.inference_mode():
        hidden: Tensor = anatomy.backbone(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
        ).last_hidden_state
    return hidden


def probe_tokens(model: Any, tokens: int = _TOKENS) -> Tensor:
    """Draw random token ids (B, T), the same every time."""
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary // 4, vocabulary, (_ROWS, tokens), generator=draw)
    return ids.to(model.get_input_embeddings().weight.device)


def coverage_error(
    run: LayerRun, writers: Sequence[Writer], passes: Sequence[nn.Module] = ()
) -> tuple[float, dict[str, float]]:
    """Measure what share of the layer's output is not explained by its input and writers.

    Returns:
        The unexplained share, and for every component how much is unexplained without it; 0 for one that
        explains nothing.
    """
    modules = {id(writer.module): writer for writer in writers}
    names = {key: writer.component for key, writer in modules.items()}
    found = trace_modules(run, [*(w.module for w in modules.values()), *passes])
    columns = {
        names.get(key, f"pass {key}"): flat(y)
        * (1.0 if key not in modules else _gain(modules[key]))
        for key, y in found.outputs.items()
    }
    whole = unexplained(run.given, columns, found.result)
    shares = {}
    for name in columns:
        rest = {other: y for other, y in columns.items() if other != name}
        less = unexplained(run.given, rest, found.result)
        shares[name] = less if less > TOLERANCE else 0.0
    missing = {name: 0.0 for name in names.values() if name not in columns}
    return whole, {name: s for name, s in (shares | missing).items() if not name.startswith("pass")}


@dataclass(frozen=True)
class LayerTrace:
    """Inputs and outputs of a layer's modules, by the id of the model's module, and the layer's output."""

    outputs: dict[int, Tensor]
    inputs: dict[int, Tensor]
    result: Tensor


def trace_modules(run: LayerRun, modules: Sequence[nn.Module]) -> LayerTrace:
    """Run the layer; keep the inputs and outputs of these modules."""
    outputs: dict[int, Tensor] = {}
    inputs: dict[int, Tensor] = {}

    def hook(key: int) -> Callable[..., None]:
        def keep(_module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and args:
                inputs[key], outputs[key] = args[0].clone(), output.clone()

        return keep

    hooks = [run.twin(m).register_forward_hook(hook(id(m))) for m in modules]
    try:
        result = run()
    finally:
        for one in hooks:
            one.remove()
    return LayerTrace(outputs, inputs, result[0] if isinstance(result, tuple) else result)


def unexplained(given: Tensor, columns: dict[str, Tensor], result: Tensor) -> float:
    """Return the largest |rest| / |output| over tokens, by least squares over each token's K vectors."""
    width = result.shape[-1]
    n = result.shape[-3] * result.shape[-2]
    streams = given.double().reshape(-1, n, width)  # (streams, N, D)
    per_token = [*streams, *(y.double().reshape(-1, n, width).sum(0) for y in columns.values())]
    basis = torch.stack(per_token, dim=-1)  # (N, D, K)
    basis = basis / basis.norm(dim=1, keepdim=True).clamp_min(1e-30)
    worst = 0.0
    for out in result.double().reshape(-1, n, width):
        fit = torch.linalg.lstsq(basis, out[..., None], driver="gelsd").solution
        rest = (out[..., None] - basis @ fit).norm(dim=1) / out.norm(dim=-1, keepdim=True)
        worst = max(worst, float(rest.max()))
    return worst


def _responds(run: LayerRun, writer: Writer) -> bool:
    """Return whether a random edit of the matrix changes the module's output exactly as predicted."""
    twin: Any = run.twin(writer.module)
    before = trace_modules(run, [writer.module])
    key = id(writer.module)
    if key not in before.outputs:
        return False
    draw = torch.Generator().manual_seed(1)
    o, i = writer.weight.shape
    left = torch.randn(o, 1, generator=draw) / o**0.5
    right = torch.randn(1, i, generator=draw) / i**0.5
    edit = Edit(left, right, 1 + 0.1 * torch.rand(o, generator=draw))
    bias = replace(writer, module=twin).bias
    if bias is not None:  # the scale is for the matrix: undo it for the bias
        assert edit.scale is not None
        edit = replace(edit, shift=bias - edit.scale * bias)
    x, y = before.inputs[key], before.outputs[key]
    with torch.no_grad():
        if writer.expert is None:
            expected = edit.apply_to_output(x, y)
            _write(writer, twin, edit)
        else:
            expected = _predicted_experts(run, twin, edit)
            for expert in range(twin.down_proj.shape[0]):
                _write(replace(writer, expert=expert), twin, edit, bias=False)
    after = trace_modules(run, [writer.module]).outputs[key]
    return bool((after - expected).norm() <= TOLERANCE * expected.norm())


def _predicted_experts(run: LayerRun, twin: Any, edit: Edit) -> Tensor:
    """Compute the experts' output when every expert has this edit, in the way that stacks do."""
    seen: list[Any] = []
    hook = twin.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    run()
    hook.remove()
    plain = replace(edit, shift=None)
    edits = stack_experts(twin, {e: [plain] for e in range(twin.down_proj.shape[0])}, 1)
    bias = getattr(twin, "down_proj_bias", None)
    if bias is not None:
        assert edits.scale is not None
        edits = replace(edits, shift=bias - edits.scale * bias)
    (args, kwargs), *_ = seen
    return edited_forward(twin, edits, torch.zeros(1, dtype=torch.long), *args, **kwargs)


def _write(writer: Writer, twin: nn.Module, edit: Edit, *, bias: bool = True) -> None:
    ours = replace(writer, module=twin)
    ours.weight.copy_(edit.apply_to_weight(ours.weight))
    if bias and ours.bias is not None:
        ours.bias.copy_(edit.apply_to_bias(ours.bias))


def _components(writers: Sequence[Writer]) -> list[str]:
    return list(dict.fromkeys(writer.component for writer in writers)) or ["nothing"]


def _gain(writer: Writer) -> Tensor:
    return torch.ones(1) if writer.gain is None else writer.gain


def flat(y: Tensor) -> Tensor:
    """Flatten to one row per token: (N, D)."""
    return y.reshape(-1, y.shape[-1])


def _float(value: Any) -> Any:
    """Convert floating tensors, also within containers, to float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return type(value)({k: _float(v) for k, v in value.items()})
    if isinstance(value, tuple | list):
        return type(value)(_float(v) for v in value)
    return value
