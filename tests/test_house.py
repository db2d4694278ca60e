"""Tests that hold the house: import order, public names, the command line, sizes, no leaks."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import resource
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from records import make_record

import excise
from excise.cli.main import build_parser
from excise.engine.requests import Evidence, Response
from excise.prompts.sets import Prompt
from excise.report.stored_record import write_record
from excise.search.score_context import ScoreContext

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "excise"
MODULES = sorted(SOURCE.rglob("*.py"))
FOLDERS = sorted(path.parent for path in SOURCE.glob("*/__init__.py"))

# Bottom to top, as ARCHITECTURE.md draws them: a folder imports only from those before it. "" is the root.
ORDER = (
    *("", "model", "checkpoints", "prompts", "capture", "methods", "engine", "judges", "search"),
    *("report", "export", "gguf", "runs", "cluster", "chat", "costs", "page", "cli"),
)

PURE = (
    *("model/edits", "capture/directions", "capture/geometry", "methods/profiles"),
    *("methods/search_space", "methods/directional_math", "methods/subspace_math"),
    *("methods/ridge_math", "methods/ara_math", "methods/lbfgs", "search/pareto"),
    *("intervals", "search/resampling"),
)

TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
# Tests of a promise that no one module keeps. Every other file is named after the module that it tests.
INTEGRATION = {
    "test_faults": "interrupts and full disks, wherever they strike",
    "test_fuzz": "the fuzzer's judge, held to planted faults",
    "test_house": "the repository itself",
    "test_kills": "kill -9 in the phases of whole commands",
    "test_mutations": "the mutants, which must still be found in the source",
    "test_standin": "all that runs on a GPU, on a stand-in for one",
    "test_recomputed": "a run's figures, made again without the package",
    "model/test_families": "every architecture, from its data row to its export",
    "checkpoints/test_multimodal": "models with towers, from loading to export",
    "checkpoints/test_real_classes": "what Transformers' own classes do to names and layouts",
    "engine/test_large_vocab": "memory of the whole engine where V is large",
    "gguf/test_gguf_run": "GGUF files from a run to a chat",
    "prompts/test_keep_set": "the wide set of prompts that ships",
    "runs/test_family_runs": "whole runs on several architectures",
    "prompts/test_disclaimers": "the prompt sets for a real model, as files and as their script",
    "cli/test_real_demo": "a whole run on a real model",
    "cli/test_bad_input": "one line and exit code 2, whatever is wrong",
}


def name_of(path: Path) -> str:
    """A module's path below the package, without its ending."""
    return path.relative_to(SOURCE).with_suffix("").as_posix()


def folder_of(module: str) -> str:
    """The folder of a module that is named as `name_of` does."""
    return module.rpartition("/")[0]


def imported(path: Path) -> set[str]:
    """Modules of the package that a module imports, wherever in it, named as `name_of` does."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "excise":
            base = "/".join((node.module or "").split(".")[1:])
            names |= {
                found
                for found in (base, *(f"{base}/{alias.name}".strip("/") for alias in node.names))
                if (SOURCE / f"{found}.py").exists()
            }
    return names


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path: Path):
    if name_of(path) == "__init__":  # its names load on first use
        return
    allowed = ORDER[: ORDER.index(folder_of(name_of(path))) + 1]
    assert {name for name in imported(path) if folder_of(name) not in allowed} == set()


def test_modules_of_a_folder_import_each_other_one_way():
    graph = {name_of(path): imported(path) for path in MODULES if path.name != "__init__.py"}
    assert tuple(TopologicalSorter(graph).static_order())  # raises where there is a circle


def test_folders_have_a_promise_and_a_readable_size():
    assert {folder.name for folder in FOLDERS} == set(ORDER[1:])
    tree = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for folder in FOLDERS:
        modules = [p for p in folder.glob("*.py") if not p.name.startswith("__")]
        assert 4 <= len(modules) <= 12, folder.name
        promise = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8")))
        assert promise is not None
        assert "\n" not in promise
        assert re.search(rf"{folder.name}/ .*", tree), folder.name


def test_tests_mirror_the_tree():
    folders = {path.parent.relative_to(ROOT / "tests").as_posix() for path in TESTS}
    assert folders <= {"." if name == "" else name for name in ORDER}
    modules = {name_of(path) for path in MODULES}
    names = {path.relative_to(ROOT / "tests").with_suffix("").as_posix() for path in TESTS}
    unplaced = {name for name in names if name.replace("test_", "", 1) not in modules}
    assert unplaced == set(INTEGRATION)


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_no_test_imports_another(path: Path):
    """What several files share stands in modules of its own, named by what they make."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            named = [node.module or "", *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        else:
            continue
        parts = [part for name in named for part in name.split(".")]
        assert "tests" not in parts
        assert {part for part in parts if part.startswith("test_")} <= {path.stem}, ast.unparse(
            node
        )


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_see_no_model(name: str):
    text = (SOURCE / f"{name}.py").read_text(encoding="utf-8")
    assert "transformers" not in text
    live = {"model/anatomy", "model/forward", "checkpoints/loading", "engine/engine"}
    assert not imported(SOURCE / f"{name}.py") & live


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_rooms_are_small(path: Path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 420
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 60, node.name


def test_only_the_terminal_is_printed_to_and_only_the_command_line_exits():
    for path in MODULES:
        if name_of(path) in ("cli/terminal", "cli/main", "cli/__main__"):
            continue
        # Children get a small environment, made of ours.
        allowed = {"os.environ"} if path.stem == "children" else set()
        used = {
            ast.unparse(node)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Name | ast.Attribute)
        }
        forbidden = {"print", "os.environ", "os.getenv", "sys.exit", "sys.stdout", "sys.stderr"}
        assert not used & forbidden - allowed, path.stem


