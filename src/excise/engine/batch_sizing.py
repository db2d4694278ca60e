"""Batch sizes from measured throughput, within free memory and a short measuring time.

Shapes: B rows, T tokens of the longest of them; a pass holds B x T tokens and B x T x T pairs of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from statistics import median_low
from typing import Any

import torch

from excise.checkpoints.loading import Loaded
from excise.config import Config
from excise.engine.engine import Engine, Plan
from excise.errors import RunStateError, is_out_of_memory
from excise.events import OnEvent, Progress, ignore
from excise.model.devices import finish, free_bytes
from excise.model.forward import Forward
from excise.model.parameters import any_offloaded

_GAIN = 1.05  # a larger batch must have this much more throughput to be worth its memory
_DECODE_FACTOR = 8
# The residual states of a pass, in float32, should take at least this much: below it the edits of many
# candidates cost more than what the smaller pass gains. Wide models reach it with few rows.
_FEWEST_BYTES = 3 * 2**20
_LARGEST_BATCH = 16  # candidates asked together: more would make the sampler blind for longer
_LARGEST_STACK = _LARGEST_BATCH  # the more share a pass, the less often what they share is run
_FIRST_ROWS, _FIRST_TOKENS = 16, 4096  # of the smallest pass that is measured
_SMALLEST = 16  # tokens of the first of the passes that say whether there is time for that
_OFFLOADED_TOKENS = 2**15  # of a pass that takes as long as it takes to bring the weights
_REPEATS = 3
# Measuring sizes ends after so many seconds, and after this share of what the search is likely to take.
_SECONDS, _SHARE = 3.0, 0.03
_TIMES_USUAL = 4  # a prompt this much longer than the median has passes of its own
_SCORES = 3 * 4  # bytes of a score: three float32 at once where attention keeps them


@dataclass(frozen=True)
class Sizing:
    """Batch sizes of a run, stored with the study so that a resume repeats them."""

    plan: Plan
    batch: int

    def as_dict(self) -> dict[str, Any]:
        """Return the form that study and record hold."""
        return {**vars(self.plan), "batch": self.batch}


@dataclass(frozen=True)
class Room:
    """Memory for a pass, and what its parts take, in bytes.

    Attributes:
        free: how much there is.
        row: of every row, however long it is: states of linear attention.
        token: of every token: keys, values and activations.
        pair: of two tokens of one row: attention's bias, and scores where they are kept.
    """

    free: float
    row: int
    token: int
    pair: int

    def rows(self, tokens: int, *, read: bool = True) -> int:
        """Return how many rows of `tokens` tokens fit, at least one; without `read`, in a decode step."""
        pairs = tokens * self.pair if read else 0
        return max(1, int(self.free / (self.row + tokens * (self.token + pairs))))

    def bound(self, plan: Plan, usual: int) -> Plan:
        """Return the plan with bounds on tokens and pairs, for texts of `usual` tokens."""
        pairs = max(1, int(self.free / self.pair)) if self.pair else None
        tokens = max(1, int(self.free / (self.token + self.row / usual)))
        return replace(plan, tokens=tokens, pairs=pairs)


def size(
    loaded: Loaded,
    config: Config,
    usual: int,
    prompts: int,
    on_event: OnEvent = ignore,
) -> Sizing:
    """Choose rows, stack and batch, as far as the configuration leaves them open.

    Args:
        loaded: the model, on its device.
        config: `engine` and `search` sections are read.
        usual: tokens of the longest prompt but for a few; see `usual_length`.
        prompts: prompts of the larger side.
        on_event: told of every size that is measured.
    """
    new, room = config.scores.max_new_tokens, room_of(loaded, config)
    rows = config.engine.rows
    if not rows:
        most = min(room.rows(usual + new), prompts * _LARGEST_BATCH)
        fewest = -(-_FEWEST_BYTES // (4 * loaded.anatomy.width * usual))
        trials = config.search.trials * prompts * (2 * usual + new)
        rows = max(_fastest_rows(loaded, usual, most, trials, on_event), min(fewest, most))
    # A pass that decodes has one token per row, so many more rows fit it before it stops gaining.
    decode = config.engine.rows * _DECODE_FACTOR or _LARGEST_STACK * prompts
    decode = max(1, min(room.rows(usual + new, read=False), decode))
    stack = max(1, min(decode // prompts, _LARGEST_STACK))
    batch = config.search.batch or min(_LARGEST_BATCH, max(4, 2 * stack))
    plan = Plan(rows, min(stack, batch), decode, config.engine.reuse)
    return Sizing(room.bound(plan, usual + new), batch)


def from_dict(known: dict[str, Any]) -> Sizing:
    """Return the sizing that a study was started with; earlier versions stored no bounds on tokens.

    Raises:
        RunStateError: it is not one.
    """
    numbers = [known.get(name) for name in ("rows", "stack", "decode", "batch")]
    bounds = {n: known[n] for n in ("tokens", "pairs") if known.get(n) is not None}
    good = all(isinstance(n, int) and n >= 1 for n in (*numbers, *bounds.values()))
    if not good or not isinstance(known.get("reuse"), bool):
        raise RunStateError(
            "the sizes of passes that this run was measured with (rows, stack, decode, batch, reuse) are "
            "not all there: put its record and journal back as they were, or choose a new --out"
        )
    rows, stack, decode, batch = map(int, filter(None, numbers))
    return Sizing(replace(Plan(rows, stack, decode, known["reuse"]), **bounds), batch)


def direction_engine(
    loaded: Loaded,
    prompts: dict[str, list[list[int]]],
    config: Config,
    spoken: Sequence[int] = (),
    on_event: OnEvent = ignore,
) -> Engine:
    """Return an engine for the original model's own responses to these prompts, by side."""
    limit, usual = config.scores.max_new_tokens, Plan()
    lengths = [len(row) for rows in prompts.values() for row in rows]
    plan = Plan(rows=config.engine.rows or usual.rows)
    plan = within_memory(plan, loaded, config, usual_length(lengths))
    more: dict[str, Any] = {"plan": plan, "spoken": spoken, "on_event": on_event}
    return Engine(loaded, (), prompts, max_new_tokens=limit, **more)


