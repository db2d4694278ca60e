"""A decoder's layers in fewer operations than Transformers' own modules take, to the same result.

A search reads millions of short texts, and at most widths a good part of that time goes to what stands
between the matrix products: norms in seven operations, masks and angles made anew for every pass, keys
repeated for every head, states of tokens that nothing asks for. This module says what the layers of a
few families compute, as plain functions on their own modules; every matrix is still applied by calling
its module, so hooks on it see what they always see. It is used only where `apart` says that it gives
what Transformers' own forward pass gives, and never under autograd.

Shapes: B rows, T tokens given, S tokens of those and of what the cache holds, D residual width, H heads,
K key-value heads, d head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUTanh

from excise.anatomy import Anatomy
from excise.weights import any_offloaded

# On a CPU, plain products are faster than the fused kernel for many short texts with narrow heads.
_SHORT = 64
_NARROW = 64

_Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Norm:
    """An RMS norm's module: x / rms(x), times its weight where it has one."""

    module: Any
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """The same shape, in memory of its own."""
        weight = getattr(self.module, "weight", None)
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return F.rms_norm(x, x.shape[-1:], weight, self.eps)
        # There PyTorch squares into a tensor of its own.
        square: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        out: Tensor = x * square.div_(x.shape[-1]).add_(self.eps).rsqrt_()
        return out if weight is None else out.mul_(weight)


@dataclass(frozen=True)
class Attention:
    """One layer's attention. Without `k`, keys and values are those that a layer of its kind stored."""

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
    stores: bool  # layers above take its keys and values


@dataclass(frozen=True)
class Extra:
    """What per-layer embeddings add at the end of a layer."""

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
class _Setting:
    """What all layers of one pass share, at the tokens that take part."""

    angles: dict[str, tuple[Tensor, Tensor]]  # by kind: cos and signed sin (B, T, 1, d)
    bias: dict[str, Tensor]  # by kind: (B, 1, T, S), added to scores
    extras: Tensor | None  # (U, L, P) per-layer embeddings of the different tokens
    token: Tensor  # (B, T) which of them each one is

    def last(self, keep: int) -> _Setting:
        """The same for the last tokens alone."""
        return replace(
            self,
            angles={k: (c[:, -keep:], s[:, -keep:]) for k, (c, s) in self.angles.items()},
            bias={k: b[:, :, -keep:] for k, b in self.bias.items()},
            token=self.token[:, -keep:],
        )


