"""Settings of a run: frozen sections, and the order in which their sources are merged.

Later layers win: defaults < behaviour file < `--config` file < flags < `--set a.b=c`. An unknown key
is an error that names its nearest neighbour. Knows nothing of models, prompts' contents or Optuna.
"""

from __future__ import annotations

import datetime
import difflib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, Field

from excise.errors import ConfigError
from excise.formats import DEFAULT
from excise.reading import DEEPEST, check_depth, is_file, is_unicode, read_toml
from excise.setting_types import (
    MOST,
    Count,
    CountOrNone,
    Distinct,
    FormatName,
    Label,
    Match,
    Name,
    Section,
    Span,
)
from excise.trees import BUILTIN, merge, nest, parse_value, resolve_paths, toml_text, walk_texts

RowNorms = Literal["none", "pre", "full"]
AdapterForm = Literal["dora", "lora"]
MethodName = Literal["directional", "subspace", "ridge", "ara"]

_SHOWN = 3  # errors of one configuration that a message names


class ModelSection(Section):
    """Model to load, and how."""

    source: Name = ""
    revision: Name | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device_map: str | None = None
    quantize: Literal["bnb-4bit", "bnb-8bit"] | None = None
    gguf_file: Name | None = None
    trust_remote_code: bool = False


class PromptSource(Section):
    """One prompt set: a .txt, .jsonl, .csv or .parquet file, or a dataset id.

    With `where`, COLUMN=VALUE, only rows of that value are taken.
    """

    source: Name
    column: str = "text"
    answer_column: str | None = None
    group_column: str | None = None
    where: Match | None = None
    split: str = "train"
    subset: str | None = None
    revision: str | None = None


class PromptSection(Section):
    """Sources of prompts, and how they are put to the model. Sizes count rows.

    `keep` are ordinary prompts whose responses should stay, of every source that it names; at most
    `keep_size` of them are used, sources and kinds in turn.
    `confirm_size` bounds the rows beyond the holdout on which trials that could be chosen are measured
    again; 0 leaves that out.
    `borderline` are harmless prompts that look like target prompts; `false_rate` is measured on them.
    `response_prefix` is the text that every response begins with; None finds what most of them share.
    """

    target: PromptSource | None = None
    contrast: PromptSource | None = None
    target_eval: PromptSource | None = None
    contrast_eval: PromptSource | None = None
    target_holdout: PromptSource | None = None
    contrast_holdout: PromptSource | None = None
    keep: Annotated[tuple[PromptSource, ...], Distinct] = (PromptSource(source=BUILTIN),)
    borderline: Annotated[tuple[PromptSource, ...], Distinct] = ()
    direction_size: Count = 400
    eval_size: Count = 100
    keep_size: Count = 256
    holdout_size: Count | None = None
    confirm_size: CountOrNone = 100
    system: str | None = None
    prefix: str = ""
    suffix: str = ""
    chat_template: Name | None = None
    thinking: bool = False
    response_prefix: str | None = None
    date: datetime.date = datetime.date(2025, 1, 1)


class DirectionSection(Section):
    """How directions are computed from residuals."""

    center: Literal["mean", "geometric_median"] = "mean"
    projected: bool = False
    winsor: float | None = Field(None, gt=0.5, le=1.0)


class EditSection(Section):
    """Writers to edit, and how. Without `components`, the architecture's defaults."""

    components: Annotated[tuple[str, ...], Distinct] = ()
    row_norms: RowNorms = "full"
    post_norms: bool = True


class SubspaceSection(Section):
    """Several directions per layer. `rank` counts them, the difference of means included."""

    rank: int = Field(4, ge=1, le=8)
    kind: Literal["principal", "prototypes"] = "principal"


class RidgeSection(Section):
    """Ridge ablation.

    `basis` bounds the dimension of its input basis; `rank` and `neighbours` bound the search.
    """

    basis: int = Field(512, ge=16, le=MOST)
    rank: Count = 8
    neighbours: Count | None = None


class AraSection(Section):
    """Arbitrary-rank ablation. `neighbours` bounds the k that is searched."""

    iterations: Count = 40
    neighbours: Count | None = None


