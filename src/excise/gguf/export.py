"""Write a chosen edit as GGUF: converted and quantised, patched into an existing file, or a LoRA adapter.

Nothing is measured here. llama.cpp's own tools convert and quantise; gguf-py writes the adapter.

Shapes: O and I a writer's out and in features, R the adapter's rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import MODEL_ARCH_NAMES, GGUFWriter, Keys, get_tensor_name_map
from torch import nn

from excise.checkpoints.gguf_header import GgufFile, check_sizes, gguf_name, read_gguf, read_shards
from excise.checkpoints.model_folder import read_config, weight_files
from excise.config import ExportSection
from excise.errors import ConfigError, ExportError
from excise.events import OnEvent, Progress, ignore, phase
from excise.export.exporter import Exported
from excise.export.low_rank import adapter_factors, relative_error
from excise.export.merging import merge_checkpoint
from excise.files import (
    add_files,
    check_destination,
    hashes_of,
    scratch,
    staged,
    weights_sha256,
)
from excise.gguf.ggml import FLOATS, check_file_type, file_types
from excise.gguf.joining import Layout, join_projector, layout_of
from excise.gguf.llamacpp import Look, Tools, convert, find_tools, plain_copy, quantise
from excise.gguf.patching import patch_gguf
from excise.model.anatomy import Writer
from excise.model.edits import Edit

MODELFILE = "Modelfile"
_OF_DTYPE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Model types whose name in llama.cpp is not their own.
_ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "phi": "phi2"}


@dataclass(frozen=True)
class GgufPlan:
    """What to write as GGUF and with what tools, decided before anything is loaded.

    Attributes:
        types: file types, as llama.cpp names them; empty for the checkpoint's own.
        tools: converter and quantiser; None where a file is patched, or only an adapter is made.
        base: the GGUF to patch, or to measure an adapter on.
    """

    types: tuple[str, ...] = ()
    tools: Tools | None = None
    base: Path | None = None


def plan_gguf(section: ExportSection) -> GgufPlan:
    """Check what a configuration asks of whole models as GGUF.

    Raises:
        ConfigError: an unknown type, a missing tool, options that do not go together.
        ModelError: the GGUF to patch is not a whole one.
    """
    types = tuple(dict.fromkeys(check_file_type(name) for name in section.quantize))
    base = _base(section)
    if base is not None and types:
        raise ConfigError("--from-gguf keeps the file's own types: leave --quantize out")
    return GgufPlan(types, None if base else find_tools(_checkout(section), types), base)


def plan_gguf_adapter(section: ExportSection) -> GgufPlan:
    """Check what a configuration asks of GGUF adapters, which are measured on a base.

    Raises:
        ConfigError: the checkout that is named has no converter.
        ModelError: the GGUF to measure on is not a whole one.
    """
    base, checkout = _base(section), _checkout(section)
    if base is not None:
        return GgufPlan(base=base)
    try:
        return GgufPlan(tools=find_tools(checkout))
    except ConfigError:
        if checkout is not None:
            raise
        return GgufPlan()  # the adapter can be written; nothing makes a base to measure it on


def _base(section: ExportSection) -> Path | None:
    """Return the first part of the GGUF that is named, once it is known to be whole."""
    if section.from_gguf is None:
        return None
    shards = read_shards(Path(section.from_gguf))
    check_sizes(shards)
    return shards[0].path


def _checkout(section: ExportSection) -> Path | None:
    return None if section.llama_cpp is None else Path(section.llama_cpp)


def own_type(source: Path) -> str:
    """Return the float type that holds a checkpoint's weights without loss."""
    config = read_config(source)
    text = config.get("text_config") or {}
    stored = (config.get(k) or text.get(k) for k in ("dtype", "torch_dtype"))
    return _OF_DTYPE.get(str(next(filter(None, stored), "")).removeprefix("torch."), "F16")


