"""Geometry by layer: known clouds have known figures; the command writes table, JSON, report and page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch

from excise.capture import geometry
from excise.capture.geometry import describe_layers, effective_rank, embed, project
from excise.cli import arguments
from excise.cli import main as cli
from excise.model.overrides import threads
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


def test_projections_are_the_principal_axes_with_the_target_on_the_right():
    target, contrast = draw(0, 20, 2, 9) + 2, draw(1, 25, 2, 9)
    t, c = project(target, contrast)
    assert t.shape == (20, 2, 2)
    assert c.shape == (25, 2, 2)
    both = torch.cat([target[:, 1], contrast[:, 1]])
    variance = torch.linalg.svdvals(both - both.mean(0)).square()[:2]
    found = torch.cat([t[:, 1], c[:, 1]]).square().sum(0)
    assert torch.allclose(found, variance, rtol=1e-9)
    assert bool((t.mean(0) > c.mean(0)).all())
    alone, other = project(draw(0, 1, 1, 5), draw(1, 1, 1, 5))
    assert alone.shape == other.shape == (1, 1, 2)


def test_embedded_points_stay_beside_their_neighbours_and_near_where_they_were():
    draws = torch.stack([draw(layer, 30, 12) for layer in (0, 1)], dim=1)
    target, contrast = draws[:15].clone(), draws[15:]
    target[..., 0] += 30
    with threads(1):
        t, c = embed(target, contrast)
        assert torch.get_num_threads() == 1  # the first projection of a process sets it otherwise
    assert t.shape == (15, 2, 2)
    assert c.shape == (15, 2, 2)
    for layer in (0, 1):
        nearest = torch.cdist(t[:, layer], t[:, layer]).fill_diagonal_(torch.inf).amin(1)
        assert bool((nearest < torch.cdist(t[:, layer], c[:, layer]).amin(1)).all())
    before, after = (t.mean(0) - c.mean(0)).unbind(0)
    assert float(torch.cosine_similarity(before, after, dim=0)) > 0.5
    assert torch.equal(embed(target, contrast)[0], t)


def test_a_projection_without_its_package(demo_run: Path, monkeypatch, capsys):
    monkeypatch.setattr(geometry, "find_spec", lambda name: None)
    assert cli.main(["geometry", str(demo_run), "--projection", "umap"]) == 2
    assert "pip install 'excise[umap]'" in capsys.readouterr().err
    assert get_args(geometry.Projection) == arguments.PROJECTIONS


def test_the_command_writes_table_json_report_and_page(demo_run: Path, tmp_path: Path, capsys):
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
    page = (run / "geometry.html").read_text()
    assert page.count("After layer") == 1
    assert '"frames"' in page or "addFrames" in page
    assert "src=" not in page.split("<body>")[0]  # nothing is loaded from elsewhere
    assert "geometry-rank" in (run / "report.html").read_text()
    assert "First principal axis" in page
    assert cli.main(["geometry", str(run), "--quiet", "--projection", "umap"]) == 0
    assert "silhouette" in capsys.readouterr().out
    assert "UMAP 1" in (run / "geometry.html").read_text()
    assert cli.main(["geometry", str(tmp_path)]) == 2
    assert "holds no record.json" in capsys.readouterr().err
