"""Convert rows of weights between float32 and ggml's types, as llama.cpp itself does.

gguf-py decodes every type and encodes the plain ones; ggml's own quantiser, from an installed
llama-cpp-python, encodes the others (K and IQ types).

Shapes: O rows, I columns.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType, dequantize, quantize

from excise.errors import ConfigError, ExportError, ModelError

# Types that gguf-py encodes bit for bit as ggml does.
_PLAIN = frozenset({"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"})
FLOATS = ("F32", "F16", "BF16")
# Types that need an importance matrix, which Excise does not compute.
_NEED_IMATRIX = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "Q2_K_S"})
_NO_TARGETS = frozenset(
    {"GUESSED", "MXFP4_MOE", "NVFP4", "IQ2_M", "IQ3_XS", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0"}
)
GET_LLAMA_CPP = "pip install llama-cpp-python"

Rows = npt.NDArray[np.float32]
Raw = npt.NDArray[np.uint8]


def file_types() -> dict[str, int]:
    """List the types that a file can be quantised to, such as "Q4_K_M": name -> llama.cpp's number."""
    names = {t.name.removeprefix("ALL_").removeprefix("MOSTLY_"): int(t) for t in LlamaFileType}
    return {n: v for n, v in names.items() if n not in _NEED_IMATRIX | _NO_TARGETS}


def check_file_type(name: str) -> str:
    """Return the name as llama.cpp writes it.

    Raises:
        ConfigError: no such type, or one that needs an importance matrix.
    """
    import difflib

    known, wanted = file_types(), name.strip().upper()
    if wanted in known:
        return wanted
    if wanted in _NEED_IMATRIX:
        raise ConfigError(f"quantisation type {wanted} needs an importance matrix: take another")
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    raise ConfigError(f"unknown quantisation type {name!r}; {hint}")


def to_float(raw: Raw, kind: GGMLQuantizationType) -> Rows:
    """Decode stored rows (O, bytes) to float32 (O, I).

    Raises:
        ModelError: gguf-py does not know this type.
    """
    try:
        return np.ascontiguousarray(dequantize(raw, kind), dtype=np.float32)
    except NotImplementedError:
        raise ModelError(f"tensors of type {kind.name} cannot be read here") from None


def check_can_store(kind: GGMLQuantizationType) -> None:
    """Refuse a type that `from_float` cannot encode here.

    Raises:
        ExportError: it needs llama-cpp-python, or an importance matrix.
    """
    if kind.name in _PLAIN:
        return
    if ggml_library() is None:
        raise ExportError(
            f"tensors of type {kind.name} are made by ggml's own quantiser: {GET_LLAMA_CPP}"
        )
    if ggml_library().ggml_quantize_requires_imatrix(int(kind)):
        raise ExportError(
            f"tensors of type {kind.name} cannot be made without an importance matrix: "
            "patch a file of another type, or use --format gguf without --from-gguf"
        )


def from_float(rows: Rows, kind: GGMLQuantizationType) -> Raw:
    """Encode rows (O, I) in the type `kind`: (O, bytes). Each row is quantised on its own."""
    library = ggml_library()
    if library is None or kind.name in FLOATS:
        return np.ascontiguousarray(quantize(rows, kind)).view(np.uint8).reshape(len(rows), -1)
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    block, size = GGML_QUANT_SIZES[kind]
    out = np.empty((rows.shape[0], rows.shape[1] // block * size), dtype=np.uint8)
    written = library.ggml_quantize_chunk(
        int(kind),
        rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
        out.ctypes.data_as(ctypes.c_void_p),
        0,
        rows.shape[0],
        rows.shape[1],
        None,
    )
    assert written == out.nbytes, "ggml and gguf-py disagree on the size of a row"
    return out


@cache
def ggml_library() -> Any:
    """Load the ggml library of llama-cpp-python; None where that is not installed."""
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError):
        return None
    folder = Path(llama_cpp.__file__).parent / "lib"
    found = sorted(p for p in folder.glob("*ggml-base*") if p.suffix in (".so", ".dylib", ".dll"))
    if not found:
        return None
    library = ctypes.CDLL(str(found[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_float),
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    return library