class Lean:
    """The layers of one model, run lean."""

    def __init__(self, backbone: Any, layers: list[Layer], windows: dict[str, int | None]) -> None:
        self._backbone = backbone
        self._layers = layers
        self._windows = windows
        self._norm = _norm(backbone.norm)
        self._rotary = backbone.rotary_emb
        self._by_kind = "layer_type" in inspect.signature(self._rotary.forward).parameters
        # Above the last layer with keys and values of its own, no token looks at another's states.
        self._last_own = max(i for i, layer in enumerate(layers) if layer.attention.k is not None)

    def run(
        self,
        layers: range,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: Any = None,
        *,
        hidden: Tensor | None = None,
        keep: int = 1,
    ) -> Tensor:
        """What these layers make of `hidden`, or of the embeddings of `ids`.

        Args:
            layers: without a gap; (B, T, D) is returned where they end below the top, else
                (B, keep, D) after the final norm.
            ids, positions: (B, T).
            mask: (B, S), one where there is a token.
            cache: keys and values of what was read before; these layers write to it.
            hidden: (B, T, D) what the layers below give; it stays as it is.
            keep: how many last tokens are asked for at the top.
        """
        top = layers.stop == len(self._layers)
        setting, embedded = self._set(ids, mask, positions, layers, hidden is None)
        x = embedded if hidden is None else hidden
        assert x is not None
        shared: dict[str, tuple[Tensor, Tensor]] = {}
        trimmed = not top or keep >= x.shape[1]
        for number in layers:
            layer, few = self._layers[number], None
            if not trimmed and number >= self._last_own:
                trimmed, few = True, setting.last(keep)
            x = self._attend(layer, number, x, setting, few, cache, shared)
            setting = few or setting
            x = _mlp(layer, x)
            if layer.extra is not None and setting.extras is not None:
                x = _add_extra(layer.extra, x, setting.extras[:, number][setting.token])
            if layer.scalar is not None:
                x = x.mul_(layer.scalar)
        return self._norm(x)[:, -keep:] if top else x

    def _set(
        self, ids: Tensor, mask: Tensor, positions: Tensor, layers: range, embed: bool
    ) -> tuple[_Setting, Tensor | None]:
        """What these layers share, and the embeddings (B, T, D) where they are wanted.

        What follows from a token alone is made once per different token.
        """
        tokens, seen = ids.shape[1], mask.shape[1]
        different, token = torch.unique(ids, return_inverse=True)
        embedded = self._backbone.embed_tokens(different[None])
        extras = None
        if getattr(self._backbone, "hidden_size_per_layer_input", 0):
            given = self._backbone.get_per_layer_inputs(different[None], embedded)
            extras = self._backbone.project_per_layer_inputs(embedded, given)[0]
        places = torch.arange(seen, device=ids.device)
        looks = mask.bool()[:, None, None, :]
        angles, bias = {}, {}
        for kind in dict.fromkeys(self._layers[number].attention.kind for number in layers):
            cos, sin = self._rotary(embedded, places[None], *([kind] if self._by_kind else []))
            half = cos.shape[-1] // 2
            signed = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
            angles[kind] = (cos[0][positions][:, :, None], signed[positions][:, :, None])
            near = _bias(places, tokens, self._windows[kind], embedded.dtype)
            bias[kind] = torch.where(looks, near, _bias(places, tokens, 1, embedded.dtype))
        return _Setting(angles, bias, extras, token), embedded[0][token] if embed else None

    def _attend(
        self,
        layer: Layer,
        number: int,
        x: Tensor,
        setting: _Setting,
        few: _Setting | None,
        cache: Any,
        shared: dict[str, tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Attention and its sum. With `few`, keys and values of all tokens, but only the last go on."""
        attention = layer.attention
        given = layer.before_attention(x)
        if attention.k is not None:
            keys, values = _keys_values(attention, given, setting.angles[attention.kind])
            if cache is not None:
                keys, values = cache.update(keys, values, number)
            if attention.stores:
                shared[attention.kind] = keys, values
        else:
            keys, values = shared[attention.kind]
        if few is not None:
            keep = few.token.shape[1]
            x, given, setting = x[:, -keep:], given[:, -keep:], few
        queries = _heads(attention.q(given), attention.width, attention.q_norm)
        queries = _rotate(queries, setting.angles[attention.kind])
        out = attend(queries, keys, values, setting.bias[attention.kind], attention.scaling)
        out = attention.o(out)
        return _sum(out, layer.after_attention, x)


def _mlp(layer: Layer, x: Tensor) -> Tensor:
    given = layer.before_mlp(x)
    inner = layer.act(layer.gate(given)).mul_(layer.up(given))
    return _sum(layer.down(inner), layer.after_mlp, x)


def _add_extra(extra: Extra, x: Tensor, embedded: Tensor) -> Tensor:
    """`embedded` (B, T, P): what the layer is given of its tokens' per-layer embeddings."""
    inner = extra.act(extra.gate(x)).mul_(embedded)
    return _sum(extra.projection(inner), extra.after, x)


def _sum(written: Tensor, after: Norm | None, x: Tensor) -> Tensor:
    """What a writer gives, through its post-norm, plus the residual; in memory of its own."""
    return x + written if after is None else after(written).add_(x)


def _keys_values(
    attention: Attention, given: Tensor, angles: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """(B, K, T, d) each."""
    assert attention.k is not None
    plain = attention.k(given)
    values = plain if attention.v is None else attention.v(given)
    keys = _rotate(_heads(plain, attention.width, attention.k_norm), angles)
    values = _heads(values, attention.width, attention.v_norm)
    return keys.transpose(1, 2), values.transpose(1, 2)


def _heads(x: Tensor, width: int, norm: Norm | None) -> Tensor:
    """(B, T, H, d)."""
    heads = x.view(*x.shape[:-1], -1, width)
    return heads if norm is None else norm(heads)


def _rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding (Su et al., 2021) of (B, T, H, d)."""
    cos, signed_sin = angles
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


def _bias(places: Tensor, tokens: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """(T, S): zero where one of the last tokens may look, else minus infinity. At itself it always may."""
    query = places[-tokens:, None]
    far = places > query
    if window is not None:
        far |= query - places >= window
    return torch.zeros(far.shape, dtype=dtype, device=far.device).masked_fill_(far, float("-inf"))


def attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Attention (B, T, H d) of queries (B, T, H, d) to keys and values (B, K, S, d)."""
    rows, tokens, heads, width = queries.shape
    groups, seen = keys.shape[1:3]
    on_cpu = queries.device.type == "cpu"
    if not on_cpu or seen > _SHORT or width > _NARROW:
        if (
            not on_cpu and heads != groups
        ):  # with a mask, no fast kernel of a GPU repeats them itself
            keys, values = (x.repeat_interleave(heads // groups, dim=1) for x in (keys, values))
        out = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            keys,
            values,
            bias,
            scale=scaling,
            enable_gqa=on_cpu and heads != groups,
        )
        return out.transpose(1, 2).flatten(2)
    # The heads that share keys stand together: one product for all of them.
    each = heads // groups
    grouped = queries.view(rows, tokens, groups, each, width).permute(0, 2, 3, 1, 4)
    asked = grouped.reshape(rows * groups, each * tokens, width)
    known = keys.reshape(rows * groups, seen, width)
    scores = torch.bmm(asked, known.mT).view(rows, heads, tokens, seen)
    if scaling != 1.0:
        scores.mul_(scaling)
    shares = scores.add_(bias).softmax(-1).view(rows * groups, each * tokens, seen)
    out = torch.bmm(shares, values.reshape(rows * groups, seen, width))
    return out.view(rows, groups, each, tokens, width).permute(0, 3, 1, 2, 4).flatten(2)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form, as x sigmoid(2 u): on a CPU an exponential costs half of a tanh."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.gelu(x, approximate="tanh")
    inner = (x * x).mul_(2 * _GELU_RATE * _GELU_CUBE).add_(2 * _GELU_RATE).mul_(x)
    return inner.sigmoid_().mul_(x)


_GELU_RATE = 0.7978845608028654  # sqrt(2 / pi)
_GELU_CUBE = 0.044715


def _norm(module: Any) -> Norm:
    eps = getattr(module, "eps", None)
    return Norm(module, module.variance_epsilon if eps is None else eps)


def _maybe_norm(owner: Any, name: str) -> Norm | None:
    module = getattr(owner, name, None)
    return None if module is None else _norm(module)


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
            _norm(layer.post_per_layer_input_norm),
        )
    attention = _attention(layer.self_attn, layer.self_attn.layer_type)
    return Layer(
        before_attention=_norm(layer.input_layernorm),
        attention=replace(attention, stores=layer.self_attn.store_full_length_kv),
        after_attention=_norm(layer.post_attention_layernorm),
        before_mlp=_norm(layer.pre_feedforward_layernorm),
        **_gated(layer.mlp),
        after_mlp=_norm(layer.post_feedforward_layernorm),
        extra=extra,
        scalar=layer.layer_scalar,
    )


def _plain(layer: Any) -> Layer:
    """As in Llama and Qwen3: one norm before each sublayer."""
    kind = getattr(layer.self_attn, "layer_type", None) or ""
    return Layer(
        before_attention=_norm(layer.input_layernorm),
        attention=_attention(layer.self_attn, kind),
        after_attention=None,
        before_mlp=_norm(layer.post_attention_layernorm),
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
        stores=False,
    )


def _gated(mlp: Any) -> dict[str, Any]:
    return {
        "gate": mlp.gate_proj,
        "act": _act(mlp.act_fn),
        "up": mlp.up_proj,
        "down": mlp.down_proj,
    }


# Whose angles follow from the position alone, however long the text is.
_FIXED_ROPES = {"default", "linear", "llama3", "proportional", "yarn"}

# By the backbone's class in Transformers, so that a model's own code is not taken for it.
_READERS: dict[str, Callable[[Any], Layer | None]] = {
    "gemma4.modeling_gemma4.Gemma4TextModel": _gemma4,
    "llama.modeling_llama.LlamaModel": _plain,
    "qwen3.modeling_qwen3.Qwen3Model": _plain,
}


def lean_of(model: Any, anatomy: Anatomy) -> Lean | None:
    """The lean way through a model, if one is known; whether it is right, only `apart` can say."""
    kind = type(anatomy.backbone)
    named = f"{kind.__module__}.{kind.__qualname__}".removeprefix("transformers.models.")
    reader = _READERS.get(named)
    devices = {parameter.device for parameter in anatomy.backbone.parameters()}
    if reader is None or len(devices) > 1 or any_offloaded(model):
        return None
    ropes = anatomy.backbone.rotary_emb.rope_type  # one, or one by the kind of layer
    if not _FIXED_ROPES.issuperset(ropes.values() if isinstance(ropes, dict) else [ropes]):
        return None
    layers = []
    for layer in anatomy.layers:
        read = reader(layer)
        if read is None:
            return None
        layers.append(read)
    windows = {
        one.attention.kind: getattr(layer.self_attn, "sliding_window", None)
        for one, layer in zip(layers, anatomy.layers, strict=True)
    }
    return Lean(anatomy.backbone, layers, windows)
