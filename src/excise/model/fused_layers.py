"""Decoder layers in fewer operations than Transformers' own modules, with the same result.

A search runs millions of short prompts, and much of that time goes to what stands between the matrix
products: norms in seven operations, masks and rotary angles computed for every pass, keys repeated for
every head, positions that nobody asks for. Here layers run as `fused_specs` describes them. Every matrix
is applied by calling its module, so hooks work as usual. `forward` uses this only where it was found to
agree with Transformers' own modules, and not under autograd.

Shapes: B rows, T tokens given, S tokens of those and of what the cache holds, D residual width, H heads,
K key-value heads, d head width.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from excise.model.anatomy import Anatomy
from excise.model.fused_specs import (
    Attention,
    Extra,
    Head,
    Layer,
    Norm,
    head_of,
    layers_of,
    norm_of,
)
from excise.model.parameters import any_offloaded

# On a CPU, plain products are faster than the fused kernel for many short texts with narrow heads.
_SHORT = 64
_NARROW = 64


@dataclass(frozen=True)
class Duplicates:
    """Rows of a pass whose inputs to its first layer are equal, such as those of one prompt."""

    rows: Tensor  # (U,) one row of each group of equal rows
    kinds: Tensor  # (B,) the group of each row


@dataclass(frozen=True)
class Setting:
    """Rotary angles, attention biases and embeddings of one pass, which all its layers share."""

    angles: dict[str, tuple[Tensor, Tensor]]  # by kind: cos and signed sin (B, T, 1, d)
    bias: dict[str, Tensor]  # by kind: (B, 1, T, S), added to scores
    token: Tensor  # (B, T) index among the distinct tokens
    embedded: Tensor  # (U, D) embeddings of the distinct tokens
    extras: Tensor | None  # (U, L, P) their per-layer embeddings

    def last(self, keep: int) -> Setting:
        """Return the part for the last `keep` tokens."""
        return replace(
            self,
            angles={k: (c[:, -keep:], s[:, -keep:]) for k, (c, s) in self.angles.items()},
            bias={k: b[:, :, -keep:] for k, b in self.bias.items()},
            token=self.token[:, -keep:],
        )

    def of(self, rows: Tensor) -> Setting:
        """Return the part for some rows."""
        angles = self.angles.items()
        return replace(
            self,
            angles={k: (c.index_select(0, rows), s.index_select(0, rows)) for k, (c, s) in angles},
            bias={k: b.index_select(0, rows) for k, b in self.bias.items()},
            token=self.token.index_select(0, rows),
        )


@dataclass
class Inputs:
    """Token ids, attention mask and positions of a pass, with the `Setting` once it is computed."""

    ids: Tensor  # (B, T) tokens
    mask: Tensor  # (B, S) attention mask of cached and new tokens: zero at padding
    positions: Tensor  # (B, T)
    setting: Setting | None = None
    # The inputs that these rows were taken from, and their indices there.
    whole: tuple[Inputs, Tensor] | None = None

    def of(self, rows: Tensor) -> Inputs:
        """Return the inputs of some rows."""
        ids, mask, positions = (
            part.index_select(0, rows) for part in (self.ids, self.mask, self.positions)
        )
        return Inputs(ids, mask, positions, whole=(self, rows))


class FusedLayers:
    """The layers and the head of one model, run by their specifications."""

    def __init__(self, backbone: Any, layers: list[Layer], head: Head) -> None:
        self.head = head
        self._backbone = backbone
        self._layers = layers
        self._windows = {layer.attention.kind: layer.attention.window for layer in layers}
        self._norm = norm_of(backbone.norm)
        self._rotary = backbone.rotary_emb
        self._by_kind = "layer_type" in inspect.signature(self._rotary.forward).parameters
        # Above the last layer with its own keys and values, no token attends to others' new states.
        self._last_own = max(i for i, layer in enumerate(layers) if layer.attention.k is not None)

    def run(
        self,
        layers: range,
        given: Inputs,
        cache: Any = None,
        *,
        hidden: Tensor | None = None,
        keep: int = 1,
        duplicates: Duplicates | None = None,
    ) -> Tensor:
        """Run a contiguous range of layers on `hidden`, or on the token embeddings where it is None.

        Args:
            layers: their numbers.
            given: the rows.
            cache: KV cache of earlier tokens; these layers append to it.
            hidden: (B, T, D) output of the layer below; not written.
            keep: how many last positions to return at the top.
            duplicates: rows with equal inputs and equal caches: `hidden` is (U, T, D) then, and the
                first layer's attention runs once per group.

        Returns:
            (B, T, D) below the top layer, else (B, keep, D) after the final norm.
        """
        top = layers.stop == len(self._layers)
        setting, x = self._setting(given), hidden
        if x is None:
            token = (
                setting.token
                if duplicates is None
                else setting.token.index_select(0, duplicates.rows)
            )
            x = F.embedding(token, setting.embedded)
        shared: dict[str, tuple[Tensor, Tensor]] = {}
        trimmed = not top or keep >= x.shape[1]
        for number in layers:
            layer, few = self._layers[number], None
            if not trimmed and number >= self._last_own:
                trimmed, few = True, keep
            x = self._attend(layer, number, x, setting, few, cache, shared, duplicates)
            setting, duplicates = setting.last(few) if few else setting, None
            x = _mlp(layer, x)
            if layer.extra is not None and setting.extras is not None:
                x = _add_extra(
                    layer.extra, x, F.embedding(setting.token, setting.extras[:, number])
                )
            if layer.scalar is not None:
                x = x.mul_(layer.scalar)
        return self._norm(x)[:, -keep:] if top else x

    @property
    def windows(self) -> dict[str, int | None]:
        """The attention window of each kind of layer; None is unbounded."""
        return self._windows

    @property
    def firsts(self) -> list[int]:
        """The first layer of each kind among those with their own keys and values."""
        found: dict[str, int] = {}
        for number, layer in enumerate(self._layers):
            if layer.attention.k is not None:
                found.setdefault(layer.attention.kind, number)
        return list(found.values())

    def looks(self, given: Inputs) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return per layer the attention mask (B, 1, T, S), and cos and sin of its angles (B, T, d)."""
        setting, found = self._setting(given), []
        for layer in self._layers:
            cos, signed = (part[:, :, 0] for part in setting.angles[layer.attention.kind])
            half = signed.shape[-1] // 2
            sin = torch.cat([-signed[..., :half], signed[..., half:]], dim=-1)
            found.append((setting.bias[layer.attention.kind] == 0, cos, sin))
        return found

    def _setting(self, given: Inputs) -> Setting:
        if given.setting is None:
            if given.whole is None:
                given.setting = self._set(given.ids, given.mask, given.positions)
            else:
                whole, rows = given.whole
                given.setting = self._setting(whole).of(rows)
        return given.setting

    def _set(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Setting:
        """Compute what all layers share; on a CPU, embeddings once per distinct token."""
        tokens, seen = ids.shape[1], mask.shape[1]
        if ids.device.type == "cpu":
            different, token = torch.unique(ids, return_inverse=True)
        else:  # a GPU would have Python wait for how many there are
            different = ids.flatten()
            token = torch.arange(len(different), device=ids.device).view_as(ids)
        embedded = self._backbone.embed_tokens(different[None])
        extras = None
        if getattr(self._backbone, "hidden_size_per_layer_input", 0):
            own = self._backbone.get_per_layer_inputs(different[None], embedded)
            extras = self._backbone.project_per_layer_inputs(embedded, own)[0]
        places = torch.arange(seen, device=ids.device)
        looks = mask.bool()[:, None, None, :]
        itself = _bias(places, tokens, 1, embedded.dtype)
        angles, bias = {}, {}
        for kind, window in self._windows.items():
            cos, sin = self._rotary(embedded, places[None], *([kind] if self._by_kind else []))
            half = cos.shape[-1] // 2
            signed = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
            # On a CPU an embedding picks rows several times faster than an index does.
            cos, signed = (F.embedding(positions, table)[:, :, None] for table in (cos[0], signed))
            angles[kind] = (cos, signed)
            bias[kind] = torch.where(looks, _bias(places, tokens, window, embedded.dtype), itself)
        return Setting(angles, bias, token, embedded[0], extras)

    def _attend(
        self,
        layer: Layer,
        number: int,
        x: Tensor,
        setting: Setting,
        few: int | None,
        cache: Any,
        shared: dict[str, tuple[Tensor, Tensor]],
        duplicates: Duplicates | None,
    ) -> Tensor:
        """Run attention and add it to the residual. With `few`, only the last positions are queried."""
        attention = layer.attention
        given = layer.before_attention(x)
        ours = setting if duplicates is None else setting.of(duplicates.rows)
        if attention.k is not None:
            keys, values = _keys_values(attention, given, ours.angles[attention.kind])
            every = keys, values
            if duplicates is not None and (cache is not None or attention.stores):
                every = (
                    keys.index_select(0, duplicates.kinds),
                    values.index_select(0, duplicates.kinds),
                )
            if cache is not None:
                every = cache.update(*every, number)
                keys, values = every
                if duplicates is not None:
                    keys, values = (part.index_select(0, duplicates.rows) for part in every)
            if attention.stores:
                shared[attention.kind] = every
        else:
            keys, values = shared[attention.kind]
        if few is not None:
            x, given, ours = x[:, -few:], given[:, -few:], ours.last(few)
        queries = _heads(attention.q(given), attention.width, attention.q_norm)
        queries = _rotate(queries, ours.angles[attention.kind])
        out = attend(queries, keys, values, ours.bias[attention.kind], attention.scaling)
        if duplicates is not None:
            out, x = out.index_select(0, duplicates.kinds), x.index_select(0, duplicates.kinds)
        return _sum(attention.o(out), layer.after_attention, x)


def _mlp(layer: Layer, x: Tensor) -> Tensor:
    given = layer.before_mlp(x)
    inner = layer.act(layer.gate(given)).mul_(layer.up(given))
    return _sum(layer.down(inner), layer.after_mlp, x)


def _add_extra(extra: Extra, x: Tensor, embedded: Tensor) -> Tensor:
    """Add the gated per-layer embeddings `embedded` (B, T, P) to the residual."""
    inner = extra.act(extra.gate(x)).mul_(embedded)
    return _sum(extra.projection(inner), extra.after, x)


def _sum(written: Tensor, after: Norm | None, x: Tensor) -> Tensor:
    """Return a writer's output, through its post-norm, plus the residual; newly allocated."""
    return x + written if after is None else after(written).add_(x)


def _keys_values(
    attention: Attention, given: Tensor, angles: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return keys and values (B, K, T, d)."""
    assert attention.k is not None
    plain = attention.k(given)
    values = plain if attention.v is None else attention.v(given)
    keys = _rotate(_heads(plain, attention.width, attention.k_norm), angles)
    values = _heads(values, attention.width, attention.v_norm)
    return keys.transpose(1, 2), values.transpose(1, 2)


def _heads(x: Tensor, width: int, norm: Norm | None) -> Tensor:
    """Split (B, T, H d) into heads (B, T, H, d), normalised."""
    heads = x.view(*x.shape[:-1], -1, width)
    return heads if norm is None else norm(heads)


def _rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary position embedding (Su et al., 2021) to (B, T, H, d)."""
    cos, signed_sin = angles
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], signed_sin[..., :half])
    out[..., half:].addcmul_(x[..., :half], signed_sin[..., half:])
    return out


def _bias(places: Tensor, tokens: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return the causal attention bias (T, S) within a window: zero where allowed, else minus infinity."""
    query = places[-tokens:, None]
    far = places > query
    if window is not None:
        far |= query - places >= window
    return torch.zeros(far.shape, dtype=dtype, device=far.device).masked_fill_(far, float("-inf"))


def attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Return attention (B, T, H d) of queries (B, T, H, d) to keys and values (B, K, S, d)."""
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
    # Grouped-query attention: one product for all heads of a key-value head.
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


def fused_layers_of(model: Any, anatomy: Anatomy) -> FusedLayers | None:
    """Return the fused layers of a model whose family is known, or None. The caller must verify them.

    For float32 alone, where a comparison is sharp: in half precision, rounding would hide differences.
    """
    parameters = [*anatomy.backbone.parameters(), *model.get_output_embeddings().parameters()]
    kinds = {(parameter.device, parameter.dtype) for parameter in parameters}
    if len(kinds) > 1 or any_offloaded(model) or kinds.pop()[1] != torch.float32:
        return None
    layers = layers_of(anatomy)
    return None if layers is None else FusedLayers(anatomy.backbone, layers, head_of(model))
