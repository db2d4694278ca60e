"""Measure GGUF files by running them with llama.cpp, scored as the search scores.

A file is measured beside its unedited counterpart of the same type, so that the effect of quantisation
is not taken for the edit's. Cards and records get the figures of both.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from excise import children
from excise.engine.engine import EVENT_EVERY
from excise.engine.kl import kl
from excise.engine.requests import Divergence, Evidence, Request, Response, Responses
from excise.engine.stacking import CandidateEdits
from excise.errors import ExportError
from excise.events import OnEvent, at_most_every, ignore, track

_WORKER = Path(__file__).with_name("worker.py")
_LONGEST_LINE = 1 << 24  # bytes of an answer, without its logits
_CHUNK = 64  # positions whose distributions are compared at a time
_REASON = re.compile(r"GGML_ASSERT.*|error.*|.*Error: .*", re.IGNORECASE)


def available() -> bool:
    """Return whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


class GgufModel:
    """One GGUF file, loaded in a process of its own; `adapter` is a LoRA on top of it.

    Raises:
        ExportError: llama.cpp cannot load it.
    """

    def __init__(self, path: Path, longest: int, adapter: Path | None = None) -> None:
        self._path = path
        # torch's number of threads: llama.cpp's default is many times slower on a busy machine.
        numbers = [str(longest), str(torch.get_num_threads())]
        command = [*children.python(_WORKER), str(path), *numbers]
        command += [] if adapter is None else [str(adapter)]
        self._child = children.Child(command, f"llama.cpp on {path}", talks=True)
        try:
            self._answer()
        except BaseException:
            self._child.stop()
            raise

    def __enter__(self) -> GgufModel:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.stop()

    def read(self, ids: Sequence[int], keep: int) -> Tensor:
        """Return the raw logits (keep, V) of the next token after each of the last `keep` of `ids`.

        Raises:
            ExportError: llama.cpp stopped, or gave something else.
        """
        shape = self._ask({"ids": list(ids), "keep": keep}).get("shape")
        if not _whole_numbers(shape) or len(shape) != 2 or shape[0] != keep or shape[1] < 1:
            raise self._nonsense()
        raw = self._bytes(4 * shape[0] * shape[1])
        return torch.frombuffer(bytearray(raw), dtype=torch.float32).view(shape)

    def greedy(self, ids: Sequence[int], ends: frozenset[int], limit: int) -> tuple[int, ...]:
        """Decode greedily; return the response tokens, an end token included.

        Raises:
            ExportError: llama.cpp stopped, or gave something else.
        """
        asked = {"ids": list(ids), "ends": sorted(ends), "limit": limit}
        tokens = self._ask(asked).get("tokens")
        if not _whole_numbers(tokens) or not 0 < len(tokens) <= limit:
            raise self._nonsense()
        return tuple(tokens)

    def tokens(self, text: str) -> tuple[int, ...]:
        """Tokenise a prompt as llama.cpp does: with a BOS before it where the file says so.

        Raises:
            ExportError: llama.cpp stopped, or gave something else.
        """
        found = self._ask({"text": text}).get("tokens")
        if not _whole_numbers(found):
            raise self._nonsense()
        return tuple(found)

    def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        pipe = self._child.process.stdin
        assert pipe is not None
        try:
            pipe.write(json.dumps(asked).encode() + b"\n")
            pipe.flush()
        except OSError:  # it has ended; its standard error says why
            raise self._stopped() from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        pipe = self._child.process.stdout
        assert pipe is not None
        with self._child.awaited():
            line = pipe.readline(_LONGEST_LINE)
        if not line.endswith(b"\n"):
            raise self._stopped() if len(line) < _LONGEST_LINE else self._nonsense()
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            raise self._nonsense() from None
        if not isinstance(answer, dict):
            raise self._nonsense()
        return answer

    def _bytes(self, count: int) -> bytes:
        pipe = self._child.process.stdout
        assert pipe is not None
        with self._child.awaited():
            raw = pipe.read(count)
        if len(raw) != count:
            raise self._stopped()
        return raw

    def _stopped(self) -> ExportError:
        """Explain why the process ended, from its standard error."""
        code = self._child.wait()
        reasons = _REASON.findall(self._child.stderr_tail())
        self._child.stop()
        reason = reasons[-1].strip()[:200] if reasons else f"exit code {code}"
        return ExportError(f"llama.cpp cannot run {self._path} ({reason})")

    def _nonsense(self) -> ExportError:
        self._child.stop()
        return ExportError(f"llama.cpp cannot run {self._path} (its process answered nonsense)")


def _whole_numbers(found: Any) -> TypeGuard[list[int]]:
    return isinstance(found, list) and all(type(number) is int for number in found)


class GgufEngine:
    """Engine that answers scorers' requests for one GGUF, without edits.

    `reference` is another engine on the same prompts, whose model is the original. `spoken` are the last
    tokens of every prompt that belong to its response.
    """

    def __init__(
        self,
        model: GgufModel,
        prompts: dict[str, list[list[int]]],
        tokenizer: Any,
        *,
        ends: frozenset[int],
        limit: int,
        spoken: Sequence[int] = (),
        reference: GgufEngine | None = None,
        on_event: OnEvent = ignore,
    ) -> None:
        self._model = model
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._ends = ends
        self._limit = limit
        self._spoken = tuple(spoken)
        self._reference = reference
        self._on_event = at_most_every(EVENT_EVERY, on_event)
        self._known: dict[str, list[Response]] = {}

    def measure(
        self, candidates: Sequence[CandidateEdits], requests: Sequence[Request]
    ) -> list[Evidence]:
        """Measure as `Engine.measure` does, for the one candidate without edits."""
        assert len(candidates) == 1, "a GGUF is one model"
        evidence = Evidence()
        for request in requests:
            if isinstance(request, Responses):
                evidence.responses[request.side] = self.responses(request.side)
            elif isinstance(request, Divergence):
                evidence.divergence[request.side] = list(self._diverge(request.side))
        return [evidence]

    def responses(self, side: str) -> list[Response]:
        """Return whole greedy responses to a side's prompts, decoded once."""
        if side not in self._known:
            prompts = self._prompts[side]
            asked = track(prompts, "responses", len(prompts), self._on_event)
            self._known[side] = [self._answer(ids) for ids in asked]
        return self._known[side]

    def _answer(self, ids: list[int]) -> Response:
        tokens = self._model.greedy(ids, self._ends, self._limit)
        text = str(self._tokenizer.decode([*self._spoken, *tokens], skip_special_tokens=True))
        return Response(tokens, text, tokens[-1] in self._ends)

    def _diverge(self, side: str) -> Iterator[Tensor]:
        """Yield KL(original || this) at every token of the original's responses, per prompt."""
        original = self._reference or self
        pairs = list(zip(self._prompts[side], original.responses(side), strict=True))
        for ids, response in track(pairs, "passes", len(pairs), self._on_event):
            whole = [*ids, *response.tokens[:-1]]
            keep = len(response.tokens)
            before = original._model.read(whole, keep)
            after = self._model.read(whole, keep)
            starts = range(0, keep, _CHUNK)
            parts = [kl(before[at : at + _CHUNK], after[at : at + _CHUNK]) for at in starts]
            yield torch.cat(parts).double()
