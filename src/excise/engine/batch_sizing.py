"""Batch sizes from a model of what a pass costs, within free memory; a few short passes give its numbers.

Shapes: B rows, T tokens of the longest of them; a pass holds B x T tokens and B x T x T pairs of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import ceil, inf
from statistics import median_low
from typing import Any

import torch

from excise.checkpoints.loading import Loaded
from excise.config import Config
from excise.engine.engine import Engine, Plan
from excise.errors import RunStateError, is_out_of_memory
from excise.events import OnEvent, Progress, ignore
from excise.model.devices import finish, free_bytes
from excise.model.parameters import any_offloaded

_GAIN = 1.05  # a pass twice as large must have this much more throughput to be worth its memory
_DECODE_FACTOR = 8
# The residual states of a pass, in float32, should take at least this much: below it the edits of many
# candidates cost more than what the smaller pass gains. Wide models reach it with few rows.
_FEWEST_BYTES = 3 * 2**20
_LARGEST_BATCH = 16  # candidates asked together: more would make the sampler blind for longer
_LARGEST_STACK = _LARGEST_BATCH  # the more share a pass, the less often what they share is run
_FEWEST_ROWS, _FEWEST_TOKENS = 16, 4096  # no pass holds less than either, where memory allows
_OFFLOADED_TOKENS = 2**15  # of a pass that takes as long as it takes to bring the weights
_SMALLEST = 16  # tokens of the first pass that is timed
_SLOWER = (
    3  # times as long as that one: in a pass that takes so long, tokens cost more than the call
)
# Timing ends after so many seconds, and after this share of what the search is likely to take.
_SECONDS, _SHARE = 2.0, 0.02
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
class Cost:
    """What a pass costs: seconds of the call, however small it is, and seconds of every token."""

    call: float
    token: float

    @classmethod
    def of(cls, timed: Sequence[tuple[int, float]]) -> Cost:
        """Estimate it from (tokens, seconds) of two passes or more, each larger than the one before.

        Of the last two the one counts by which a token costs less: no one slow pass makes a run slow.
        """
        (fewest, *tokens), (least, *seconds) = [n for n, _ in timed], undisturbed(timed)
        each = [(s - least) / (n - fewest) for n, s in zip(tokens, seconds, strict=True)]
        token = min(each[-2:])
        return cls(least - token * fewest, token)

    def enough(self) -> float:
        """Return the tokens of a pass from which on one twice as large gains less than `_GAIN`."""
        call = max(0.0, self.call)
        return (_GAIN / (_GAIN - 1) / 2 - 1) * call / self.token if self.token > 0 else inf


def undisturbed(timed: Sequence[tuple[int, float]]) -> list[float]:
    """Return the seconds of passes (tokens, seconds), none longer than a larger one's.

    Other work on the machine only ever adds to them.
    """
    return list(accumulate((seconds for _, seconds in reversed(timed)), min))[::-1]


def _fastest_rows(
    loaded: Loaded, tokens: int, limit: int, search: float = inf, on_event: OnEvent = ignore
) -> int:
    """Return the rows from which on larger passes gain little, by what a few short ones cost.

    Args:
        loaded: the model.
        tokens: of a row.
        limit: rows that fit.
        search: tokens that the search is likely to pass.
        on_event: told of every pass that was timed.
    """
    fewest = max(1, min(_FEWEST_ROWS, limit, _FEWEST_TOKENS // tokens))
    if any_offloaded(loaded.model):
        return max(fewest, min(limit, _OFFLOADED_TOKENS // tokens))
    timed: list[tuple[int, float]] = []
    try:
        for number, seconds in _short_passes(loaded, tokens, limit, search):
            timed.append((number, seconds))
            on_event(Progress("plan", len(timed)))
            taken = undisturbed(timed)
            if len(taken) > 2 and taken[-2] > _SLOWER * taken[0]:
                break
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        limit = max(1, timed[-1][0] // tokens) if timed else 1
    if len(timed) < 2:
        return min(fewest, limit)
    return ceil(min(limit, max(fewest, Cost.of(timed).enough() / tokens)))


def _short_passes(
    loaded: Loaded, tokens: int, limit: int, search: float
) -> Iterator[tuple[int, float]]:
    """Yield (tokens, seconds) of passes, each about twice as large as the one before, while there is time.

    They grow to one whole row first and then by rows, up to `limit`. The first runs twice: what is done
    once for all passes is no cost of one.
    """
    begun, rows, some = time.perf_counter(), 1, min(_SMALLEST, tokens)
    _seconds(loaded, rows, some)
    while rows <= limit:
        took = _seconds(loaded, rows, some)
        yield rows * some, took
        most = min(_SECONDS, _SHARE * search * took / (rows * some))
        if time.perf_counter() - begun + 2 * took > most:
            return
        rows, some = (1, min(2 * some, tokens)) if some < tokens else (2 * rows, tokens)


def _seconds(loaded: Loaded, rows: int, tokens: int) -> float:
    """Return the seconds of a pass over rows of tokens."""
    device = loaded.device
    ids = torch.ones(rows, tokens, dtype=torch.long, device=device)
    positions = torch.arange(tokens, device=device).expand(rows, -1)
    begun = time.perf_counter()
    with torch.inference_mode():
        loaded.forward.hidden(ids, torch.ones_like(ids), positions)
    finish(device)
    return time.perf_counter() - begun
