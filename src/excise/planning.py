"""How large a pass should be: measured throughput, within the memory at hand."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from excise.config import Config
from excise.engine import Plan
from excise.errors import is_out_of_memory
from excise.forward import Forward
from excise.loading import Loaded

_GAIN = 1.05  # a larger pass must be faster by this much to be worth its memory
_DECODE_FACTOR = 8
# The residual states of a pass, in float32, should take at least this much: below it the edits of many
# candidates cost more than what the smaller pass gains. Wide models reach it with few rows.
_FEWEST_BYTES = 3 * 2**20
_LARGEST_BATCH = 16  # candidates asked together: more would make the sampler blind for longer
_LARGEST_STACK = _LARGEST_BATCH  # the more share a pass, the less often what they share is run


@dataclass(frozen=True)
class Sizing:
    """The plan of a run: what is stored with the study, so that a resume repeats it."""

    plan: Plan
    batch: int

    def as_dict(self) -> dict[str, Any]:
        """For the study and the record."""
        return {**vars(self.plan), "batch": self.batch}


def size(loaded: Loaded, config: Config, longest: int, prompts: int) -> Sizing:
    """Choose rows, stack and batch, as far as the configuration leaves them open.

    Args:
        loaded: the model, on its device.
        config: `engine` and `search` sections are read.
        longest: tokens of the longest prompt.
        prompts: prompts of the larger side.
    """
    fits = memory_rows(loaded, config, longest)
    rows = config.engine.rows
    if not rows:
        most = min(fits, prompts * _LARGEST_BATCH)
        fewest = -(-_FEWEST_BYTES // (4 * loaded.anatomy.width * longest))
        rows = max(_fastest_rows(loaded, longest, most), min(fewest, most))
    # A pass that decodes has one token per row, so many more rows fit it before it stops gaining.
    decode = config.engine.rows * _DECODE_FACTOR or _LARGEST_STACK * prompts
    decode = max(1, min(fits, decode))
    stack = max(1, min(decode // prompts, _LARGEST_STACK))
    batch = config.search.batch or min(_LARGEST_BATCH, max(4, 2 * stack))
    return Sizing(Plan(rows, min(stack, batch), decode, config.engine.reuse), batch)


def from_dict(known: dict[str, Any]) -> Sizing:
    """The sizing that a study was started with."""
    plan = Plan(int(known["rows"]), int(known["stack"]), int(known["decode"]), bool(known["reuse"]))
    return Sizing(plan, int(known["batch"]))


def memory_rows(loaded: Loaded, config: Config, longest: int) -> int:
    """Rows whose keys, values and activations fit in the memory that is free now; at least one.

    Args:
        loaded: the model, on its device.
        config: the share of memory, and how many tokens a response may have.
        longest: tokens of the longest prompt.
    """
    inner = max(writer.shape[1] for writer in loaded.anatomy.writers)
    activations = loaded.dtype.itemsize * (8 * loaded.anatomy.width + 4 * inner)
    tokens = longest + config.scores.max_new_tokens
    per_token, per_row = _cache_bytes(loaded)
    row = tokens * (per_token + activations) + per_row
    if loaded.device.type == "cuda":
        free = torch.cuda.mem_get_info(loaded.device)[0]
    else:
        free = psutil.virtual_memory().available
    return max(1, int(config.engine.memory_fraction * free / row))


def _cache_bytes(loaded: Loaded) -> tuple[int, int]:
    """Bytes of keys and values of one token, and of states that a row has one of: both measured."""
    forward = Forward(loaded.model, loaded.anatomy)
    cache = forward.cache(1)
    one = torch.ones(1, 1, dtype=torch.long, device=loaded.device)
    with torch.inference_mode():
        forward.hidden(one, one, torch.zeros_like(one), cache)
    filled = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    states = [
        state
        for layer in cache.layers
        for name in ("conv_states", "recurrent_states")
        for state in getattr(layer, name, {}).values()
        if state is not None
    ]
    keys = sum(layer.keys.nbytes + layer.values.nbytes for layer in filled)
    return keys, sum(state.nbytes for state in states)


def _fastest_rows(loaded: Loaded, longest: int, limit: int) -> int:
    """Double the rows while tokens per second grow; stop before memory runs out.

    Two sizes in a row must fail to gain: one slow measurement, on a machine that does other work
    beside, must not make a whole run slow.
    """
    forward = Forward(loaded.model, loaded.anatomy)
    best, speed, rows, dull = 1, 0.0, min(16, limit), 0
    while rows <= limit and dull < 2:
        try:
            now = _speed(forward, loaded.device, rows, longest)
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            break
        if now < _GAIN * speed:
            dull += 1
        else:
            best, speed, dull = rows, now, 0
        rows *= 2
    return best


def _speed(forward: Forward, device: torch.device, rows: int, tokens: int) -> float:
    """Tokens per second of a pass over `rows` rows: the best of three."""
    ids = torch.ones(rows, tokens, dtype=torch.long, device=device)
    positions = torch.arange(tokens, device=device).expand(rows, -1)
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        with torch.inference_mode():
            forward.hidden(ids, torch.ones_like(ids), positions)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return rows * tokens / best
