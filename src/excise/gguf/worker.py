"""Worker process that runs one GGUF for `engine`, called with FILE LONGEST THREADS [LORA].

ggml aborts its process where an assertion fails, so it gets one of its own. It runs as a file and imports
nothing of the package. Requests are JSON lines on standard input; answers are JSON lines on standard
output, followed by float32 logits where a request asks for them.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any, BinaryIO

_BATCH = 64  # tokens of a pass: llama.cpp reserves memory for the logits of all
_F32 = 0  # ggml's id of float32


class _Model:
    def __init__(self, path: str, longest: int, threads: int, adapter: str | None) -> None:
        import llama_cpp

        self._llama = llama_cpp.Llama(
            path,
            n_ctx=longest + 1,
            n_batch=_BATCH,
            n_ubatch=_BATCH,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=True,
            verbose=False,
            lora_path=adapter,
            type_k=_F32,
            type_v=_F32,
        )

    def read(self, ids: Sequence[int]) -> Any:
        """Return the logits (T, V) after each of `ids`, from an empty context."""
        self._llama.reset()
        return self._go_on(ids)

    def _go_on(self, ids: Sequence[int]) -> Any:
        before = self._llama.n_tokens
        self._llama.eval(list(ids))
        return self._llama.scores[before : self._llama.n_tokens]

    def tokens(self, text: str) -> list[int]:
        """Tokenise a prompt, with a BOS before it where the file's own keys ask for one."""
        return list(self._llama.tokenize(text.encode(), add_bos=True, special=True))

    def greedy(self, ids: Sequence[int], ends: set[int], limit: int) -> list[int]:
        """Decode greedily; return the response tokens, an end token included."""
        logits = self.read(ids)
        out: list[int] = []
        while True:
            out.append(int(logits[-1].argmax()))
            if out[-1] in ends or len(out) == limit:
                return out
            logits = self._go_on(out[-1:])


def serve(arguments: Sequence[str], requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    path, longest, threads, *adapter = arguments
    model = _Model(path, int(longest), int(threads), adapter[0] if adapter else None)
    _answer(answers, {})
    for line in requests:
        asked = json.loads(line)
        if "text" in asked:
            _answer(answers, {"tokens": model.tokens(asked["text"])})
        elif "limit" in asked:
            tokens = model.greedy(asked["ids"], set(asked["ends"]), asked["limit"])
            _answer(answers, {"tokens": tokens})
        else:
            logits = model.read(asked["ids"])[-asked["keep"] :]
            _answer(answers, {"shape": logits.shape}, logits.tobytes())


def _answer(answers: BinaryIO, head: dict[str, Any], body: bytes = b"") -> None:
    answers.write(json.dumps(head).encode() + b"\n" + body)
    answers.flush()


def _main(arguments: Sequence[str]) -> None:
    # Whatever a library prints to standard output must not come between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with open(0, "rb") as requests, answers:
        serve(arguments, requests, answers)


if __name__ == "__main__":
    _main(sys.argv[1:])
