"""Geometry by layer: known clouds have known figures; the command writes table, JSON and report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from excise.capture.geometry import describe_layers, effective_rank
from excise.cli import main as cli
from excise.report.stored_record import read_record

KEYS = {
    "layer", "target_norm", "contrast_norm", "difference_norm", "cosine", "silhouette", "auc",
    "effective_rank",
}  # fmt: skip


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_separated_and_mixed_layers():
    axis = torch.zeros(16, dtype=torch.float64)
    axis[0] = 1.0
    apart = torch.stack([0.1 * draw(0, 30, 16) + 5 * axis, 0.1 * draw(1, 30, 16) - 5 * axis])
    mixed = torch.stack([draw(2, 30, 16), draw(3, 30, 16)])
    target, contrast = (torch.stack([apart[s], mixed[s]], dim=1) for s in (0, 1))
    first, second = describe_layers(target, contrast)
    assert (first.layer, second.layer) == (0, 1)
    assert first.auc == 1.0
    assert first.silhouette > 0.9
    assert first.cosine == pytest.approx(-1.0, abs=1e-3)
    assert first.difference_norm == pytest.approx(10.0, rel=0.01)
    assert first.target_norm == pytest.approx(5.0, rel=0.05)
    assert first.effective_rank < 1.2
    assert abs(second.silhouette) < 0.1
    assert second.effective_rank > 8
    assert set(first.as_dict()) == KEYS


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_effective_rank_of_equal_axes_is_their_number(rank):
    axes = torch.linalg.qr(draw(0, 16, rank))[0]
    assert effective_rank(4 * axes.T) == pytest.approx(rank, rel=1e-9)


def test_the_command_writes_table_json_and_report(demo_run: Path, tmp_path: Path, capsys):
    run = tmp_path / "run"
    shutil.copytree(demo_run, run)
    assert cli.main(["geometry", str(run), "--json", "--quiet"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    record = read_record(run)
    assert record.geometry == layers
    assert len(layers) == record.model.layers
    assert all(set(row) == KEYS for row in layers)
    # The same separation that the run found along its own directions.
    for row, auc in zip(layers, record.separation.auc, strict=True):
        assert row["auc"] == pytest.approx(auc, abs=1e-3)
    assert "geometry-rank" in (run / "report.html").read_text()
    assert cli.main(["geometry", str(run), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "silhouette" in out
    assert str(run / "report.html") in out
    assert cli.main(["geometry", str(tmp_path)]) == 2
    assert "holds no record.json" in capsys.readouterr().err
