"""A preallocated KV cache, which does not copy itself at every token.

Fits Transformers' `Cache`: attention layers get a `RoomyLayer`, every other kind of layer keeps the
class that Transformers chose for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from copy import copy, deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import (
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values (B, H, capacity, d), of which the first `length` positions are filled.

    Sliding-window layers keep every position too; the mask hides what is out of the window.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch, heads and widths of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        b, h, _, d = key_states.shape
        self.keys = key_states.new_empty(b, h, self.capacity, d)
        self.values = value_states.new_empty(b, h, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new positions; return all filled ones."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        assert end <= self.capacity, "the cache was made too small"
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Return the number of filled positions."""
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        if self.length:
            self.keys = self.keys.index_select(0, indices.to(self.keys.device))
            self.values = self.values.index_select(0, indices.to(self.values.device))

    def copy_rows(self, other: RoomyLayer, rows: Tensor, pads: Tensor | None = None) -> None:
        """Append the filled positions of these rows of `other`; a row may come more than once.

        With `pads`, each row is shifted right by so many positions and cut at the end. The positions
        before it must be masked.
        """
        rows = rows.to(other.keys.device)
        keys, values = other.keys[:, :, : other.length], other.values[:, :, : other.length]
        if pads is None:
            self.update(keys.index_select(0, rows), values.index_select(0, rows))
            return
        places = torch.arange(other.length, device=rows.device)
        places = (places - pads.to(rows.device)[:, None]).clamp_min(0)
        self.update(_picked(keys, rows, places), _picked(values, rows, places))


def _picked(states: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """Gather from states (B, H, S, d) the rows (N,), each at its own positions (N, T): (N, H, T, d)."""
    heads, seen, width = states.shape[1:]
    each = rows[:, None] * heads + torch.arange(heads, device=rows.device)
    # As an embedding: on a CPU it takes half the time of an index over two axes.
    return F.embedding(each[..., None] * seen + places[:, None], states.reshape(-1, width))


def cache_argument(backbone: nn.Module) -> str | None:
    """Return the name of a backbone's cache argument; None where it takes none.

    Transformers 5.24 renamed it, and warns where it is called by the name of before.
    """
    parameters = inspect.signature(type(backbone).forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


def roomy_cache(config: Any, *, sliding: bool = True) -> DynamicCache:
    """Return an empty cache without capacity: a pattern for `with_room`.

    Without `sliding`, layers with a window keep Transformers' class, which drops what is out of it: for
    models whose masks are not known to hide that.
    """
    cache = DynamicCache(config=config)
    plain = (DynamicLayer, DynamicSlidingWindowLayer) if sliding else (DynamicLayer,)
    cache.layers = [RoomyLayer(0) if type(layer) in plain else layer for layer in cache.layers]
    return cache


def with_room(pattern: DynamicCache, capacity: int) -> DynamicCache:
    """Return an empty cache for `capacity` positions. Making one from a config is slow."""
    cache = copy(pattern)
    cache.layers = [
        RoomyLayer(capacity) if isinstance(layer, RoomyLayer) else deepcopy(layer)
        for layer in pattern.layers
    ]
    return cache


def select_rows(cache: DynamicCache, rows: list[int]) -> None:
    """Keep only these rows of every layer."""
    indices = torch.tensor(rows)
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            layer.reorder_cache(indices)  # its name for the same; it covers keys and values too
        else:
            layer.batch_select_indices(indices)


def take_rows(
    cache: DynamicCache,
    empty: DynamicCache,
    rows: Sequence[int],
    layers: range,
    pads: Sequence[int],
) -> DynamicCache:
    """Copy these rows into an empty cache; for caches that `can_join`.

    Args:
        cache: where the rows come from.
        empty: where they go.
        rows: which ones; a row may come more than once.
        layers: the layers to copy; of others only the length, which masks follow.
        pads: how far each row is shifted right, as in `RoomyLayer.copy_rows`.
    """
    picked, moved = torch.tensor(rows), torch.tensor(pads) if any(pads) else None
    for number, (ours, theirs) in enumerate(zip(empty.layers, cache.layers, strict=True)):
        if isinstance(theirs, DummyLayer):
            continue
        if number in layers:
            ours.copy_rows(theirs, picked, moved)
        else:
            ours.length = theirs.length
    return empty


def keep_ends(
    cache: DynamicCache, empty: DynamicCache, ends: Sequence[int], width: int
) -> DynamicCache:
    """Copy the `width` positions before each row's end into an empty cache; for caches that `can_join`.

    Args:
        cache: where the rows come from.
        empty: where they go.
        ends: the position after the last one that is wanted of each row. Where fewer than `width`
            positions stand before it, the first ones of the copy must be masked.
        width: positions of the copy.
    """
    rows = torch.arange(len(ends))
    places = (torch.arange(width) + (torch.tensor(ends) - width)[:, None]).clamp_min(0)
    for ours, theirs in zip(empty.layers, cache.layers, strict=True):
        if not isinstance(theirs, DummyLayer):
            device = theirs.keys.device
            states = (theirs.keys, theirs.values)
            ours.update(*(_picked(s, rows.to(device), places.to(device)) for s in states))
    return empty


def can_join(cache: DynamicCache) -> bool:
    """Return whether caches like this can be joined: each layer keeps plain keys and values, or none."""
    return all(isinstance(layer, RoomyLayer | DummyLayer) for layer in cache.layers)


def join(parts: list[DynamicCache], empty: DynamicCache, groups: int, width: int) -> DynamicCache:
    """Join the rows of several caches in an empty one, so that they decode as one batch.

    Every part holds `groups` equal groups of rows (candidates), which are adjacent in the result. Shorter
    parts are left-padded to `width` positions with zeros, which must be masked.
    """
    for number, layer in enumerate(empty.layers):
        if isinstance(layer, DummyLayer):  # it reuses another layer's keys and values
            continue
        filled = [part.layers[number] for part in parts]
        rows = sum(one.keys.shape[0] for one in filled)
        first = filled[0]
        layer.lazy_initialization(
            first.keys[:1].expand(rows, -1, -1, -1), first.values[:1].expand(rows, -1, -1, -1)
        )
        for name in ("keys", "values"):
            into = getattr(layer, name).unflatten(0, (groups, -1))  # (C, P, H, capacity, d)
            start = 0
            for one in filled:
                states = getattr(one, name)[:, :, : one.length].unflatten(0, (groups, -1))
                into[:, start : start + states.shape[1], :, : width - one.length] = 0
                into[:, start : start + states.shape[1], :, width - one.length : width] = states
                start += states.shape[1]
        layer.length = width
    return empty


def share_lower_layers(source: DynamicCache, into: DynamicCache, layers: int, rows: Tensor) -> None:
    """Fill the first `layers` layers of `into` with these rows of `source`, which is used up."""
    for number, theirs in enumerate(source.layers[:layers]):
        ours = into.layers[number]
        if isinstance(theirs, DummyLayer):
            continue
        if isinstance(ours, RoomyLayer) and isinstance(theirs, RoomyLayer):
            if theirs.length:
                ours.length = 0
                ours.copy_rows(theirs, rows)
        else:  # states of other kinds: their rows are repeated where they stand, and handed over
            theirs.reorder_cache(rows)
            into.layers[number] = theirs
