"""Whole runs on families with experts, recurrent layers and towers, from prompts to the export."""

from __future__ import annotations

import json

import families
import pytest
from conftest import job, write_prompts

from excise.cli import main as cli

NAMES = ("gemma4", "qwen3_moe", "falcon_h1", "lfm2", "opt")


@pytest.mark.parametrize("name", NAMES)
def test_a_run_from_start_to_end(name, tmp_path):
    families.save(families.model(name), tmp_path / "model")
    for side in ("target", "contrast"):
        write_prompts(tmp_path, side)
    (tmp_path / "markers.txt").write_text("e\n", encoding="utf-8")
    assert cli.main(job(tmp_path, tmp_path / "run")) == 0
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    anatomy = families.loaded(families.model(name)).anatomy
    edited = [line.split(":")[0] for line in record["coverage"]["edited"]]
    assert sorted(edited) == sorted(anatomy.defaults)
    listed = edited + [line.split(":")[0] for line in record["coverage"]["not_edited"]]
    assert set(listed) >= set(anatomy.components)
    (artifact,) = record["artifacts"]
    for score, expected in artifact["expected"].items():
        assert artifact["measured"][score]["value"] == pytest.approx(expected["value"], abs=1e-3)
    card = (tmp_path / "run" / "model" / "README.md").read_text().replace("\\_", "_")
    assert all(component in card for component in anatomy.components)