class JudgeSection(Section):
    """Who gives verdicts on responses; markers where `source` is empty.

    `labels` say what a classifier's labels mean, `reads` what it is given; `rubric` and `severity` are what
    a language model or a server answers. `labelled` is what the judge is certified on. From `model` on they
    are a server's: `timeout` counts seconds of one try, `parallel` requests at once.
    """

    source: Name = ""
    revision: Name | None = None
    rubric: Name = "behaviour"
    severity: Name | None = None
    labels: Annotated[tuple[Label, ...], Distinct] = ()
    reads: Literal["pair", "response"] = "pair"
    labelled: Name | None = None
    batch: Count = 16
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    model: str = ""
    timeout: float = Field(60, gt=0, le=3600)
    tries: int = Field(4, ge=1, le=20)
    parallel: int = Field(4, ge=1, le=64)
    reply_tokens: Count = 16
    most_tokens: Count = 5_000_000


class ScoreSection(Section):
    """Measurements. `final` scorers run on the original and on the chosen edit only.

    `show` names the sides of which a few prompts and responses may stand in the record and report.
    """

    objectives: Annotated[tuple[str, ...], Distinct] = ("behaviour_rate", "drift")
    report: Annotated[tuple[str, ...], Distinct] = ("drift_first",)
    final: Annotated[tuple[str, ...], Distinct] = ()
    files: Annotated[tuple[Name, ...], Distinct] = ()
    markers: tuple[str, ...] = ()
    markers_file: Name | None = None
    max_new_tokens: Count = 100
    judge: JudgeSection = JudgeSection()
    show: tuple[Literal["target", "contrast"], ...] = ("target", "contrast")


class SearchSection(Section):
    """Search. `batch` is C, the candidates asked and measured together; 0 chooses it.

    With `time` the search takes so long, in seconds, and `trials` does not count.
    """

    trials: int = Field(200, ge=1, le=10**6)
    time: Span | None = None
    startup_trials: Count = 60
    batch: int = Field(0, ge=0, le=10**4)
    ei_candidates: int = Field(128, ge=1, le=10**6)
    select: str = "knee"


class EngineSection(Section):
    """Limits of one batched pass; 0 measures them. `rows` are candidates x prompts."""

    rows: CountOrNone = 0
    reuse: bool = True
    memory_fraction: float = Field(0.8, gt=0, le=1)


class ExportSection(Section):
    """What a run writes when it is done.

    `adapter_form` is chosen by the edit where it is None, and `adapter_error` bounds a LoRA's rank alone.
    `unpack` writes a quantised source's weights in bfloat16.
    `quantize` are llama.cpp's file types of GGUF exports, `llama_cpp` a checkout with its tools,
    `from_gguf` a GGUF of the same model to patch in place of converting.
    """

    formats: Annotated[tuple[FormatName, ...], Distinct] = (DEFAULT,)
    adapter_form: AdapterForm | None = None
    adapter_rank: Count | None = None
    adapter_error: float = Field(0.2, gt=0, lt=1)
    unpack: bool = False
    quantize: tuple[str, ...] = ()
    llama_cpp: Name | None = None
    from_gguf: Name | None = None


class Config(Section):
    """All settings of a run. `behaviour` names what is edited out."""

    behaviour: str = "custom"
    description: str = ""
    method: MethodName | None = None  # None: `registry.settle` chooses
    goal: Literal["remove", "strengthen"] = "remove"
    seed: int = Field(0, ge=0, lt=1 << 63)
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


class SettledModelSection(ModelSection):
    """Which model, and the dtype that it was loaded in."""

    dtype: Literal["float32", "bfloat16", "float16"]


class SettledConfig(Config):
    """A configuration of which the model has decided what was left open: the method and the dtype.

    Whatever goes on with a run needs these: what they come to can depend on the memory that was free.
    """

    method: MethodName
    model: SettledModelSection


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
        tree = merge(tree, read_behaviour(behaviour))
    if file is not None:
        tree = merge(
            tree, resolve_paths(read_toml(file, "configuration file", ConfigError), file.parent)
        )
    for key, value in (flags or {}).items():
        if isinstance(value, dict):  # a prompt source: drop the behaviour's columns
            tree = _unasked(merge(tree, nest(key, None)), key)
        tree = merge(tree, nest(key, value))
    for expression in sets:
        key, equals, text = expression.partition("=")
        if not equals or not key.strip() or key.count(".") > DEEPEST // 2:
            raise ConfigError(f"--set {expression!r:.60}: write it as section.key=value")
        tree = merge(tree, resolve_paths(nest(key.strip(), parse_value(text.strip())), Path()))
    return validate(tree)


