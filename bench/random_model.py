"""Random models of realistic width, for timings that need no meaning: responses run to their limit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from excise.capture.directions import Directions, normalise
from excise.checkpoints.loading import Loaded
from excise.config import EditSection
from excise.engine.engine import Engine, Plan
from excise.engine.requests import Divergence, Responses
from excise.judges.markers import Markers
from excise.methods.directional import DirectionalMethod
from excise.methods.profiles import Candidate, Profile
from excise.model.anatomy import describe

COMPONENTS = ("attn.o_proj", "mlp.down_proj")
MARKERS = Markers(("no such phrase",))
REQUESTS: list[Responses | Divergence] = [Responses("target", MARKERS.found), Divergence()]


class Letters:
    """A tokenizer stand-in: random weights need no text."""

    pad_token_id, eos_token_id = 0, 1

    def decode(self, tokens: Any, **_: Any) -> str:
        return " ".join(map(str, tokens))

    def batch_decode(self, rows: Any, **_: Any) -> list[str]:
        return [self.decode(row.tolist()) for row in rows]


def gemma4(**shape: Any) -> Any:
    """Gemma 4 text with per-layer embeddings and shared keys and values."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    layers = shape["num_hidden_layers"]
    config = Gemma4TextConfig(
        **shape,
        vocab_size_per_layer_input=shape["vocab_size"],
        num_kv_shared_layers=layers // 3,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        final_logit_softcapping=30.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return Gemma4ForCausalLM(config)


def qwen3(**shape: Any) -> Any:
    """Qwen3 with tied embeddings."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(**shape, tie_word_embeddings=True, eos_token_id=1, pad_token_id=0)
    )


@dataclass(frozen=True)
class Setup:
    """A random model with an engine and candidates."""

    loaded: Loaded
    engine: Engine
    edits: list[list[Any]]
    limit: int


def setup(
    make: Any,
    shape: dict[str, Any],
    device: str,
    dtype: torch.dtype,
    plan: Plan,
    *,
    prompts: int,
    length: int,
    limit: int,
    candidates: int,
    alike: int = 0,
) -> Setup:
    """Build the model and everything that a trial of it needs.

    `alike`: so many tokens more, which all prompts begin with.
    """
    torch.manual_seed(0)
    with torch.device(device):
        model = make(**shape).to(dtype).eval().requires_grad_(False)
    loaded = Loaded(model, Letters(), describe(model), "random", None, Path(), dtype)
    layers, width = len(loaded.anatomy.layers), loaded.anatomy.width
    writers = loaded.anatomy.select(COMPONENTS)
    rows = [normalise(torch.randn(layers, width)) for _ in range(2)]
    method = DirectionalMethod(writers, Directions(rows[0], rows[1]), EditSection())
    top = shape["vocab_size"]
    head = torch.randint(2, top, (alike,)).tolist()
    ids = {
        side: [head + torch.randint(2, top, (length,)).tolist() for _ in range(prompts)]
        for side in ("target", "contrast")
    }
    profiles = {name: Profile(1.0, 0.7 * layers, 0.5, 0.4 * layers) for name in COMPONENTS}
    edits = [method.edits(Candidate(0.5 * layers + 0.1 * i, profiles)) for i in range(candidates)]
    engine = Engine(loaded, writers, ids, max_new_tokens=limit, plan=plan)
    return Setup(loaded, engine, edits, limit)
