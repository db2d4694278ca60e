"""Benchmark tasks from a user's own files, in the form of lm-evaluation-harness, without code in them.

A task file is YAML beside a .jsonl file with its samples. In lm-evaluation-harness such a file may name
Python functions, and its templates can reach them. Here it is read as plain data: what would run code is
refused, and templates are rendered in Jinja's sandbox.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field

from excise.errors import ConfigError, first_line
from excise.reading import parse_json, read_text

_LARGEST = 1 << 20  # bytes of a task file
_LARGEST_DATA = 1 << 28
SPLIT = "test"

Sample = dict[str, Any]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid")

    data_files: str | dict[str, str]


class _Metric(BaseModel):
    """One of the metrics that lm-evaluation-harness has itself; any other it would download as code."""

    model_config = ConfigDict(extra="forbid")

    metric: Literal["acc", "acc_norm", "exact_match"]
    aggregation: Literal["mean"] = "mean"
    higher_is_better: bool = True
    ignore_case: bool = False
    ignore_punctuation: bool = False


class TaskFile(BaseModel):
    """The keys of a task file that are read; any other is an error."""

    model_config = ConfigDict(extra="forbid")

    task: str = Field(min_length=1, max_length=200)
    dataset_path: Literal["json"] = "json"
    dataset_kwargs: _Data
    test_split: str = SPLIT
    output_type: Literal["multiple_choice", "generate_until", "loglikelihood"] = "generate_until"
    doc_to_text: str
    doc_to_target: str | int
    doc_to_choice: str | list[str] | None = None
    target_delimiter: str = " "
    description: str = ""
    num_fewshot: Literal[0] | None = None
    generation_kwargs: dict[str, bool | int | float | str | list[str]] | None = None
    metric_list: list[_Metric] | None = None
    metadata: dict[str, Any] | None = None


def read_task(path: Path) -> dict[str, Any]:
    """Read a task file and its samples as the configuration of a task of lm-evaluation-harness.

    Raises:
        ConfigError: it cannot be read, names code, or has keys that are not read here.
    """
    try:
        task = TaskFile.model_validate(_plain(path))
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"])) or "task"
        why = "is not read here" if first["type"] == "extra_forbidden" else first["msg"]
        raise ConfigError(f"{path}: {key:.80}: {why:.160}. {_TRUST}") from None
    samples = _samples(path, task)
    fields = task.model_dump(exclude_unset=True, exclude={"dataset_path", "dataset_kwargs"})
    texts = {name: _renderer(path, fields[name], samples[0]) for name in _TEMPLATES & fields.keys()}
    if "doc_to_choice" in fields:
        texts["doc_to_choice"] = _choices(path, fields["doc_to_choice"], samples[0])
        texts["doc_to_target"] = _index(texts["doc_to_target"])
    for render in texts.values():
        render(samples[0])  # what is wrong with a template is said before any model is loaded
    if task.metric_list is not None:
        fields["metric_list"] = [_metric(one) for one in task.metric_list]
    fields.pop("metadata", None)
    return {**fields, **texts, "test_split": SPLIT, "samples": samples}


def _metric(one: _Metric) -> dict[str, Any]:
    """Return a metric as a task has it; what is compared how is for exact matches alone."""
    exact = {} if one.metric == "exact_match" else {"ignore_case", "ignore_punctuation"}
    return one.model_dump(exclude=set(exact))


_TRUST = "To load it as lm-evaluation-harness does, with the code that it names, add --trust-tasks"
_TEMPLATES = {"doc_to_text", "doc_to_target"}


def _plain(path: Path) -> Any:
    text = read_text(path, "task file", ConfigError, _LARGEST)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{path}: aliases (*name) are not read: write it out")
            if str(getattr(event, "tag", None) or "").startswith("!"):
                raise ConfigError(
                    f"{path} names code ({event.tag:.40}), which does not run. {_TRUST}"
                )
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not a task file: {first_line(error)}") from None


def _samples(path: Path, task: TaskFile) -> list[Sample]:
    files = task.dataset_kwargs.data_files
    name = files if isinstance(files, str) else files.get(task.test_split)
    if name is None:
        raise ConfigError(f"{path}: dataset_kwargs.data_files has no {task.test_split!r:.60}")
    data = (path.parent / name).resolve()
    if not data.is_relative_to(path.parent.resolve()):
        raise ConfigError(f"{path}: {name!r:.100} is not beside the task file. {_TRUST}")
    lines = read_text(data, "samples", ConfigError, _LARGEST_DATA).splitlines()
    rows = [
        parse_json(line.encode(), f"{data}, line {number}", ConfigError)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{data} holds no samples, or some that are not JSON objects")
    return rows


def _renderer(
    path: Path, template: str | int, sample: Mapping[str, Any]
) -> Callable[[Sample], Any]:
    """Return what makes a sample's text: the column of this name, or the template rendered."""
    if isinstance(template, int):
        return lambda _: template
    if template in sample:
        return lambda doc: doc[template]
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True
    )
    try:
        compiled = environment.from_string(template)
    except TemplateError as error:
        raise ConfigError(f"{path}: {template!r:.80}: {first_line(error)}") from None

    def render(doc: Sample) -> str:
        try:
            return compiled.render(**doc)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise ConfigError(f"{path}: {template!r:.80}: {first_line(error)}") from None

    return render


def _choices(
    path: Path, choices: str | list[str], sample: Mapping[str, Any]
) -> Callable[[Sample], list[str]]:
    if isinstance(choices, list):
        renderers = [_renderer(path, one, sample) for one in choices]
        return lambda doc: [str(render(doc)) for render in renderers]
    render = _renderer(path, choices, sample)

    def listed(doc: Sample) -> list[str]:
        found = render(doc)
        try:
            made = found if isinstance(found, list) else ast.literal_eval(str(found))
            if not isinstance(made, list) or not made:
                raise ValueError
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise ConfigError(f"{path}: doc_to_choice gives no list, but {found!r:.80}") from None
        return [str(one) for one in made]

    return listed


def _index(target: Callable[[Sample], Any]) -> Callable[[Sample], Any]:
    """Return what makes a sample's target where there are choices: a number is the place of one."""

    def made(doc: Sample) -> Any:
        found = target(doc)
        return int(found) if isinstance(found, str) and found.isdigit() else found

    return made
