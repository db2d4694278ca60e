"""Worker process that quantises one GGUF for `llamacpp`, called with SOURCE TARGET NUMBER.

ggml aborts its process where an assertion fails, so it gets one of its own. It runs as a file and imports
nothing of the package.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence


def quantise(arguments: Sequence[str]) -> int:
    """Quantise to the file type of this number; return the exit code."""
    import llama_cpp

    source, target, number = arguments
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = int(number)
    parameters.allow_requantize = True
    code = llama_cpp.llama_model_quantize(
        source.encode(), target.encode(), ctypes.byref(parameters)
    )
    return int(code != 0)


if __name__ == "__main__":
    raise SystemExit(quantise(sys.argv[1:]))