def test_only_children_starts_processes():
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        starts = re.search(
            r"\bimport subprocess|\bos\.(system|exec|spawn|popen|fork)|multiproc", text
        )
        assert starts is None or path.stem in ("children", "launcher"), path.stem


def test_public_names():
    assert excise.__all__ == [
        "Config",
        "Divergence",
        "ExciseError",
        "Record",
        "Responses",
        "Score",
        "__version__",
        "load_config",
        "ratio",
        "run",
        "scorer",
    ]
    assert all(hasattr(excise, name) for name in excise.__all__)


def test_the_interface_of_scorers_is_what_their_page_says():
    def shape(function):
        parameters = inspect.signature(function).parameters.values()
        return [str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters]

    def fields(kind):
        return [field.name for field in dataclasses.fields(kind)]

    assert shape(excise.scorer) == ["name", "needs", "goal='minimize'", "worth=None"]
    assert shape(excise.Responses) == ["side", "decided=None"]
    assert shape(excise.Divergence) == ["side='contrast'"]
    assert shape(excise.Score) == [
        *("value", "n", "interval=None", "parts=<factory>", "spread=<factory>", "draws=None")
    ]
    assert shape(excise.ratio) == ["totals", "sizes"]
    assert fields(Evidence) == ["responses", "divergence"]
    assert fields(Response) == ["tokens", "text", "ended"]
    assert fields(ScoreContext) == ["markers", "prompts", "judge", "answer"]
    assert {"text", "answer", "group"} <= set(fields(Prompt))


def test_the_command_line_is_what_the_contract_says():
    actions = build_parser()._subparsers._group_actions[0].choices
    flags = {
        name: sorted(o for a in sub._actions for o in a.option_strings if o.startswith("--"))
        for name, sub in actions.items()
    }
    progress = ["--json-events", "--quiet"]
    workers = ["--workers", "--ray", "--gpus-per-worker"]
    prompts = "--behaviour --chat-template --config --contrast --contrast-eval --direction-size "
    prompts += (
        "--eval-size --markers --max-new-tokens --method --quantize --set --strengthen --target "
    )
    prompts += "--target-eval --keep --no-keep"
    expected = {
        "demo": ["--out", "--real", "--seed", "--trials", *progress],
        "run": [
            *prompts.split(),
            "--anyway",
            "--out",
            "--seed",
            "--startup-trials",
            "--time",
            "--trials",
            *workers,
            *progress,
        ],
        "resume": ["--anyway", "--time", "--trials", "--trust-run", *workers, *progress],
        "front": ["--json"],
        "export": [
            *("--dora", "--error", "--format", "--lora", "--rank", "--select", "--to", "--trial"),
            *("--from-gguf", "--llama-cpp", "--quantize"),
            *("--trust-run", "--unpack"),
            *progress,
        ],
        "reproduce": ["--out", "--set", "--trial", *progress],
        "push": ["--format", "--from", "--public", "--trial", *progress],
        "evaluate": [*prompts.split(), "--json", *progress],
        "judge": [
            *("--behaviour", "--config", "--json", "--labelled", "--markers", "--rubric", "--set"),
            *progress,
        ],
        "bench": [
            *("--against", "--json", "--limit", "--tasks", "--trial", "--trust-run"),
            *("--trust-tasks", *progress),
        ],
        "compare": ["--json", "--out", "--trust-run", *progress],
        "audit": [
            *(flag for flag in prompts.split() if flag != "--method"),
            *("--anyway", "--out", "--seed", "--startup-trials", "--time", "--trials"),
            *workers,
            *progress,
        ],
        "inspect": ["--json"],
        "geometry": ["--json", "--trust-run", *progress],
        "chat": [
            *("--base", "--in-turn", "--json", "--max-new-tokens", "--prompt", "--save", "--seed"),
            *("--system", "--temperature", "--thinking", "--trial", "--trust-run"),
        ],
        "ui": ["--no-browser", "--port", "--trust-run"],
        "report": [],
    }
    assert flags == {k: sorted([*v, "--debug", "--help"]) for k, v in expected.items()}