def file_stem(name: str) -> str:
    """Turn a model's name into the beginning of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def export_gguf(
    source: Path,
    destination: Path,
    edits: Mapping[str, Edit],
    writers: Sequence[Writer],
    plan: GgufPlan,
    name: str,
    on_event: OnEvent = ignore,
    extra_files: Mapping[str, str] | None = None,
    describe: Callable[[GgufFile, str, str | None], str] | None = None,
    *,
    join: bool = False,
) -> Exported:
    """Convert the edited checkpoint and quantise it; for a multimodal model the projector as well.

    Args:
        source: the checkpoint that the writers' model was loaded from.
        destination: a new or empty folder; it is seen when all of it is there.
        edits: writer name -> edit.
        writers: the loaded model's writers, holding their original values.
        plan: the types, and the tools.
        name: what the files are called, with their type.
        on_event: told of the steps.
        extra_files: name -> text of files to add.
        describe: the Modelfile, from the first file's header and name and the projector's name.
        join: put language model and projector into one file where Ollama takes such a one.

    Raises:
        ExportError: a tool failed. OutputError, StorageError: as `files.staged`.
    """
    check_destination(destination, source)
    assert plan.tools is not None
    types = plan.types or (own_type(source),)
    size = sum(path.stat().st_size for path in weight_files(source))
    needed = int(sum(size * _bits(kind) / 16 for kind in types))
    with staged(destination, needed) as folder, scratch(destination, 2 * size) as room:
        merge_checkpoint(source, room / "merged", edits, writers, on_event)
        plain = plain_copy(room / "merged", room / "plain")
        for kind, path in convert_all(plan.tools, plain, room, types, name, on_event):
            path.rename(folder / f"{name}-{kind}.gguf")
        projector = None
        if has_projector(source):
            kind = own_type(source)
            projector = f"mmproj-{name}-{kind}.gguf"
            convert(plan.tools, plain, folder / projector, kind, name, mmproj=True)
        layout = None if projector is None or not join else layout_of(folder / projector)
        if projector is not None and layout is not None:
            _join_all(folder, folder / projector, layout, read_config(source), room)
            projector = None
        files = dict(extra_files or {})
        if describe is not None:
            first = folder / f"{name}-{types[0]}.gguf"
            files[MODELFILE] = describe(read_gguf(first), first.name, projector)
        add_files(folder, files)
    details = {"patched": False, "joined": layout is not None}
    return _exported(destination, "ollama" if join else "gguf", details)


def _join_all(
    folder: Path, projector: Path, layout: Layout, config: dict[str, Any], room: Path
) -> None:
    """Put the projector into every language model in the folder, and remove it."""
    aside = room / projector.name
    projector.rename(aside)
    for text in sorted(folder.glob("*.gguf")):
        joined = room / "joined.gguf"
        join_projector(text, aside, layout, config, joined)
        joined.replace(text)


def convert_all(
    tools: Tools, plain: Path, room: Path, types: Sequence[str], name: str, on_event: OnEvent
) -> Iterator[tuple[str, Path]]:
    """Yield (type, file in `room`) of every type; remove a file that nobody takes away at the end."""
    own = own_type(plain)
    small = [kind for kind in types if kind not in FLOATS]
    # Its files are links of our own making, which loading a model would refuse.
    weights = sum(path.stat().st_size for path in plain.glob("*.safetensors")) / _bits(own)
    # Quantised files are made from the float file that loses nothing.
    floats = dict.fromkeys([kind for kind in types if kind in FLOATS] + ([own] if small else []))
    for kind in floats:
        path, step = room / f"{kind}.gguf", f"convert {kind}"
        with phase(step, on_event):
            look = _growing(path, step, weights * _bits(kind), on_event)
            convert(tools, plain, path, kind, name, look=look)
        if kind != own:
            yield kind, path
            path.unlink(missing_ok=True)
    for kind in small:
        path, step = room / f"{kind}.gguf", f"quantise {kind}"
        with phase(step, on_event):
            look = _growing(path, step, weights * _bits(kind), on_event)
            quantise(tools, room / f"{own}.gguf", path, kind, look)
        yield kind, path
        path.unlink(missing_ok=True)
    if own in types:
        yield own, room / f"{own}.gguf"


def _growing(path: Path, step: str, size: float, on_event: OnEvent) -> Look:
    """Return what tells how many megabytes of a file are written, of about `size` bytes."""
    total = int(size / 1e6)

    def look() -> None:
        written = int(path.stat().st_size / 1e6) if path.is_file() else 0
        on_event(Progress(step, min(written, total), total))

    return look


def has_projector(source: Path) -> bool:
    """Return whether a checkpoint has vision or audio, which llama.cpp keeps in a file of its own."""
    config = read_config(source)
    return any(config.get(part) for part in ("vision_config", "audio_config"))


def _bits(kind: str) -> int:
    """Return the bits per weight of a file type, rounded up: mixed types hold some larger tensors."""
    digit = next(int(c) for c in kind if c.isdigit())
    return {"F32": 32}.get(kind, 16 if kind in FLOATS else digit + 2)


def export_patched(
    destination: Path,
    edits: Mapping[str, Edit],
    writers: Sequence[Writer],
    model: nn.Module,
    base: Path,
    on_event: OnEvent = ignore,
    extra_files: Mapping[str, str] | None = None,
) -> Exported:
    """Patch the edited tensors of the GGUF `base` in place; see `patching.patch_gguf`."""
    done = patch_gguf(base, destination, edits, writers, model, on_event, extra_files)
    details = {"patched": True, "base": base.name, "tensors": list(done.tensors)}
    return _exported(destination, "gguf", details)


def export_gguf_adapter(
    destination: Path,
    edits: Mapping[str, Edit],
    writers: Sequence[Writer],
    *,
    architecture: str,
    layers: int,
    rank: int,
    name: str,
    on_event: OnEvent = ignore,
    extra_files: Mapping[str, str] | None = None,
) -> Exported:
    """Write a LoRA for llama.cpp's `--lora`: each matrix's best rank-R approximation of W' - W.

    Args:
        destination: a new or empty folder; it is seen when all of it is there.
        edits: writer name -> edit.
        writers: the loaded model's writers, holding their original values.
        architecture: llama.cpp's name of it.
        layers: of the model.
        rank: R, the same for every matrix.
        name: of the file.
        on_event: told of each matrix.
        extra_files: name -> text of files to add.

    Raises:
        ExportError: there is nothing to edit, or a matrix has no name in this architecture.
        OutputError, StorageError: as `files.staged`.
    """
    check_destination(destination)
    arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
    names = get_tensor_name_map(arch, layers)
    factors = adapter_factors(edits, writers, rank, on_event)
    size = sum(4 * (f.b.numel() + f.a.numel()) for f in factors.modules)
    with staged(destination, size) as folder:
        out = GGUFWriter(folder / f"{name}-LoRA-F32.gguf", architecture)
        out.add_type("adapter")
        out.add_string(Keys.Adapter.TYPE, "lora")
        out.add_float32(Keys.Adapter.LORA_ALPHA, float(rank))  # a scale of one
        out.add_name(name)
        for module in factors.modules:
            tensor = gguf_name(names, f"{module.name}.weight")
            if tensor is None:
                raise ExportError(f"{architecture} has no tensor for {module.name} in a GGUF")
            out.add_tensor(f"{tensor}.lora_a", module.a.float().contiguous().numpy())
            out.add_tensor(f"{tensor}.lora_b", module.b.float().contiguous().numpy())
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
        add_files(folder, dict(extra_files or {}))
    details = {
        "rank": rank,
        "error": relative_error([m.squares for m in factors.modules]),
        "not_carried": list(factors.not_carried),
    }
    return _exported(destination, "gguf-adapter", details)


def architecture_of(model_type: str, base: Path | None) -> str:
    """Return llama.cpp's name of an architecture: a GGUF's own, else the one named like the model type.

    Raises:
        ConfigError: none is.
    """
    if base is not None:
        return read_gguf(base).architecture
    plain = model_type.removesuffix("_text")
    wanted = _ARCHITECTURES.get(plain, plain)
    for name in MODEL_ARCH_NAMES.values():
        if re.sub(r"[^a-z0-9]", "", name) == re.sub(r"[^a-z0-9]", "", wanted):
            return name
    raise ConfigError(
        f"llama.cpp's name for model type {model_type!r} is not known: name a GGUF of the base "
        "model with --from-gguf"
    )


def _exported(folder: Path, form: str, details: dict[str, Any]) -> Exported:
    """Describe what was written, with every file's type, size and hash."""
    hashes = hashes_of(folder)
    files = [
        _file(folder / name, digest) for name, digest in hashes.items() if name.endswith(".gguf")
    ]
    size = sum(int(one["bytes"]) for one in files)
    whole = weights_sha256(hashes)
    return Exported(folder, form, whole, size, {**details, "files": files}, hashes)


def _file_type(path: Path) -> str:
    """Return a file's type from its name, else the type of most of its tensors."""
    named = re.search(r"-([a-z0-9_]+)(-\d{5}-of-\d{5})?\.gguf$", path.name, re.IGNORECASE)
    if named and named[1].upper() in file_types():
        return named[1].upper()
    kinds = [t.type.name for t in read_gguf(path).tensors.values() if len(t.shape) > 1]
    return max(sorted(set(kinds)), key=kinds.count, default="F32")


def _file(path: Path, digest: str) -> dict[str, Any]:
    part = "projector" if path.name.startswith("mmproj-") else "model"
    return {
        "file": path.name,
        "type": _file_type(path),
        "part": part,
        "bytes": path.stat().st_size,
        "sha256": digest,
    }
