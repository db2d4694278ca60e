"""One model's forward pass in parts: a range of layers, final hidden states, logits.

Works on Transformers' own modules: layers are skipped by replacing `forward` on the instance for the
length of a context, never by rewriting a family's code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from excise.model.anatomy import Anatomy
from excise.model.fused_layers import Duplicates, FusedLayers, Inputs, fused_layers_of
from excise.model.kv_cache import RoomyLayer, cache_argument, roomy_cache, with_room
from excise.model.overrides import replaced_forward

# Memory for one chunk of logits and temporaries, and its fewest rows: every chunk reads the head's whole
# matrix, which is large where the vocabulary is.
_CHUNK_BYTES = {"cpu": 6 * 2**20, "gpu": 256 * 2**20}
_CHUNK_ROWS = {"cpu": 64, "gpu": 256}
_PROBE = 12  # tokens of each of two rows that all layers read
_LONGER = (
    72  # tokens that one layer of each kind reads: past the short texts with kernels of their own
)
_PADS = 3
_BEYOND = 8  # tokens on either side of where a window ends
_APART = 3e-5  # relative: ten times rounding; real differences cost 1e-4 and more
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
        fused = fused_layers_of(model, anatomy)
        self._fused = fused if fused is not None and self._agrees(fused) else None

    @property
    def biases(self) -> int:
        """Number of attention biases that a fused pass holds; 0 where layers do not run fused."""
        return 0 if self._fused is None else len(self._fused.windows)

    def _agrees(self, fused: FusedLayers) -> bool:
        """Return whether fused layers agree with the model's own modules.

        Compared are all layers on a short text, one layer of each kind on a longer one, and attention
        masks and rotary angles around the end of every window, however long it is.
        """
        with torch.inference_mode():
            agrees = self._masks_agree(fused) and self._outputs_agree(fused)
            return agrees and self._layer_kinds_agree(fused)

    def _outputs_agree(self, fused: FusedLayers) -> bool:
        """Compare all layers and the head, in one pass and in two with a KV cache."""
        given, layers = self._rows(_PROBE), range(len(self.anatomy.layers))
        keep = last = _PROBE - _PADS
        plain = self._whole(given.ids, given.mask, given.positions, None, keep)
        ours = fused.run(layers, given, keep=keep)
        cache = self.cache(_PROBE)
        for part in (slice(0, last), slice(last, None)):
            some = Inputs(given.ids[:, part], given.mask[:, : part.stop], given.positions[:, part])
            steps = fused.run(layers, some, cache, keep=_PROBE)
        logits = self._logits(plain[0]), fused.head(plain[0])
        return _near(ours, plain) and _near(steps, plain[:, last - _PROBE :]) and _near(*logits)

    def _layer_kinds_agree(self, fused: FusedLayers) -> bool:
        """Compare the first layer of every kind on random states of a longer text."""
        given, draw = self._rows(_LONGER), torch.Generator().manual_seed(0)
        states = torch.randn(*given.ids.shape, self.anatomy.width, generator=draw).to(self.device)
        real = given.mask.bool()
        for number in fused.firsts:
            layers, hidden = range(number, number + 1), states if number else None
            ours = fused.run(layers, given, hidden=hidden, keep=_LONGER)
            plain = self._through_modules(layers, given, None, hidden, _LONGER)
            if not _near(ours[real], plain[real]):
                return False
        return True

    def _masks_agree(self, fused: FusedLayers) -> bool:
        """Compare attention masks and angles, without and with cached tokens, around the windows' ends."""
        text = self.model.config.get_text_config()
        stated = [getattr(text, "sliding_window", None), *fused.windows.values()]
        windows = {window for window in stated if isinstance(window, int)}
        return all(
            self._mask_agrees(fused, past, tokens)
            for past, tokens in [
                (0, _PROBE),
                *((max(0, w - _BEYOND), 2 * _BEYOND) for w in windows),
            ]
        )

    def _mask_agrees(self, fused: FusedLayers, past: int, tokens: int) -> bool:
        """Compare them for `tokens` tokens after `past` cached ones, in two rows of unequal length."""
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
            for (where, cos, sin), theirs in zip(fused.looks(given), seen, strict=True)
        )

    def _rows(self, tokens: int) -> Inputs:
        """Return two rows of made-up tokens; the second begins with padding."""
        ids = torch.arange(2 * tokens, device=self.device).view(2, -1).mul(7919) % self.vocabulary
        mask = torch.ones_like(ids)
        mask[1, :_PADS] = 0
        return Inputs(ids, mask, (mask.cumsum(-1) - 1).clamp_min(0))

    def cache(self, capacity: int) -> Any:
        """Return an empty KV cache for `capacity` positions."""
        return with_room(self._cache, capacity)

    def hidden(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any = None, keep: int = 1
    ) -> Tensor:
        """Return final hidden states (B, keep, D) of the last `keep` positions of `ids` (B, T)."""
        layers = range(len(self.anatomy.layers))
        return self.run_layers(layers, Inputs(ids, mask, positions), cache, keep=keep)

    def run_layers(
        self,
        layers: range,
        given: Inputs,
        cache: Any = None,
        *,
        hidden: Tensor | None = None,
        keep: int = 1,
        duplicates: Duplicates | None = None,
    ) -> Tensor:
        """Run a contiguous range of layers on the hidden states from below.

        Args:
            layers: their numbers.
            given: token ids, mask and positions of the rows.
            cache: KV cache of earlier tokens; these layers append to it.
            hidden: (B, T, D) output of the layer below; None at the bottom.
            keep: how many last positions to return at the top.
            duplicates: rows with equal hidden states and caches: `hidden` then holds each once (U, T, D).

        Returns:
            Final hidden states (B, keep, D) where the range reaches the top, else (B, T, D).
        """
        if self._fused is not None and torch.is_inference_mode_enabled():
            return self._fused.run(
                layers, given, cache, hidden=hidden, keep=keep, duplicates=duplicates
            )
        if duplicates is not None and hidden is not None:
            hidden = hidden[duplicates.kinds.to(hidden.device)]  # layers may be on several devices
        return self._through_modules(layers, given, cache, hidden, keep)

    def _through_modules(
        self, layers: range, given: Inputs, cache: Any, hidden: Tensor | None, keep: int
    ) -> Tensor:
        """Run them by the model's own modules."""
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
        """Call the backbone once, trimmed to the last `keep` positions where it can."""
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
        """Return raw logits (N, V) in float32 of final hidden states (N, D)."""
        if self._fused is not None and torch.is_inference_mode_enabled():
            return self._fused.head(hidden)
        return self._logits(hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Run the model's own forward (head, soft caps, scales) on given final hidden states."""
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
        """Device of the input ids."""
        device: torch.device = self.model.device
        return device

    @property
    def vocabulary(self) -> int:
        """V, the size of the vocabulary."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def chunk_bytes(self) -> int:
        """Memory for one chunk of logits, with what is computed from them."""
        kind = "cpu" if self.model.device.type == "cpu" else "gpu"
        return max(_CHUNK_BYTES[kind], _CHUNK_ROWS[kind] * 4 * _COPIES * self.vocabulary)

    def greedy(self, hidden: Tensor) -> Tensor:
        """Return the likeliest next tokens (N,) of final hidden states (N, D)."""
        step = max(1, self.chunk_bytes // (4 * _COPIES * self.vocabulary))
        return torch.cat([self.logits(part).argmax(-1) for part in torch.split(hidden, step)])

    def _pass_through(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return self._as_layer(hidden_states)

    def _as_layer(self, hidden: Tensor) -> Any:
        """Return hidden states in the form that this family's layers return; no attention weights."""
        return (hidden, None) if self.anatomy.returns_tuple else hidden


def _allowed(mask: Any, like: Tensor) -> Tensor:
    """Return a layer's attention mask as booleans (B, T, S); no mask is the causal one."""
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