LIGHT = "torch transformers optuna datasets peft sklearn scipy pandas".split()
PAGES = "plotly jinja2 yaml".split()


@pytest.mark.parametrize(
    ("work", "without"),
    [
        ("import excise", [*LIGHT, *PAGES, "rich", "pydantic"]),
        ("cli.build_parser().format_help()", [*LIGHT, *PAGES, "rich", "pydantic"]),
        ("cli.main(['front', folder])", [*LIGHT, *PAGES]),
        ("cli.main(['report', folder])", LIGHT),
        (
            "shutil.copytree(folder, folder + '2'); cli.main(['compare', folder, folder + '2'])",
            LIGHT,
        ),
        ("card.model_card(record.read_record(pathlib.Path(folder)))", [*LIGHT, "plotly"]),
    ],
)
def test_what_reads_a_record_loads_no_more_than_it_needs(work: str, without: list[str], tmp_path):
    write_record(tmp_path, make_record())
    modules = {"cli": "excise.cli.main", "card": "excise.report.card"}
    modules["record"] = "excise.report.stored_record"
    imports = [f"import {at} as {name}" for name, at in modules.items() if f"{name}." in work]
    lines = ["import pathlib, shutil, sys", *imports, f"folder = {str(tmp_path)!r}", work]
    lines.append(f"print([name for name in {without} if name in sys.modules])")
    out = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    assert out.stdout.splitlines()[-1] == "[]"


def test_help_is_quick():
    """Of the processor's time, which other processes change little; the best of three."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "excise.cli", "--help"]
        subprocess.run(command, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.3


def test_every_argument_says_what_it_does():
    for name, sub in build_parser()._subparsers._group_actions[0].choices.items():
        assert sub.epilog.startswith(f"example:\n  excise {name} "), name
        for action in sub._actions:
            assert action.help, (name, action.dest)


def test_every_module_stands_in_architecture_md():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert text.count("\n") < 250  # what the code can say stands there
    for path in MODULES:
        assert path.stem.startswith("__") or re.search(rf"\b{path.stem}\b", text), name_of(path)


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for requirement in project["dependencies"]:
        name = requirement.split(">")[0].split("=")[0]
        assert f"| {name} |" in text, name


@pytest.mark.parametrize("name", ["optuna", "transformers"])
def test_what_is_installed_is_the_last_version_that_is_allowed(name: str):
    """These two change what is measured: a version that the tests have not seen is not allowed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (wanted,) = [r for r in map(Requirement, project["dependencies"]) if r.name == name]
    major, minor, *_ = map(int, version(name).split("."))
    assert wanted.specifier.contains(version(name))
    assert not wanted.specifier.contains(f"{major}.{minor + 1}.0")


def test_only_public_names_of_optuna_are_used():
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        private = r"optuna(\.\w+)*\._|\._(trial_id|suggest|study_id|storage|backend)\b"
        assert not re.search(private, text), name_of(path)


# Of this project's own making, and benign: every other behaviour names its prompt sets by id.
OWN_PROMPTS = {"demo", "disclaimers"}


def test_behaviours_hold_no_prompts_but_the_projects_own():
    from excise.config import behaviours, read_behaviour

    for name in behaviours():
        tree = read_behaviour(name)
        for role, value in tree["prompts"].items():
            if isinstance(value, dict):
                source = Path(value["source"])
                assert source.exists() == (name in OWN_PROMPTS), role
                own = ROOT / "src" / "excise" / "data" / name
                assert not source.exists() or source.resolve().is_relative_to(own), role


def test_the_questions_of_a_newcomer_are_answered_where_the_page_says():
    text = (ROOT / "docs" / "where.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+\?) \| `([\w/.]+)` \| `([^`]+)` \|$", text, flags=re.M)
    assert len(rows) == text.count("? |") >= 36
    assert len({question for question, _, _ in rows}) == len(rows)
    for question, file, mark in rows:
        assert mark in (SOURCE / file).read_text(encoding="utf-8"), question


def test_links_between_pages_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    heads = {
        page: {
            re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-")
            for head in re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
        }
        for page in pages
    }
    for page in pages:
        links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
        for link in (one for one in links if "://" not in one):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in heads[target], f"{page.name}: {link}"
