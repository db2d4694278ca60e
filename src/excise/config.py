"""What a run is told to do: frozen sections, and the one place where their sources meet.

Later layers win: defaults < behaviour file < `--config` file < flags < `--set a.b=c`. An unknown key
is an error that names its nearest neighbour. Knows nothing of models, prompts' contents or Optuna.
"""

from __future__ import annotations

import datetime
import difflib
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from excise.errors import ConfigError
from excise.reading import full_path, is_file

RowNorms = Literal["none", "pre", "full"]
MethodName = Literal["directional", "subspace", "ridge", "ara"]
Format = Literal["safetensors", "adapter", "gguf", "gguf-adapter"]


class Section(BaseModel):
    """Base of every section: immutable, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSection(Section):
    """Which model, and how it is loaded."""

    source: str = ""
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device_map: str | None = None
    quantize: Literal["bnb-4bit", "bnb-8bit"] | None = None
    gguf_file: str | None = None
    trust_remote_code: bool = False


class PromptSource(Section):
    """One prompt set: a .txt, .jsonl, .csv or .parquet file, or a dataset id."""

    source: str
    column: str = "text"
    answer_column: str | None = None
    group_column: str | None = None
    split: str = "train"
    subset: str | None = None
    revision: str | None = None


class PromptSection(Section):
    """Where prompts come from and how they are dressed. Sizes count rows.

    `response_prefix` is what every response begins with: None finds what most of them share.
    """

    target: PromptSource | None = None
    contrast: PromptSource | None = None
    target_eval: PromptSource | None = None
    contrast_eval: PromptSource | None = None
    target_holdout: PromptSource | None = None
    contrast_holdout: PromptSource | None = None
    direction_size: int = Field(400, ge=1)
    eval_size: int = Field(100, ge=1)
    holdout_size: int | None = Field(None, ge=1)
    system: str | None = None
    prefix: str = ""
    suffix: str = ""
    chat_template: str | None = None
    thinking: bool = False
    response_prefix: str | None = None
    date: datetime.date = datetime.date(2025, 1, 1)


class DirectionSection(Section):
    """How directions are computed from residuals."""

    center: Literal["mean", "geometric_median"] = "mean"
    projected: bool = False
    winsor: float | None = Field(None, gt=0.5, le=1.0)


class EditSection(Section):
    """Which writers are edited, and how. No components named: the family's own choice."""

    components: tuple[str, ...] = ()
    row_norms: RowNorms = "full"
    post_norms: bool = True


class SubspaceSection(Section):
    """Several directions per layer. `rank` counts them, the difference of means among them."""

    rank: int = Field(4, ge=1, le=8)
    kind: Literal["principal", "prototypes"] = "principal"


class RidgeSection(Section):
    """Ridge ablation.

    `basis` bounds the dimensions it works in, `rank` and `neighbours` what the search tries of each.
    """

    basis: int = Field(512, ge=16)
    rank: int = Field(8, ge=1)
    neighbours: int | None = Field(None, ge=1)


class AraSection(Section):
    """Arbitrary-rank ablation. `neighbours` bounds the k that is searched."""

    iterations: int = Field(40, ge=1)
    neighbours: int | None = Field(None, ge=1)


class ScoreSection(Section):
    """What is measured. `final` scorers run on the original and on the chosen edit only.

    `show` names the sides of which a few prompts and responses may stand in the record and report.
    """

    objectives: tuple[str, ...] = ("behaviour_rate", "drift")
    report: tuple[str, ...] = ("drift_first",)
    final: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    markers_file: str | None = None
    max_new_tokens: int = Field(100, ge=1)
    show: tuple[Literal["target", "contrast"], ...] = ("target", "contrast")


class SearchSection(Section):
    """The optimiser. `batch` is C, the candidates asked and measured together; 0 chooses it.

    `refine` trials more start from the front and descend by gradient.
    """

    trials: int = Field(200, ge=1)
    startup_trials: int = Field(60, ge=1)
    batch: int = Field(0, ge=0)
    ei_candidates: int = Field(128, ge=1)
    screen: bool = True
    refine: int = Field(0, ge=0)
    select: str = "knee"


class EngineSection(Section):
    """Limits of one batched pass; 0 measures them. `rows` are candidates x prompts."""

    rows: int = Field(0, ge=0)
    reuse: bool = True
    memory_fraction: float = Field(0.8, gt=0, le=1)


class ExportSection(Section):
    """What a run writes when it is done.

    `quantize` are llama.cpp's file types of GGUF exports, `llama_cpp` a checkout with its tools,
    `from_gguf` a GGUF of the same model to patch in place of converting.
    """

    formats: tuple[Format, ...] = ("safetensors",)
    adapter_rank: int | None = Field(None, ge=1)
    adapter_error: float = Field(0.2, gt=0, lt=1)
    quantize: tuple[str, ...] = ()
    llama_cpp: str | None = None
    from_gguf: str | None = None


