"""Exports take their names once loaded again, measured and carded; a failure leaves nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import job

from excise import files
from excise.checkpoints.loading import load
from excise.cli.main import main
from excise.config import load_config
from excise.errors import ExportError, ModelError
from excise.export.adapter import AdapterExporter
from excise.export.checkpoint import CheckpointExporter
from excise.export.exporter import Exported, TransformersExporter, exporter
from excise.files import CARD, hashes_of, sha256_of
from excise.gguf import exporters as gguf_exporters
from excise.gguf.export import GgufPlan
from excise.gguf.exporters import GgufExporter
from excise.report.stored_record import read_record
from excise.runs import artifacts

BOTH = ("--set", 'export.formats=["safetensors", "adapter"]')


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a model and an adapter."""
    folder = tmp_path_factory.mktemp("artifacts") / "run"
    assert main(job(tiny, folder, *BOTH)) == 0
    return folder


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != ".lock")


def test_the_record_has_the_hash_of_every_file_but_the_card(run: Path) -> None:
    for artifact in read_record(run).artifacts:
        folder = run / artifact.path
        assert artifact.files == hashes_of(folder)
        assert {*artifact.files, CARD} == {p.name for p in folder.iterdir()}
        assert artifact.sha256 == sha256_of(folder)


def damaged(real: Any, damage: Any) -> Any:
    def write(*args: Any, **kwargs: Any) -> Any:
        made = real(*args, **kwargs)
        damage(made.path)
        return made

    return write


def test_what_cannot_be_loaded_again_is_not_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cases = [
        (CheckpointExporter, lambda p: (p / "model.safetensors").write_bytes(b"")),
        (CheckpointExporter, lambda p: (p / "config.json").write_text("{}")),
        (AdapterExporter, lambda p: (p / "adapter_config.json").write_text("{}")),
        (AdapterExporter, lambda p: (p / "adapter_model.safetensors").unlink()),
    ]
    before = read_record(run).artifacts
    for kind, damage in cases:
        form = "adapter" if kind is AdapterExporter else "safetensors"
        with monkeypatch.context() as patch:
            patch.setattr(kind, "write", damaged(kind.write, damage))
            to = tmp_path / "new" / "out"
            assert main(["export", str(run), "--to", str(to), "--format", form, "--quiet"]) == 1
        said = capsys.readouterr().err
        assert f"the {form} export to {to} cannot be loaded again, so it was not kept" in said
        assert said.count("\n") == 1
        assert not names(tmp_path)
    assert read_record(run).artifacts == before


def test_a_failure_at_the_second_keeps_what_stood_there(
    tiny: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The exports of an earlier choice stay, both, while the new ones are written and tried."""
    out = tmp_path / "run"
    assert main(job(tiny, out, *BOTH)) == 0
    before = {name: hashes_of(out / name) for name in ("model", "adapter")}
    listed = names(out)

    def fail(*_: Any) -> Any:
        assert hashes_of(out / "model") == before["model"]
        raise ModelError("no")

    monkeypatch.setattr(AdapterExporter, "load", fail)
    assert main(["resume", str(out), "--trials", "16", "--quiet"]) == 1
    assert "the adapter export to" in capsys.readouterr().err
    assert {name: hashes_of(out / name) for name in before} == before
    assert names(out) == listed
    assert len(read_record(out).trials) == 16  # what was measured is kept all the same
    monkeypatch.undo()
    assert main(["resume", str(out), "--quiet"]) == 0
    assert names(out) == listed


def test_it_has_its_card_with_figures_before_it_has_its_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = files.publish

    def look(folder: Path, destination: Path, **how: Any) -> None:
        seen.append((folder / CARD).read_text())
        assert not destination.exists()
        real(folder, destination, **how)

    monkeypatch.setattr(artifacts, "publish", look)
    to = tmp_path / "out"
    assert main(["export", str(run), "--to", str(to), "--quiet"]) == 0
    (card,) = seen
    assert "## Export check" in card
    assert (to / CARD).read_text() == card


def test_a_gguf_that_llama_cpp_cannot_run_is_not_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(*_: Any) -> Any:
        raise ExportError("llama.cpp cannot run it (GGML_ASSERT)")

    def write(_: Any, edited: Any, path: Path, *__: Any) -> Any:
        with files.staged(path, 0) as folder:
            (folder / "a.gguf").write_bytes(b"GGUF")
        return Exported(path, "gguf", "", 4, {"files": []}, {})

    monkeypatch.setattr(gguf_exporters, "plan_gguf", lambda _: GgufPlan())
    monkeypatch.setattr(GgufExporter, "write", write)
    monkeypatch.setattr(gguf_exporters, "measure_gguf", fail)
    to = tmp_path / "out"
    assert main(["export", str(run), "--to", str(to), "--format", "gguf", "--quiet"]) == 1
    assert "the gguf export to" in capsys.readouterr().err
    assert not names(tmp_path)


def test_a_folder_that_appears_meanwhile_is_not_replaced(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    to = tmp_path / "out"
    real = CheckpointExporter.load

    def meanwhile(*args: Any) -> Any:
        to.mkdir()
        (to / "mine").write_text("mine")
        return real(*args)

    monkeypatch.setattr(CheckpointExporter, "load", meanwhile)
    assert main(["export", str(run), "--to", str(to), "--quiet"]) == 1
    assert "cannot write" in capsys.readouterr().err
    assert names(tmp_path) == ["out"]
    assert names(to) == ["mine"]


def test_an_export_is_loaded_in_the_dtype_that_the_search_measured_in(run: Path) -> None:
    """Which need not be the one that "auto" comes to at the time."""
    config = load_config(file=run / "config.toml")
    source = load(config.model)
    for dtype in (torch.float32, torch.bfloat16):
        for artifact in read_record(run).artifacts:
            made = exporter(artifact.format, config.export)
            assert isinstance(made, TransformersExporter)
            searched = replace(source, dtype=dtype)
            again = made.load_again(run / artifact.path, searched, config.model)
            assert again.dtype == dtype
            assert {parameter.dtype for parameter in again.model.parameters()} == {dtype}
