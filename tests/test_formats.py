"""The table of formats: every row is whole, and nothing outside of it tells formats by their names."""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Iterator
from inspect import isabstract
from pathlib import Path

import pytest

from excise.config import ExportSection
from excise.errors import ConfigError
from excise.export.exporter import Exporter, exporters
from excise.formats import DEFAULT, FORMATS, OPTIONS, Format

SOURCE = Path(__file__).resolve().parents[1] / "src" / "excise"
ASKING = (".startswith", ".endswith", ".get", ".partition", ".removeprefix", ".removesuffix")
ROWS = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


@ROWS
def test_a_row_has_an_exporter_that_writes_and_measures(form: Format) -> None:
    kind = pkgutil.resolve_name(form.exporter)
    assert issubclass(kind, Exporter)
    assert not isabstract(kind)


@ROWS
def test_a_row_has_its_words(form: Format) -> None:
    assert form.label
    assert form.words
    assert form.rest.endswith(".")
    assert form.usage
    for way in form.usage:
        assert way.words
        assert bool(way.language) == bool(way.code)


@ROWS
def test_a_row_takes_settings_that_there_are(form: Format) -> None:
    assert form.options <= OPTIONS.keys() <= ExportSection.model_fields.keys()


def test_no_two_formats_share_a_name_or_a_folder() -> None:
    assert [form.name for form in FORMATS.values()] == list(FORMATS)
    folders = [form.folder for form in FORMATS.values()]
    assert len({*folders}) == len(folders)
    assert all(Path(folder).name == folder for folder in folders)
    assert not {"config.toml", "record.json", "report.html"} & {*folders}
    assert ExportSection().formats == (DEFAULT,)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_setting_for_another_format_is_refused(option: str) -> None:
    values = {"quantize": ["F16"], "adapter_form": "dora", "unpack": True}
    section = ExportSection.model_validate({option: values.get(option, "x")})
    for form in FORMATS.values():
        if option not in form.options:
            with pytest.raises(ConfigError, match=f"{OPTIONS[option]}.* for --format"):
                exporters(section, [form.name])


def told_apart(tree: ast.AST) -> Iterator[ast.AST]:
    """What of a module could tell values by their text: comparisons, cases, keys, defaults, prefixes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            yield from (node.left, *node.comparators)
        elif isinstance(node, ast.MatchValue):
            yield node.value
        elif isinstance(node, ast.Dict):
            yield from filter(None, node.keys)
        elif isinstance(node, ast.Subscript):
            yield node.slice
        elif isinstance(node, ast.arguments):
            yield from filter(None, (*node.defaults, *node.kw_defaults))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(ASKING):
            yield from node.args


def texts(node: ast.AST) -> set[str]:
    """The strings of an expression, and of the tuples, lists and sets in it."""
    parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return {p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)}


def tells_formats_apart(code: str) -> bool:
    """Whether code compares the name of a format, or the beginning or end of one by which it is told."""
    parts = {*FORMATS} | {part for name in FORMATS for part in name.split("-")}
    return any(texts(node) & parts for node in told_apart(ast.parse(code)))


def test_only_the_table_tells_formats_by_their_names() -> None:
    others = {*SOURCE.rglob("*.py")} - {SOURCE / "formats.py"}
    found = [path for path in others if tells_formats_apart(path.read_text("utf-8"))]
    assert [path.relative_to(SOURCE).as_posix() for path in found] == []


@pytest.mark.parametrize(
    "code",
    [
        'x.format == "gguf"',
        'name in ("adapter", "model")',
        'name.startswith("gguf")',
        'name.endswith("adapter")',
        '{"safetensors": "model"}[name]',
        'def push(format_name="safetensors"): ...',
        'def push(*, format_name: str = "safetensors"): ...',
        'match name:\n    case "gguf-adapter": ...',
        'WORDS["gguf"]',
    ],
)
def test_a_comparison_would_be_found(code: str) -> None:
    assert tells_formats_apart(code)