class Config(Section):
    """Everything that a run is told. `behaviour` names what is edited out."""

    behaviour: str = "custom"
    description: str = ""
    method: MethodName | None = None  # None: `methods.named` says which
    goal: Literal["remove", "strengthen"] = "remove"
    seed: int = Field(0, ge=0)
    model: ModelSection = ModelSection()
    prompts: PromptSection = PromptSection()
    directions: DirectionSection = DirectionSection()
    edit: EditSection = EditSection()
    subspace: SubspaceSection = SubspaceSection()
    ridge: RidgeSection = RidgeSection()
    ara: AraSection = AraSection()
    scores: ScoreSection = ScoreSection()
    search: SearchSection = SearchSection()
    engine: EngineSection = EngineSection()
    export: ExportSection = ExportSection()


def load_config(
    *,
    behaviour: str | None = None,
    file: Path | None = None,
    flags: dict[str, Any] | None = None,
    sets: tuple[str, ...] = (),
) -> Config:
    """Merge the layers into a `Config`.

    Args:
        behaviour: a built-in behaviour's name, or the path of a TOML file.
        file: a TOML file with any of the sections.
        flags: dotted keys and their values, as given by command-line flags.
        sets: `a.b=c` expressions; the value is read as TOML, else as a string.

    Raises:
        ConfigError: a key is unknown, a value is not of its type, a file does not parse.
    """
    tree: dict[str, Any] = {}
    if behaviour is not None:
        tree = _merge(tree, read_behaviour(behaviour))
    if file is not None:
        tree = _merge(tree, _anchor(_read_toml(file), file.parent))
    for key, value in (flags or {}).items():
        if isinstance(value, dict):  # a prompt source: the behaviour's columns are not this file's
            tree = _merge(tree, _nest(key, None))
        tree = _merge(tree, _nest(key, value))
    for expression in sets:
        key, equals, text = expression.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {expression!r}: write it as section.key=value")
        tree = _merge(tree, _nest(key.strip(), _parse_value(text.strip())))
    return validate(tree)


def validate(tree: dict[str, Any]) -> Config:
    """A `Config` from plain data; errors are one line each and name the key.

    Raises:
        ConfigError: as `load_config`.
    """
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigError("; ".join(_explain(item) for item in error.errors())) from None


def behaviours() -> dict[str, Path]:
    """The built-in behaviours: name -> TOML file."""
    folder = Path(str(resources.files("excise"))) / "data" / "behaviours"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_behaviour(name: str) -> dict[str, Any]:
    """The layer of a built-in behaviour or of a user's TOML file; paths in it are made absolute."""
    path = behaviours().get(name)
    if path is None:
        path = Path(name)
        if path.suffix != ".toml" or not path.is_file():
            known = ", ".join(behaviours())
            raise ConfigError(
                f"behaviour {name!r}: neither a built-in one ({known}) nor a TOML file that exists"
            )
    tree = _anchor(_read_toml(path), path.parent)
    tree.setdefault("behaviour", path.stem)
    return tree


def to_toml(config: Config) -> str:
    """`config` as TOML that `load_config(file=...)` reads back to an equal value."""
    lines: list[str] = []
    _emit(config.model_dump(mode="json", exclude_none=True), (), lines)
    return "\n".join(lines).strip() + "\n"


def _emit(table: dict[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    scalars = {key: value for key, value in table.items() if not isinstance(value, dict)}
    if path and (scalars or not table):
        lines.append(f"\n[{'.'.join(path)}]")
    lines.extend(f"{key} = {_toml_value(value)}" for key, value in scalars.items())
    for key, value in table.items():
        if isinstance(value, dict):
            _emit(value, (*path, key), lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return (
            '"'
            + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped)
            + '"'
        )
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"configuration file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"configuration file {path} is not valid TOML: {error}") from None


def _anchor(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make the file names in a TOML file relative to that file, not to the working directory."""
    prompts = tree.get("prompts")
    for value in prompts.values() if isinstance(prompts, dict) else ():
        if isinstance(value, dict) and isinstance(value.get("source"), str):
            value["source"] = _beside(value["source"], folder)
    if isinstance(prompts, dict) and isinstance(prompts.get("chat_template"), str):
        prompts["chat_template"] = _beside(prompts["chat_template"], folder)
    scores = tree.get("scores")
    if isinstance(scores, dict):
        if isinstance(scores.get("markers_file"), str):
            scores["markers_file"] = _beside(scores["markers_file"], folder)
        if isinstance(scores.get("files"), list):
            scores["files"] = [_beside(str(name), folder) for name in scores["files"]]
    return tree


def _beside(name: str, folder: Path) -> str:
    candidate = folder / name
    return str(full_path(candidate)) if is_file(candidate) else name


def _nest(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = (
            _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(error: Any) -> str:
    """One pydantic error in the user's words."""
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    if error["type"] != "extra_forbidden":
        return f"configuration key {key}: {error['msg']}"
    section: Any = Config
    for part in path[:-1]:
        annotation = section.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    near = difflib.get_close_matches(path[-1], section.model_fields, n=1)
    hint = f"; did you mean {'.'.join([*path[:-1], near[0]])}?" if near else ""
    return f"unknown configuration key {key}{hint}"