def _unasked(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """Drop the final score that asks for known answers where these went with the prompts of `key`."""
    side, _, part = key.removeprefix("prompts.").partition("_")
    score = {"target": "restored", "contrast": "kept"}.get(side)
    section = tree.get("scores")
    final = section.get("final") if isinstance(section, dict) else None
    if part not in ("eval", "holdout") or not isinstance(final, list):
        return tree
    return merge(tree, nest("scores.final", [name for name in final if name != score]))


def validate(tree: dict[str, Any]) -> Config:
    """Validate plain data as a `Config`.

    Raises:
        ConfigError: as `load_config`, in one line that names the keys.
    """
    check_depth(tree, "the configuration", ConfigError)
    broken = next((key for key, text in walk_texts(tree) if not is_unicode(text)), None)
    if broken is not None:
        raise ConfigError(
            f"configuration key {_short(broken)}: holds bytes that are not UTF-8 text"
        )
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        lines = [_explain(item) for item in found[:_SHOWN]]
        more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        raise ConfigError("; ".join([*lines, *more])) from None


def misfit(tree: dict[str, Any]) -> str | None:
    """Find what is wrong with a stored configuration; None where only keys of other versions differ."""
    found = (_explain(e) for e in _faults(tree) if e["type"] != "extra_forbidden")
    return next(found, None)


def unknown_settings(tree: dict[str, Any]) -> set[str]:
    """Find the dotted keys of a stored configuration that this version does not have."""
    found = (e["loc"] for e in _faults(tree) if e["type"] == "extra_forbidden")
    return {".".join(map(str, path)) for path in found}


def _faults(tree: dict[str, Any]) -> list[Any]:
    """Return pydantic's errors in a tree."""
    try:
        Config.model_validate(tree)
    except pydantic.ValidationError as error:
        return list(error.errors(include_url=False, include_context=False))
    return []


def behaviours() -> dict[str, Path]:
    """List the built-in behaviours: name -> TOML file."""
    folder = Path(str(resources.files("excise"))) / "data" / "behaviours"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_behaviour(name: str) -> dict[str, Any]:
    """Read a built-in behaviour's or a user's TOML file; make the paths in it absolute.

    Raises:
        ConfigError: there is no such behaviour, or its file does not parse.
    """
    path = behaviours().get(name)
    if path is None:
        path = Path(name)
        if path.suffix != ".toml" or not is_file(path):
            known = ", ".join(behaviours())
            raise ConfigError(
                f"behaviour {name!r:.100}: neither a built-in one ({known}) nor a TOML file that exists"
            )
    tree = resolve_paths(read_toml(path, "behaviour file", ConfigError), path.parent)
    tree.setdefault("behaviour", path.stem)
    return tree


def to_toml(config: Config) -> str:
    """Write `config` as TOML that `load_config(file=...)` reads back to an equal value."""
    return toml_text(config.model_dump(mode="json", exclude_none=True))


def _short(key: str) -> str:
    return key if len(key) <= 60 and key.isprintable() else f"{key!r:.60}..."


def _explain(error: Any) -> str:
    """Put one pydantic error in the user's words."""
    path = [str(part) for part in error["loc"]]
    key = _short(".".join(path))
    if error["type"] != "extra_forbidden":
        message = error["msg"].removeprefix("Value error, ")
        return f"configuration key {key}: {message:.200}"
    section: Any = Config
    for part in path[:-1]:
        annotation = section.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    near = difflib.get_close_matches(path[-1], section.model_fields, n=1)
    hint = f"; did you mean {'.'.join([*path[:-1], near[0]])}?" if near else ""
    return f"unknown configuration key {key}{hint}"
