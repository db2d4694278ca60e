"""`excise inspect`, as a table and for programs, on a checkpoint of each family."""

from __future__ import annotations

import json

import builders
import pytest

from excise.cli import main as cli
from excise.cli.inspect_model import inspect_model

COMPONENTS = {
    "llama": {"attn.o_proj": (64, 64), "mlp.down_proj": (64, 96)},
    "qwen3": {"attn.o_proj": (64, 64), "mlp.down_proj": (64, 96)},
    "gemma4": {"attn.o_proj": None, "mlp.down_proj": None, "ple.projection": (64, 8)},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """family -> folder of its checkpoint."""
    root = tmp_path_factory.mktemp("saved")
    return {f: builders.checkpoint(root / f, f) for f in builders.FAMILIES}


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_for_programs(saved, family, capsys):
    assert cli.main(["inspect", str(saved[family]), "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert not err
    model = builders.model(family)
    assert found["model"] == str(saved[family])
    assert found["model_type"] == model.config.model_type
    assert (found["layers"], found["width"]) == (builders.LAYERS, builders.WIDTH)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["dtype"] in ("float32", "bfloat16")
    names = list(COMPONENTS[family])
    assert [(w["layer"], w["component"]) for w in found["writers"]] == [
        (layer, name) for layer in range(builders.LAYERS) for name in names
    ]
    for writer in found["writers"]:
        module = model.get_submodule(writer["module"])
        assert writer["shape"] == list(module.weight.shape)
        assert writer["bias"] == (family == "llama")
        assert writer["post_norm"] == (family == "gemma4")
    assert [line.split(":")[0] for line in found["edited"]] == ["attn.o_proj", "mlp.down_proj"]
    rest = [line.split(":")[0] for line in found["not_edited"]]
    assert rest == ["embedding", *names[2:]]
    assert found == inspect_model(str(saved[family]))


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("family", builders.FAMILIES)
def test_for_people(saved, family, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.chdir(saved[family].parent)
    assert cli.main(["inspect", family]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    assert "…" not in out
    kind = builders.config(family).model_type
    assert lines[0].startswith(f"{family}: {kind}, 6 layers, width 64, ")
    head = next(line for line in lines if line.startswith("component"))
    assert head.split() == ["component", "matrices", "shape", "experts", "bias", "post-norm"]
    table = [
        line.split() for line in lines if line.split()[:1] in [[c] for c in COMPONENTS[family]]
    ]
    bias, norm = ("yes" if family == f else "no" for f in ("llama", "gemma4"))
    counts = dict.fromkeys(COMPONENTS[family], 0)
    for name, count, rows, _, columns, experts, has_bias, has_norm in table:
        assert experts == "no"
        counts[name] += int(count)
        assert (has_bias, has_norm) == (bias, norm)
        assert COMPONENTS[family][name] in (None, (int(rows), int(columns)))
    assert counts == dict.fromkeys(COMPONENTS[family], builders.LAYERS)
    assert sum(line.startswith("edited") for line in lines) == 2
    assert "not edited  embedding: not a writer of a layer" in lines
    assert ("ple.projection: 6 matrices" in out) == (family == "gemma4")


def test_matrices_of_other_shapes_have_rows_of_their_own(saved, capsys):
    """Gemma's full-attention layers have wider heads, and its last layers a wider MLP."""
    assert cli.main(["inspect", str(saved["gemma4"])]) == 0
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [tuple(w[:5]) for w in words if w[:1] in (["attn.o_proj"], ["mlp.down_proj"])]
    assert rows == [
        ("attn.o_proj", "3", "64", "x", "64"),
        ("mlp.down_proj", "4", "64", "x", "96"),
        ("attn.o_proj", "3", "64", "x", "128"),
        ("mlp.down_proj", "2", "64", "x", "192"),
    ]


@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_the_demo(capsys, flag):
    assert cli.main(["inspect", "demo", *flag]) == 0
    assert "attn.o_proj" in capsys.readouterr().out


@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_what_is_no_model(tmp_path, capsys, flag):
    assert cli.main(["inspect", str(tmp_path), *flag]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines() == [f"excise: model folder {tmp_path} has no config.json"]
