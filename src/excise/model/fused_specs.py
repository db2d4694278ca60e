"""Specifications of a few families' decoder layers and heads, on their own modules, for `fused_layers`.

Knows how layers are put together; knows nothing of passes. B rows, T tokens, D residual width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUTanh

from excise.model.anatomy import Anatomy

_Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Norm:
    """An RMS norm's module: x / rms(x), times its weight where it has one."""

    module: Any
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return the normalised tensor, newly allocated."""
        weight = getattr(self.module, "weight", None)
        if x.device.type != "cpu":
            return F.rms_norm(x, x.shape[-1:], weight, self.eps)
        # There PyTorch squares into a tensor of its own.
        square: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        out: Tensor = x * square.div_(x.shape[-1]).add_(self.eps).rsqrt_()
        return out if weight is None else out.mul_(weight)


@dataclass(frozen=True)
class Attention:
    """One layer's attention. Without `k` it reuses the keys and values that a layer of its kind stored."""

    q: nn.Module
    k: nn.Module | None
    v: nn.Module | None  # where there is a `k` only, values are keys before their norm
    o: nn.Module
    q_norm: Norm | None
    k_norm: Norm | None
    v_norm: Norm | None
    width: int  # d
    scaling: float
    kind: str  # of the layers whose angles, window and shared keys and values are the same
    window: int | None
    stores: bool  # layers above take its keys and values


@dataclass(frozen=True)
class Extra:
    """The gated per-layer embedding that is added at the end of a layer (Gemma 3n, 4)."""

    gate: nn.Module
    act: _Function
    projection: nn.Module
    after: Norm


@dataclass(frozen=True)
class Layer:
    """One layer: norm, attention, norm, sum; norm, gated MLP, norm, sum."""

    before_attention: Norm
    attention: Attention
    after_attention: Norm | None
    before_mlp: Norm
    gate: nn.Module
    act: _Function
    up: nn.Module
    down: nn.Module
    after_mlp: Norm | None
    extra: Extra | None = None
    scalar: Tensor | None = None


@dataclass(frozen=True)
class Head:
    """The language model head: a matrix, and a logit soft cap where there is one."""

    module: nn.Module
    cap: float | None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits (N, V) of hidden states (N, D)."""
        logits: Tensor = self.module(hidden)
        return logits if self.cap is None else (logits / self.cap).tanh_().mul_(self.cap)


def gelu_tanh(x: Tensor) -> Tensor:
    """Return GELU in its tanh form, as x sigmoid(2 u): on a CPU an exponential costs half of a tanh."""
    if x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")
    rate = x.new_full((), 2 * _GELU_RATE)
    inner = torch.addcmul(rate, x, x, value=2 * _GELU_RATE * _GELU_CUBE).mul_(x)
    return inner.sigmoid_().mul_(x)


_GELU_RATE = 0.7978845608028654  # sqrt(2 / pi)
_GELU_CUBE = 0.044715


def norm_of(module: Any) -> Norm:
    """Return a module as a norm; families name its epsilon in two ways."""
    eps = getattr(module, "eps", None)
    return Norm(module, module.variance_epsilon if eps is None else eps)


def head_of(model: Any) -> Head:
    """Return the head of a language model."""
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return Head(model.get_output_embeddings(), cap)


def _maybe_norm(owner: Any, name: str) -> Norm | None:
    module = getattr(owner, name, None)
    return None if module is None else norm_of(module)


def _act(module: Any) -> _Function:
    return gelu_tanh if isinstance(module, GELUTanh) else module


def _gemma4(layer: Any) -> Layer | None:
    if layer.enable_moe_block:
        return None
    extra = None
    if layer.hidden_size_per_layer_input:
        extra = Extra(
            layer.per_layer_input_gate,
            _act(layer.act_fn),
            layer.per_layer_projection,
            norm_of(layer.post_per_layer_input_norm),
        )
    attention = _attention(layer.self_attn, layer.self_attn.layer_type)
    return Layer(
        before_attention=norm_of(layer.input_layernorm),
        attention=replace(attention, stores=layer.self_attn.store_full_length_kv),
        after_attention=norm_of(layer.post_attention_layernorm),
        before_mlp=norm_of(layer.pre_feedforward_layernorm),
        **_gated(layer.mlp),
        after_mlp=norm_of(layer.post_feedforward_layernorm),
        extra=extra,
        scalar=layer.layer_scalar,
    )


def _plain(layer: Any) -> Layer:
    """Return a pre-norm layer, as in Llama and Qwen3."""
    kind = getattr(layer.self_attn, "layer_type", None) or ""
    return Layer(
        before_attention=norm_of(layer.input_layernorm),
        attention=_attention(layer.self_attn, kind),
        after_attention=None,
        before_mlp=norm_of(layer.post_attention_layernorm),
        **_gated(layer.mlp),
        after_mlp=None,
    )


def _attention(module: Any, kind: str) -> Attention:
    return Attention(
        q=module.q_proj,
        k=getattr(module, "k_proj", None),
        v=getattr(module, "v_proj", None),
        o=module.o_proj,
        q_norm=_maybe_norm(module, "q_norm"),
        k_norm=_maybe_norm(module, "k_norm"),
        v_norm=_maybe_norm(module, "v_norm"),
        width=module.head_dim,
        scaling=module.scaling,
        kind=kind,
        window=getattr(module, "sliding_window", None),
        stores=False,
    )


def _gated(mlp: Any) -> dict[str, Any]:
    return {
        "gate": mlp.gate_proj,
        "act": _act(mlp.act_fn),
        "up": mlp.up_proj,
        "down": mlp.down_proj,
    }


# Rotary embeddings whose angles do not depend on the length of the text.
_FIXED_ROPES = {"default", "linear", "llama3", "proportional", "yarn"}

# By the backbone's class in Transformers, so that a model's own code is not taken for it.
_READERS: dict[str, Callable[[Any], Layer | None]] = {
    "gemma4.modeling_gemma4.Gemma4TextModel": _gemma4,
    "llama.modeling_llama.LlamaModel": _plain,
    "qwen3.modeling_qwen3.Qwen3Model": _plain,
}


def layers_of(anatomy: Anatomy) -> list[Layer] | None:
    """Return the specifications of a model's layers, or None where its family is not known here."""
    backbone: Any = anatomy.backbone
    named = f"{type(backbone).__module__}.{type(backbone).__qualname__}"
    reader = _READERS.get(named.removeprefix("transformers.models."))
    if reader is None:
        return None
    ropes = backbone.rotary_emb.rope_type  # one, or one by the kind of layer
    if not _FIXED_ROPES.issuperset(ropes.values() if isinstance(ropes, dict) else [ropes]):
        return None
    layers = [reader(layer) for layer in anatomy.layers]
    known = [layer for layer in layers if layer is not None]
    return known if len(known) == len(layers) else None
