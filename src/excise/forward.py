"""One model's forward pass, cut where the engine needs it: hidden states, head, lower layers alone.

Works on Transformers' own modules: layers are stepped over by replacing `forward` on the instance
for the length of a context, never by rewriting a family's code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from excise.anatomy import Anatomy
from excise.kvcache import cache_argument, roomy_cache, with_room
from excise.lean import Alike, Inputs, Lean, lean_of
from excise.swapping import replaced_forward

# Room for the logits of one chunk and their temporaries, and the rows that it holds at the least: with
# a large vocabulary the head's matrix is read anew for every chunk.
_CHUNK_BYTES = {"cpu": 6 * 2**20, "cuda": 256 * 2**20}
_CHUNK_ROWS = {"cpu": 64, "cuda": 256}
_PROBE = 24  # tokens in two rows
_APART = 3e-5  # ten times what rounding costs; what is done otherwise costs 1e-4 and more
# By backbone: whether its lean way was found to agree, and what type of output it gives.
_PROBED: WeakKeyDictionary[nn.Module, tuple[bool, type | None]] = WeakKeyDictionary()
_COPIES = 3  # of a chunk's float32 logits at once: the head's, a soft cap's, the result


class Forward:
    """The backbone and the head of one model. B rows, T tokens, D width, V vocabulary."""

    def __init__(self, model: Any, anatomy: Anatomy) -> None:
        self.model = model
        self.anatomy = anatomy
        parameters = inspect.signature(type(anatomy.backbone).forward).parameters
        self._trims = "logits_to_keep" in parameters
        self._cache_name = cache_argument(anatomy.backbone) or "past_key_values"
        self._output_type: type | None = None
        self._cache = roomy_cache(model.config)
        lean = lean_of(model, anatomy)
        self._lean = lean if lean is not None and self._agrees(lean) else None

    def _agrees(self, lean: Lean) -> bool:
        """Whether a lean way gives what the model's own modules give: looked at once per model."""
        backbone = self.anatomy.backbone
        if backbone not in _PROBED:
            ids = torch.arange(_PROBE, device=self.device).view(2, -1).mul(7919) % self.vocabulary
            mask = torch.ones_like(ids)
            mask[1, :3] = 0
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            keep = ids.shape[1] - 3
            with torch.inference_mode():
                plain = self._whole(ids, mask, positions, None, keep)
                layers = range(len(self.anatomy.layers))
                ours = lean.run(layers, Inputs(ids, mask, positions), keep=keep)
                logits = self._logits(plain[0]), lean.head(plain[0])
            agrees = _near(ours, plain) and _near(*logits)
            _PROBED[backbone] = (agrees, self._output_type)
        agrees, self._output_type = _PROBED[backbone]
        return agrees

    def cache(self, capacity: int) -> Any:
        """An empty key-value cache for `capacity` positions."""
        return with_room(self._cache, capacity)

    def hidden(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any = None, keep: int = 1
    ) -> Tensor:
        """Final hidden states (B, keep, D) of the last `keep` positions of `ids` (B, T)."""
        layers = range(len(self.anatomy.layers))
        return self.through(layers, Inputs(ids, mask, positions), cache, keep=keep)

    def through(
        self,
        layers: range,
        given: Inputs,
        cache: Any = None,
        *,
        hidden: Tensor | None = None,
        keep: int = 1,
        alike: Alike | None = None,
    ) -> Tensor:
        """What some layers, without a gap, make of what the layers below them give.

        Returns final hidden states (B, keep, D) of the last `keep` positions where they reach the top,
        else what the last of them gives (B, T, D).

        Args:
            layers: which ones.
            given: tokens, mask and positions of the rows.
            cache: keys and values of what was read before; these layers fill their part of it.
            hidden: (B, T, D) what the layers below give; needed where there are any.
            keep: how many last positions are asked for at the top.
            alike: rows for which the layers below, and what was read before, are the same: `hidden`
                then holds each kind of them once (U, T, D).
        """
        if self._lean is not None and torch.is_inference_mode_enabled():
            return self._lean.run(layers, given, cache, hidden=hidden, keep=keep, alike=alike)
        if alike is not None and hidden is not None:
            hidden = hidden[alike.kinds.to(hidden.device)]  # layers may be on several devices
        top = layers.stop == len(self.anatomy.layers)
        steps: dict[nn.Module, Callable[..., Any]] = {}
        caught: list[Tensor] = []
        if hidden is not None:
            lower = self.anatomy.layers[: layers.start]
            steps |= dict.fromkeys(lower, self._pass_through)
            steps[lower[-1]] = lambda *_a, **_k: self._as_layer(hidden)
        if not top:

            def catch(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
                caught.append(hidden_states)
                return self._as_layer(hidden_states)

            upper = self.anatomy.layers[layers.stop :]
            steps |= dict.fromkeys(upper, self._pass_through)
            steps[upper[0]] = catch
            keep = given.ids.shape[1]  # the backbone must not trim below `layers.stop`
        with replaced_forward(steps):
            states = self._whole(given.ids, given.mask, given.positions, cache, keep)
        return states if top else caught[0]

    def _whole(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, keep: int) -> Tensor:
        """One call of the backbone. One that can leave out positions in its upper layers is asked to."""
        kwargs = {"logits_to_keep": keep} if self._trims else {}
        output = self.anatomy.backbone(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=cache is not None,
            **{self._cache_name: cache},
            **kwargs,
        )
        self._output_type = type(output)
        hidden: Tensor = output.last_hidden_state
        return hidden[:, -keep:]

    def logits(self, hidden: Tensor) -> Tensor:
        """Raw logits (N, V) in float32 of final hidden states (N, D)."""
        if self._lean is not None and torch.is_inference_mode_enabled():
            return self._lean.head(hidden)
        return self._logits(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        """By the model's own forward (head, soft caps, scales), on the states that it is handed."""
        assert self._output_type is not None, "hidden() comes first"
        states = self._output_type(last_hidden_state=hidden[None])
        ids = torch.zeros(1, hidden.shape[0], dtype=torch.long, device=hidden.device)
        with replaced_forward({self.anatomy.backbone: lambda *_a, **_k: states}):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits[0].float()

    @property
    def device(self) -> torch.device:
        """Where ids go in."""
        device: torch.device = self.model.device
        return device

    @property
    def vocabulary(self) -> int:
        """V: the logits of one position."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def chunk_bytes(self) -> int:
        """Room for the logits of one chunk, whatever is computed from them."""
        kind = "cuda" if self.model.device.type == "cuda" else "cpu"
        return max(_CHUNK_BYTES[kind], _CHUNK_ROWS[kind] * 4 * _COPIES * self.vocabulary)

    def greedy(self, hidden: Tensor) -> Tensor:
        """The likeliest tokens (N,) after final hidden states (N, D)."""
        step = max(1, self.chunk_bytes // (4 * _COPIES * self.vocabulary))
        return torch.cat([self.logits(part).argmax(-1) for part in torch.split(hidden, step)])

    def _pass_through(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return self._as_layer(hidden_states)

    def _as_layer(self, hidden: Tensor) -> Any:
        """Hidden states in the form that this family's layers give them; no attention weights."""
        return (hidden, None) if self.anatomy.returns_tuple else hidden


def _near(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).norm() / expected.norm()) <= _APART
