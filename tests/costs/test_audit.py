"""An audit: a run of every method, compared; what is finished is not done again."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import job

from excise.cli.main import main
from excise.report.stored_record import read_record


def audited(tiny: Path, out: Path, *more: str) -> list[str]:
    """Arguments of an audit that takes a few seconds."""
    few = ("--trials", "4", "--startup-trials", "4", "--set", "search.batch=4")
    known = job(tiny, out)[1:]
    return ["audit", *known, *few, *more]


def test_every_method_is_run_and_compared_once(tiny: Path, tmp_path: Path, capsys):
    out = tmp_path / "audit"
    command = audited(tiny, out, "--set", 'edit.row_norms="pre"')
    command.remove("--quiet")
    assert main([*command, "--json-events"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = lines[-1]["result"]
    assert [side["name"] for side in found["sides"]] == [
        str(out / method) for method in ("directional", "subspace")
    ]
    assert found["differences"] == []
    assert list(found["left_out"]) == ["ridge", "ara"]
    assert (out / "comparison.html").exists()
    records = {path: path.stat().st_mtime_ns for path in out.rglob("record.json")}
    assert [read_record(path).artifacts for path in records] == [[], []]
    assert main([*command, "--quiet"]) == 0  # all of it is there
    assert {path: path.stat().st_mtime_ns for path in records} == records
    said = capsys.readouterr().out
    assert "directional: directional, 4 trials" in said
    assert "ara is left out: " in said
    assert main([*command, "--quiet", "--set", "prompts.system=Be brief."]) == 2
    assert "belongs to another run" in capsys.readouterr().err
