"""One model's forward pass, cut where the engine needs it: hidden states, head, lower layers alone.

Works on Transformers' own modules: layers are stepped over by replacing `forward` on the instance
for the length of a context, never by rewriting a family's code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from excise.anatomy import Anatomy
from excise.kvcache import roomy_cache, with_room
from excise.swapping import replaced_forward

# Room for the logits of one chunk and their temporaries, and the rows that it holds at the least: with
# a large vocabulary the head's matrix is read anew for every chunk.
_CHUNK_BYTES = {"cpu": 6 * 2**20, "cuda": 256 * 2**20}
_CHUNK_ROWS = {"cpu": 64, "cuda": 256}
_COPIES = 3  # of a chunk's float32 logits at once: the head's, a soft cap's, the result


class Forward:
    """The backbone and the head of one model. B rows, T tokens, D width, V vocabulary."""

    def __init__(self, model: Any, anatomy: Anatomy) -> None:
        self.model = model
        self.anatomy = anatomy
        parameters = inspect.signature(type(anatomy.backbone).forward).parameters
        self._trims = "logits_to_keep" in parameters
        self._output_type: type | None = None
        self._cache = roomy_cache(model.config)

    def cache(self, capacity: int) -> Any:
        """An empty key-value cache for `capacity` positions."""
        return with_room(self._cache, capacity)

    def hidden(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any = None, keep: int = 1
    ) -> Tensor:
        """Final hidden states (B, keep, D) of the last `keep` positions of `ids` (B, T).

        A backbone that can leave out the others in its upper layers is asked to.
        """
        kwargs = {"logits_to_keep": keep} if self._trims else {}
        output = self.anatomy.backbone(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            **kwargs,
        )
        self._output_type = type(output)
        hidden: Tensor = output.last_hidden_state
        return hidden[:, -keep:]

    def logits(self, hidden: Tensor) -> Tensor:
        """Raw logits (N, V) in float32 of final hidden states (N, D).

        The model's own forward computes them (head, soft caps, scales) on the states it is handed.
        """
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

    def up_to(
        self, layer: int, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any = None
    ) -> Tensor:
        """What the layers below `layer` give (B, T, D); they fill their part of the cache."""
        caught: list[Tensor] = []

        def catch(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
            caught.append(hidden_states)
            return self._as_layer(hidden_states)

        upper = self.anatomy.layers[layer:]
        steps: dict[nn.Module, Callable[..., Any]] = dict.fromkeys(upper, self._pass_through)
        steps[upper[0]] = catch
        with replaced_forward(steps):
            # Every position is needed here, so the backbone must not trim before `layer`.
            self.hidden(ids, mask, positions, cache, keep=ids.shape[1])
        return caught[0]

    @contextmanager
    def starting_at(self, layer: int, hidden: Tensor) -> Iterator[None]:
        """Within this context a pass skips the layers below `layer` and goes on from `hidden`."""
        lower = self.anatomy.layers[:layer]
        steps: dict[nn.Module, Callable[..., Any]] = dict.fromkeys(lower, self._pass_through)
        steps[lower[-1]] = lambda *_a, **_k: self._as_layer(hidden)
        with replaced_forward(steps):
            yield

    def _pass_through(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return self._as_layer(hidden_states)

    def _as_layer(self, hidden: Tensor) -> Any:
        """Hidden states in the form that this family's layers give them; no attention weights."""
        return (hidden, None) if self.anatomy.returns_tuple else hidden