def usual_length(lengths: Sequence[int]) -> int:
    """Return the longest length to size batches for: the maximum, capped at a multiple of the median.

    The few prompts beyond it run in smaller batches; sizes for them would slow the whole search.
    """
    return min(max(lengths), _TIMES_USUAL * median_low(lengths))


def within_memory(plan: Plan, loaded: Loaded, config: Config, usual: int) -> Plan:
    """Return the plan bounded by the memory that is free now, for prompts of `usual` tokens."""
    return room_of(loaded, config).bound(plan, usual + config.scores.max_new_tokens)


def room_of(loaded: Loaded, config: Config) -> Room:
    """Return the memory that is free now, and what a pass of this model takes."""
    inner = max(writer.shape[1] for writer in loaded.anatomy.writers)
    activations = loaded.dtype.itemsize * (8 * loaded.anatomy.width + 4 * inner)
    free = config.engine.memory_fraction * free_bytes(loaded.device)
    # Beside a pass stand the logits of its last part, which are fewer where passes are small.
    room = max(free / 2, free - loaded.forward.chunk_bytes)
    cache, masks = _filled_cache(loaded)
    keys, states = _cache_bytes(cache)
    pair = _pair_bytes(loaded, cache, masks)
    return Room(room, states, keys + activations, pair)


def _filled_cache(loaded: Loaded) -> tuple[Any, list[Any]]:
    """Return the KV cache of two rows of three tokens, and the masks that layers got for them."""
    forward = loaded.forward
    cache = forward.cache(3)
    ids = torch.ones(2, 3, dtype=torch.long, device=loaded.device)
    mask = ids.clone()
    mask[0, 0] = 0  # without padding, there may be no mask at all
    masks: list[Any] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _m, _a, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
        )
        for layer in loaded.anatomy.layers
    ]
    try:
        with torch.inference_mode():
            forward.hidden(ids, mask, (mask.cumsum(-1) - 1).clamp_min(0), cache)
    finally:
        for hook in hooks:
            hook.remove()
    return cache, masks


def _cache_bytes(cache: Any) -> tuple[int, int]:
    """Return the bytes of one token's keys and values, and of one row's linear-attention states."""
    filled = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    states = [
        state
        for layer in cache.layers
        for name in ("conv_states", "recurrent_states")
        for state in getattr(layer, name, {}).values()
        if state is not None
    ]
    keys = sum(layer.keys.nbytes + layer.values.nbytes for layer in filled)
    return keys // 6, sum(state.nbytes for state in states) // 2


