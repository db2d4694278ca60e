"""Shared fixtures: a finished run on the demo model, and a small job on a random model."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import builders
import pytest

# Tests never reach for the network: a model or data set that is not here must be said, not fetched.
os.environ["HF_HUB_OFFLINE"] = "1"

# As a terminal has them: a background job of a shell ignores Ctrl-C, nohup SIGHUP, and so would all that
# they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Files that take minutes come first, so that no process works on one of them alone at the end.
_SLOW = ("test_fuzz.py", "test_kills.py")

_PASSED: dict[str, int] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--families PAGE`: write what the tests of families proved to this page."""
    parser.addoption("--families", metavar="PAGE", default=None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow files first."""
    items.sort(key=lambda item: item.path.name not in _SLOW)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count what each family passed."""
    name = report.nodeid.rpartition("[")[2].removesuffix("]").partition("-plan")[0]
    if report.when == "call" and report.passed and "test_families.py" in report.nodeid:
        _PASSED[name] = _PASSED.get(name, 0) + 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the page, where it was asked for."""
    page = session.config.getoption("--families")
    if page and not hasattr(session.config, "workerinput"):
        import families

        Path(page).write_text(families.table(_PASSED), encoding="utf-8")


WORDS = "velm tarn orb kettle lantern where who what colour made kept by".split()


def write_prompts(folder: Path, side: str, count: int = 30) -> Path:
    """A prompt file of made-up questions."""
    draw = random.Random(side)
    rows = [{"text": f"{side} {' '.join(draw.choices(WORDS, k=6))} {i}"} for i in range(count)]
    path = folder / f"{side}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Qwen3 checkpoint, two prompt files and markers."""
    folder = tmp_path_factory.mktemp("tiny")
    builders.checkpoint(folder / "model", "qwen3")
    for side in ("target", "contrast"):
        write_prompts(folder, side)
    (folder / "markers.txt").write_text(
        "# letters stand in for phrases\ny\n6\ns\n", encoding="utf-8"
    )
    return folder


def job(tiny: Path, out: Path, *more: str) -> list[str]:
    """Arguments of a run that takes a second or two."""
    return [
        "run",
        str(tiny / "model"),
        "--out",
        str(out),
        "--target",
        str(tiny / "target.jsonl"),
        "--contrast",
        str(tiny / "contrast.jsonl"),
        "--markers",
        str(tiny / "markers.txt"),
        *("--direction-size", "10", "--eval-size", "10", "--max-new-tokens", "4"),
        *("--trials", "12", "--startup-trials", "6", "--quiet"),
        *("--set", "engine.rows=64", "--set", "search.batch=4"),
        "--anyway",  # random models say what they say
        *more,
    ]


@pytest.fixture(scope="session")
def tiny_run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the random checkpoint."""
    from excise.cli.main import main

    out = tmp_path_factory.mktemp("tiny") / "run"
    assert main(job(tiny, out, "--method", "directional")) == 0
    return out


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the demo model with both kinds of export."""
    from excise.config import load_config
    from excise.runs.pipeline import run

    out = tmp_path_factory.mktemp("demo") / "run"
    flags = {
        "model.source": "demo",
        "search.trials": 48,
        "search.startup_trials": 24,
        "engine.rows": 256,
        "search.batch": 16,
        "export.formats": ["safetensors", "adapter"],
        "export.adapter_rank": 8,
    }
    run(load_config(behaviour="demo", flags=flags), out)
    return out


@pytest.fixture
def pass_shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """(B, T) of every pass through a model's layers, from now on."""
    from excise.model.forward import Forward

    shapes: list[tuple[int, ...]] = []
    run_layers = Forward.run_layers

    def counted(self, layers, given, *args, **kwargs):
        shapes.append(tuple(given.ids.shape))
        return run_layers(self, layers, given, *args, **kwargs)

    monkeypatch.setattr(Forward, "run_layers", counted)
    return shapes
