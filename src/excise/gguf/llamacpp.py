"""Find llama.cpp's own converter and quantiser, and run them as programs of their own.

A program that crashes cannot take Excise with it, and gets no shell: arguments are lists. No code of a
checkpoint runs: the folder that the converter reads holds none and names none.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from excise import children
from excise.errors import ConfigError, ExportError
from excise.folders import list_files
from excise.gguf.ggml import FLOATS, GET_LLAMA_CPP, file_types

Look = Callable[[], None]

_CONVERTER = "convert_hf_to_gguf.py"
_QUANTIZER = "llama-quantize"
_SOURCE = "https://github.com/ggml-org/llama.cpp"
# Where llama.cpp's build puts its programs, below a checkout.
_BUILT = (".", "build/bin", "bin", "build/bin/Release")
_OURS = Path(__file__).with_name("quantiser.py")
_NOISE = re.compile(r"^(INFO|WARNING|DEBUG|Traceback|\s|Writing:)|^$")


@dataclass(frozen=True)
class Tools:
    """Commands of the converter and the quantiser; `quantizer` is None where there is none."""

    converter: Path
    quantizer: tuple[str, ...] | None


def find_tools(folder: Path | None, types: Sequence[str] = ()) -> Tools:
    """Find llama.cpp's tools: in `folder`, else on PATH, else in llama-cpp-python and its source.

    Args:
        folder: a checkout of llama.cpp.
        types: types to write; those that are not plain floats need the quantiser.

    Raises:
        ConfigError: there is no converter, or no quantiser where one is needed.
    """
    converter = _find_converter(folder)
    quantizer = _find_quantizer(folder)
    needing = [name for name in types if name not in FLOATS]
    if needing and quantizer is None:
        raise ConfigError(
            f"{needing[0]} needs llama.cpp's quantiser, and {_QUANTIZER} is neither in --llama-cpp "
            f"nor on PATH: build it, or {GET_LLAMA_CPP}"
        )
    return Tools(converter, quantizer)


def _find_converter(folder: Path | None) -> Path:
    if folder is not None:
        if not (folder / _CONVERTER).is_file():
            raise ConfigError(
                f"{folder} holds no {_CONVERTER}: give --llama-cpp a checkout of {_SOURCE}"
            )
        return (folder / _CONVERTER).resolve()
    on_path = shutil.which(_CONVERTER)
    places = [Path(on_path)] if on_path else []
    places += [source / _CONVERTER for source in _installed_sources()]
    for place in places:
        if place.is_file():
            return place.resolve()
    raise ConfigError(
        f"llama.cpp's {_CONVERTER} was not found: get {_SOURCE} and give its folder as "
        "--llama-cpp, or patch an existing GGUF with --from-gguf"
    )


def _installed_sources() -> list[Path]:
    """Find llama.cpp within the source of an installed llama-cpp-python, where that was kept."""
    folders = list((Path(sys.prefix) / "src").glob("llama[-_]cpp[-_]python*"))
    found = importlib.util.find_spec("llama_cpp")
    if found is not None and found.origin is not None:
        folders.append(Path(found.origin).parents[1])
    return [folder / "vendor" / "llama.cpp" for folder in sorted(folders)]


def _find_quantizer(folder: Path | None) -> tuple[str, ...] | None:
    for place in (folder / part for part in _BUILT) if folder is not None else ():
        program = shutil.which(_QUANTIZER, path=str(place))
        if program:
            return (str(Path(program).absolute()),)
    on_path = shutil.which(_QUANTIZER)
    if on_path:
        return (str(Path(on_path).absolute()),)
    if importlib.util.find_spec("llama_cpp") is not None:
        return children.python(_OURS)
    return None


def plain_copy(source: Path, folder: Path) -> Path:
    """Link the files of the checkpoint `source` into the new `folder`, without anything that could run.

    The converter trusts the code that a checkpoint brings or names; here it meets none.
    """
    folder.mkdir(parents=True)
    for file in list_files(source, ExportError):
        if file.parent == Path() and file.suffix != ".py":
            (folder / file).symlink_to((source / file).resolve())
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            data = json.loads((folder / name).read_text(encoding="utf-8"))
            data.pop("auto_map", None)
            (folder / name).unlink()
            (folder / name).write_text(json.dumps(data, indent=1), encoding="utf-8")
    return folder


def convert(
    tools: Tools,
    source: Path,
    target: Path,
    kind: str,
    name: str,
    *,
    mmproj: bool = False,
    look: Look | None = None,
) -> None:
    """Convert the checkpoint in `source` to the GGUF `target` of the type `kind` (F32, F16 or BF16).

    Args:
        tools: from `find_tools`.
        source: a folder, as `plain_copy` makes it.
        target: the file to write.
        kind: of the large tensors.
        name: the model's name, for the file's metadata.
        mmproj: write the vision and audio projector instead of the language model.
        look: called now and then while it runs.

    Raises:
        ExportError: the converter failed; its own last line says why.
    """
    command = [*children.python(tools.converter), str(source), "--outfile", str(target)]
    command += ["--outtype", kind.lower(), "--model-name", name]
    # It imports from its own folder, the checkout of llama.cpp.
    beside = [tools.converter.parent]
    _run([*command, "--mmproj"] if mmproj else command, "llama.cpp's converter", beside, look)
    _check_written(target, "llama.cpp's converter")


def quantise(tools: Tools, source: Path, target: Path, kind: str, look: Look | None = None) -> None:
    """Quantise the GGUF `source` to `target` as `kind`, such as Q4_K_M; `look` now and then meanwhile.

    Raises:
        ExportError: the quantiser failed.
    """
    assert tools.quantizer is not None, "find_tools was not told of this type"
    number = kind if len(tools.quantizer) == 1 else str(file_types()[kind])
    command = [*tools.quantizer, str(source), str(target), number]
    _run(command, f"quantising to {kind}", look=look)
    _check_written(target, f"quantising to {kind}")


def _run(
    command: Sequence[str], what: str, code: Sequence[Path] = (), look: Look | None = None
) -> None:
    number, complaints = children.run(command, what, code, look)
    if number != 0:
        raise ExportError(f"{what} failed ({_reason(complaints, number)})")


def _reason(text: str, code: int) -> str:
    """Return the last line of a program's complaint that says something."""
    lines = [line.strip() for line in text.splitlines() if not _NOISE.match(line)]
    return lines[-1][:300] if lines else f"exit code {code}"


def _check_written(target: Path, what: str) -> None:
    if not target.is_file():
        raise ExportError(f"{what} ended without an error and wrote no {target.name}")