def _pair_bytes(loaded: Loaded, cache: Any, masks: list[Any]) -> int:
    """Return the bytes that attention takes per pair of tokens in a row.

    Masks of numbers are for code that adds them to scores which it keeps; masks of truth values for
    fused kernels, which turn them into numbers, and which keep scores where keys and values differ in
    width.
    """
    kinds = loaded.forward.biases
    if kinds:  # the bias of a whole pass, of one of its parts, and what the next is made of
        return 4 * (2 * kinds + 1)
    tensors = {
        id(mask): mask for mask in masks if isinstance(mask, torch.Tensor) and mask.ndim == 4
    }
    widths = [
        (layer.keys.shape[-1], layer.values.shape[-1])
        for layer in cache.layers
        if getattr(layer, "keys", None) is not None
    ]
    kept = any(mask.is_floating_point() for mask in tensors.values()) or any(
        keys != values for keys, values in widths
    )
    heads = getattr(loaded.model.config.get_text_config(), "num_attention_heads", 1)
    own = sum(mask.element_size() for mask in tensors.values())
    return own + 4 + (_SCORES * int(heads) if kept and widths else 0)


@dataclass(frozen=True)
class _Time:
    """Time limit of measuring: a few seconds, and a small share of the search."""

    search: float  # tokens that it is likely to pass
    begun: float

    def allows(self, seconds: float, speed: float) -> bool:
        """Return whether `seconds` more fit, at `speed` tokens per second."""
        most = min(_SECONDS, _SHARE * self.search / speed)
        return time.perf_counter() - self.begun + seconds <= most


def _fastest_rows(
    loaded: Loaded, tokens: int, limit: int, search: float = inf, on_event: OnEvent = ignore
) -> int:
    """Double the rows while tokens per second grow; stop before memory or time runs out.

    Two sizes in a row must fail to gain: one slow measurement, on a machine that does other work
    beside, must not make a whole run slow.

    Args:
        loaded: the model.
        tokens: of a row.
        limit: rows that fit.
        search: tokens that the search is likely to pass.
        on_event: told of every size that was measured.
    """
    rows = max(1, min(_FIRST_ROWS, limit, _FIRST_TOKENS // tokens))
    if any_offloaded(loaded.model):
        return max(rows, min(limit, _OFFLOADED_TOKENS // tokens))
    forward, spare = loaded.forward, _Time(search, time.perf_counter())
    best, speed, dull, tried = 0, 0.0, 0, 0
    try:
        for some, few in _smaller(rows, tokens):
            took = _seconds(forward, loaded.device, some, few, 1)
            if not spare.allows(2 * took, some * few / took):
                return rows
        while rows <= limit and dull < 2:
            begun = time.perf_counter()
            now = _speed(forward, loaded.device, rows, tokens)
            if now < _GAIN * speed:
                dull += 1
            else:
                best, speed, dull = rows, now, 0
            rows, tried = 2 * rows, tried + 1
            on_event(Progress("plan", tried))
            if not spare.allows(2 * (time.perf_counter() - begun), speed):
                break
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    return best or 1


def _smaller(rows: int, tokens: int) -> Iterator[tuple[int, int]]:
    """Yield passes (rows, tokens) up to half of this one, each twice the one before."""
    few = _SMALLEST
    while few < tokens:
        yield 1, few
        few *= 2
    some = 1
    while some < rows:
        yield some, tokens
        some *= 2


def _speed(forward: Forward, device: torch.device, rows: int, tokens: int) -> float:
    """Return the tokens per second of a pass over `rows` rows: the best of three."""
    return rows * tokens / _seconds(forward, device, rows, tokens, _REPEATS)


def _seconds(forward: Forward, device: torch.device, rows: int, tokens: int, repeats: int) -> float:
    """Return the seconds of a pass: the best of `repeats`."""
    ids = torch.ones(rows, tokens, dtype=torch.long, device=device)
    positions = torch.arange(tokens, device=device).expand(rows, -1)
    best = inf
    for _ in range(repeats):
        begun = time.perf_counter()
        with torch.inference_mode():
            forward.hidden(ids, torch.ones_like(ids), positions)
        finish(device)
        best = min(best, time.perf_counter() - begun)
    return best
