"""One model's forward pass, cut where the engine needs it: hidden states, head, lower layers alone.

Works on Transformers' own modules: layers are stepped over by replacing `forward` on the instance
for the length of a context, never by rewriting a family's code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from excise.model.anatomy import Anatomy
from excise.model.fused_layers import Alike, Inputs, Lean, lean_of
from excise.model.kv_cache import RoomyLayer, cache_argument, roomy_cache, with_room
from excise.model.overrides import replaced_forward

# Room for the logits of one chunk and their temporaries, and the rows that it holds at the least: with
# a large vocabulary the head's matrix is read anew for every chunk.
_CHUNK_BYTES = {"cpu": 6 * 2**20, "cuda": 256 * 2**20}
_CHUNK_ROWS = {"cpu": 64, "cuda": 256}
_PROBE = 12  # tokens of each of two rows that all layers read
_LONGER = (
    72  # tokens that one layer of each kind reads: past what is done otherwise for short texts
)
_PADS = 3
_BEYOND = 8  # tokens on either side of where a window ends
_APART = 3e-5  # ten times what rounding costs; what is done otherwise costs 1e-4 and more
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
        self._cache = roomy_cache(model.config, sliding=anatomy.padding)
        lean = lean_of(model, anatomy)
        self._lean = lean if lean is not None and self._agrees(lean) else None

    @property
    def biases(self) -> int:
        """Kinds of attention bias that a lean pass keeps for all of its parts; 0 where none is lean."""
        return 0 if self._lean is None else len(self._lean.windows)

    def _agrees(self, lean: Lean) -> bool:
        """Whether a lean way gives what the model's own modules give.

        All layers read a short text; one of each kind a longer one; and where tokens look and how
        they are turned is compared around the end of every window, however long it is.
        """
        with torch.inference_mode():
            agrees = self._sees_alike(lean) and self._gives_alike(lean)
            return agrees and self._one_of_each_kind_gives_alike(lean)

    def _gives_alike(self, lean: Lean) -> bool:
        """All layers and the head, at once and from a cache."""
        given, layers = self._rows(_PROBE), range(len(self.anatomy.layers))
        keep = last = _PROBE - _PADS
        plain = self._whole(given.ids, given.mask, given.positions, None, keep)
        ours = lean.run(layers, given, keep=keep)
        cache = self.cache(_PROBE)
        for part in (slice(0, last), slice(last, None)):
            some = Inputs(given.ids[:, part], given.mask[:, : part.stop], given.positions[:, part])
            steps = lean.run(layers, some, cache, keep=_PROBE)
        logits = self._logits(plain[0]), lean.head(plain[0])
        return _near(ours, plain) and _near(steps, plain[:, last - _PROBE :]) and _near(*logits)

    def _one_of_each_kind_gives_alike(self, lean: Lean) -> bool:
        """The first layer of every kind, on random states of texts that have another way of their own."""
        given, draw = self._rows(_LONGER), torch.Generator().manual_seed(0)
        states = torch.randn(*given.ids.shape, self.anatomy.width, generator=draw).to(self.device)
        real = given.mask.bool()
        for number in lean.firsts:
            layers, hidden = range(number, number + 1), states if number else None
            ours = lean.run(layers, given, hidden=hidden, keep=_LONGER)
            plain = self._through_modules(layers, given, None, hidden, _LONGER)
            if not _near(ours[real], plain[real]):
                return False
        return True

    def _sees_alike(self, lean: Lean) -> bool:
        """Where tokens look, and their angles, without a past and with one, around the windows' ends."""
        text = self.model.config.get_text_config()
        stated = [getattr(text, "sliding_window", None), *lean.windows.values()]
        windows = {window for window in stated if isinstance(window, int)}
        return all(
            self._looks_alike(lean, past, tokens)
            for past, tokens in [
                (0, _PROBE),
                *((max(0, w - _BEYOND), 2 * _BEYOND) for w in windows),
            ]
        )

    def _looks_alike(self, lean: Lean, past: int, tokens: int) -> bool:
        """The same of so many tokens after so many others, of two rows of unlike length."""
        whole, cache = self._rows(past + tokens), self.cache(past + tokens)
        for layer in cache.layers:
            if isinstance(layer, RoomyLayer):
                layer.length = past
        given = Inputs(whole.ids[:, past:], whole.mask, whole.positions[:, past:])
        seen: list[dict[str, Any]] = []

        def see(hidden_states: Tensor, *_args: Any, **kwargs: Any) -> Any:
            seen.append(kwargs)
            return self._as_layer(hidden_states)

        with replaced_forward(dict.fromkeys(self.anatomy.layers, see)):
            self._whole(given.ids, given.mask, given.positions, cache, tokens)
        real = given.mask[:, past:].bool()
        return all(
            torch.equal(where[:, 0][real], _allowed(theirs.get("attention_mask"), where)[real])
            and all(
                _near(ours[real], angles.expand_as(ours)[real])
                for ours, angles in zip((cos, sin), theirs["position_embeddings"], strict=True)
            )
            for (where, cos, sin), theirs in zip(lean.looks(given), seen, strict=True)
        )

    def _rows(self, tokens: int) -> Inputs:
        """Two rows of made-up tokens, the second of which begins with padding."""
        ids = torch.arange(2 * tokens, device=self.device).view(2, -1).mul(7919) % self.vocabulary
        mask = torch.ones_like(ids)
        mask[1, :_PADS] = 0
        return Inputs(ids, mask, (mask.cumsum(-1) - 1).clamp_min(0))

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
        return self._through_modules(layers, given, cache, hidden, keep)

    def _through_modules(
        self, layers: range, given: Inputs, cache: Any, hidden: Tensor | None, keep: int
    ) -> Tensor:
        """`through`, by the model's own modules."""
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
        if self._output_type is None:  # no pass has shown it yet
            one = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            self._whole(one, torch.ones_like(one), one, None, 1)
        assert self._output_type is not None
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


def _allowed(mask: Any, like: Tensor) -> Tensor:
    """Where tokens may look (B, T, S) by a mask as layers are given it; none is causal."""
    if mask is None:
        tokens, seen = like.shape[-2:]
        every = torch.ones(like.shape[0], tokens, seen, dtype=torch.bool, device=like.device)
        return every.tril(seen - tokens)
    if not isinstance(mask, Tensor) or mask.shape[-2:] != like.shape[-2:]:
        return torch.zeros_like(like[:, 0])  # in a form of its own
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return allowed.expand(len(like), -1, -1, -1)[:, 0]


def _near(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).norm() / expected.norm()) <= _APART
