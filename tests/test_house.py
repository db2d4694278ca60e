"""Tests that hold the house: import order, public names, the command line, sizes, no leaks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import excise
from excise.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "excise"
MODULES = sorted(SOURCE.glob("*.py"))

# Bottom to top, as ARCHITECTURE.md lists them: a module imports only from those before it.
ORDER = (
    "errors visible reading folders trees shards checkpoint staging limits launcher children "
    "config events parquetworker promptfiles prompts intervals evidence weights swapping anatomy "
    "directions edits experts kvcache blueprints lean forward probing discovering fitting "
    "gguffile packing plain ggufsource tokenizing loading templates templateworker rendering "
    "dressing tokens geometry capture profiles subspace ridge lbfgs ara space directional moments "
    "subspace_method ridge_method ara_method methods stacking passes decoding drafts answering "
    "divergence engine opening planning refining folding scorers front record wording digest "
    "markdown caveats usage recipe journal search ledger panel keeping stage baseline licence "
    "identity terms placing figures geometry_page card report matching merging export ggml "
    "patching llamaquant llamacpp ggufexport llamaworker llamarun ggufcheck ollama artifacts "
    "finish pipeline jobs reproduce hub inspecting terminal stopping reporter console arguments "
    "cli"
).split()

PURE = "directions geometry profiles edits subspace ridge lbfgs ara space front intervals".split()


def imported(path: Path) -> set[str]:
    """Modules of the package that a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "excise":
            names |= {alias.name for alias in node.names if (SOURCE / f"{alias.name}.py").exists()}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("excise."):
            names.add(node.module.split(".")[1])
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_go_one_way(path: Path):
    if path.stem == "__init__":
        return
    place = ORDER.index(path.stem)
    assert imported(path) <= set(ORDER[:place])


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_see_no_model(name: str):
    text = (SOURCE / f"{name}.py").read_text(encoding="utf-8")
    assert "transformers" not in text
    assert not imported(SOURCE / f"{name}.py") & {"anatomy", "loading", "engine", "forward"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_rooms_are_small(path: Path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 420
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 60, node.name


def test_only_the_terminal_is_printed_to_and_only_the_command_line_exits():
    for path in MODULES:
        if path.stem in ("terminal", "cli"):
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
        "ExciseError",
        "Record",
        "__version__",
        "load_config",
        "run",
        "scorer",
    ]
    assert all(hasattr(excise, name) for name in excise.__all__)


def test_the_command_line_is_what_the_contract_says():
    actions = build_parser()._subparsers._group_actions[0].choices
    flags = {
        name: sorted(o for a in sub._actions for o in a.option_strings if o.startswith("--"))
        for name, sub in actions.items()
    }
    progress = ["--json-events", "--quiet"]
    prompts = "--behaviour --chat-template --config --contrast --contrast-eval --direction-size "
    prompts += (
        "--eval-size --markers --max-new-tokens --method --quantize --set --strengthen --target "
    )
    prompts += "--target-eval"
    expected = {
        "demo": ["--out", "--seed", "--trials", *progress],
        "run": [
            *prompts.split(),
            "--anyway",
            "--out",
            "--refine",
            "--seed",
            "--startup-trials",
            "--trials",
            *progress,
        ],
        "resume": ["--anyway", "--trials", "--trust-run", *progress],
        "front": ["--json"],
        "export": [
            *("--error", "--format", "--rank", "--select", "--to", "--trial"),
            *("--from-gguf", "--llama-cpp", "--quantize"),
            "--trust-run",
            *progress,
        ],
        "reproduce": ["--out", "--set", "--trial", *progress],
        "push": ["--format", "--from", "--public", "--trial", *progress],
        "evaluate": [*prompts.split(), "--json", *progress],
        "inspect": ["--json"],
        "geometry": ["--json", "--projection", "--trust-run", *progress],
        "report": [],
    }
    assert flags == {k: sorted([*v, "--debug", "--help"]) for k, v in expected.items()}


def test_help_is_quick_because_it_imports_nothing_heavy():
    heavy = "import sys, excise.cli; excise.cli.build_parser(); "
    heavy += (
        "print([m for m in ('torch', 'transformers', 'optuna', 'pydantic') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "excise.cli", "--help"], capture_output=True, check=True)
    assert time.perf_counter() - begun < 10  # the promise is 0.4 s; this only catches a disaster


def test_every_module_stands_in_architecture_md():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for path in MODULES:
        assert path.stem == "__init__" or f"`{path.stem}`" in text, path.stem


def test_every_dependency_has_its_reason():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for requirement in project["dependencies"]:
        name = requirement.split(">")[0].split("=")[0]
        assert f"| {name} |" in text, name


def test_behaviours_hold_no_prompts_but_the_demos_own():
    from excise.config import behaviours, read_behaviour

    for name in behaviours():
        tree = read_behaviour(name)
        for role, value in tree["prompts"].items():
            if isinstance(value, dict) and name != "demo":
                assert not Path(value["source"]).exists(), role
