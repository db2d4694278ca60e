"""Quantised checkpoints out as they came in: loaded as their users load them, all else byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import job
from quantised_checkpoints import (
    BLOCK,
    compressed_checkpoint,
    fp8_checkpoint,
    gpt_oss_checkpoint,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, Mxfp4Config

from excise.checkpoints.loading import Loaded, load
from excise.cli import main as cli
from excise.config import ExportSection, ModelSection
from excise.errors import ConfigError
from excise.export.checkpoint import export_packed, export_safetensors
from excise.export.exporter import exporter
from excise.model.edits import Edit

KINDS = ("fp8", "channel", "tensor", "mxfp4")
IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("packed")
    found = {name: compressed_checkpoint(root / name, name) for name in ("channel", "tensor")}
    found["fp8"] = fp8_checkpoint(root / "fp8", max_shard_size="60KB")
    (root / "mxfp4").mkdir()
    found["mxfp4"] = gpt_oss_checkpoint(root / "mxfp4")
    return found


def ablations(loaded: Loaded) -> dict[str, Edit]:
    """One direction removed from every writer, row norms kept."""
    edits = {}
    draw = torch.Generator().manual_seed(0)
    v = torch.nn.functional.normalize(torch.randn(loaded.anatomy.width, generator=draw), dim=0)
    for writer in loaded.anatomy.writers:
        weight = writer.weight.detach().float()
        n = weight.norm(dim=1)
        a = v @ (weight / n[:, None])
        left = (n * v)[:, None]
        scale = n / (weight - left @ a[None]).norm(dim=1)
        bias = writer.bias
        shift = None if bias is None else torch.zeros(len(n))
        edits[writer.name] = Edit(left, a[None].contiguous(), scale, shift)
    return edits


def as_users_load(folder: Path, kind: str) -> Any:
    """Loaded by Transformers alone, on a CPU."""
    settings = {
        "fp8": None,
        "mxfp4": Mxfp4Config(dequantize=True),
    }.get(kind, CompressedTensorsConfig(dequantize=True))
    given = {} if settings is None else {"quantization_config": settings}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **given).eval()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {k: t for p in sorted(folder.glob("*.safetensors")) for k, t in load_file(p).items()}


def raw(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def kl(before: Any, after: Any) -> float:
    with torch.inference_mode():
        one, other = (m(input_ids=IDS).logits.double().log_softmax(-1) for m in (before, after))
    return float((one.exp() * (one - other)).sum(-1).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_leaves_in_the_form_that_the_model_came_in(
    kind: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources[kind]
    loaded = load(ModelSection(source=str(source), dtype="float32"))
    assert loaded.plain is not None
    edits = ablations(loaded)
    done = export_packed(loaded.plain, tmp_path / "out", edits, loaded.anatomy.writers)
    before, after = tensors_of(source), tensors_of(done.path)
    changed = {name for name in before if not torch.equal(raw(before[name]), raw(after[name]))}
    ends = ("_scale_inv", "_scale", "_scales")
    assert {n for n in changed if not n.endswith(ends)} == set(done.details["tensors"])
    assert any(name.endswith(ends) for name in changed)
    for path in source.iterdir():
        twin = done.path / path.name
        if path.suffix != ".safetensors":
            assert twin.read_bytes() == path.read_bytes()
        else:
            size = 8 + int.from_bytes(path.read_bytes()[:8], "little")
            assert twin.read_bytes()[:size] == path.read_bytes()[:size]
    # As its users load it: the edited weights, as near as what is stated.
    theirs = as_users_load(done.path, kind)
    again = load(ModelSection(source=str(done.path), dtype="bfloat16"))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    mine = {writer.name: writer.weight.detach().float() for writer in again.anatomy.writers}
    worst = done.details["packing_error"]
    for writer in loaded.anatomy.writers:
        wanted = edits[writer.name].apply_to_weight(writer.weight.detach())
        apart = float((mine[writer.name] - wanted).norm() / wanted.norm())
        assert apart <= worst + 0.003  # bfloat16's own
    assert done.details["packing_lost"] < 0.35
    assert done.details["packed"] in ("FP8", "FP8 (compressed-tensors)", "MXFP4")
    json.dumps(done.details)


def test_packing_costs_an_edit_no_more_than_it_cost_the_model(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    """KL(float edit || packed edit) against KL(the model before it was packed || packed)."""
    source = sources["fp8"]
    loaded = load(ModelSection(source=str(source), dtype="float32"))
    assert loaded.plain is not None
    edits, writers = ablations(loaded), loaded.anatomy.writers
    exact = export_safetensors(loaded.folder, tmp_path / "float", edits, writers)
    packed = export_packed(loaded.plain, tmp_path / "packed", edits, writers)
    unpacked = [
        load(ModelSection(source=str(path), dtype="float32")).model
        for path in (exact.path, packed.path, source)
    ]
    own = AutoModelForCausalLM.from_pretrained(source.with_name("fp8-before"), dtype=torch.float32)
    cost = kl(unpacked[0], unpacked[1])
    assert 0 < cost <= kl(own.eval(), unpacked[2])
    assert cost < 0.2 * kl(unpacked[2], unpacked[0])  # and far less than the edit itself does


@pytest.fixture(scope="module")
def finished(tiny: Path, sources: dict[str, Path], tmp_path_factory: Any) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    arguments = job(tiny, out, "--method", "directional")
    arguments[1] = str(sources["fp8"])
    assert cli.main(arguments) == 0
    return out


def test_a_run_packs_measures_and_says_so(finished: Path, tmp_path: Path, capsys: Any) -> None:
    record = json.loads((finished / "record.json").read_text())
    (artifact,) = record["artifacts"]
    assert artifact["details"]["packed"] == "FP8"
    for name, score in artifact["expected"].items():
        assert artifact["measured"][name]["value"] == pytest.approx(score["value"], abs=0.1)
    card = (finished / "model" / "README.md").read_text()
    assert "Packed as the base model is: `FP8`" in card
    assert "that packing undid" in card
    settings = json.loads((finished / "model" / "config.json").read_text())
    assert settings["quantization_config"]["weight_block_size"] == [BLOCK, BLOCK]
    capsys.readouterr()
    assert cli.main(["reproduce", str(finished), "--quiet"]) == 0
    assert "same bytes" in capsys.readouterr().out
    to = tmp_path / "plain"
    assert cli.main(["export", str(finished), "--to", str(to), "--unpack", "--quiet"]) == 0
    assert {t.dtype for t in tensors_of(to).values()} == {torch.bfloat16}
    assert (
        "packed"
        not in json.loads((finished / "record.json").read_text())["artifacts"][-1]["details"]
    )


def test_what_cannot_be_packed_is_said_before_the_work(
    tiny: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    plain = load(ModelSection(source=str(tiny / "model")))
    unpack = exporter("safetensors", ExportSection(unpack=True))
    with pytest.raises(ConfigError, match="are plain already"):
        unpack.check(plain, plain.anatomy.writers)
    folder = Path(shutil.copytree(sources["mxfp4"], tmp_path / "model"))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in [n for n in tensors if n.endswith("_blocks")]:
        plainly = name.removesuffix("_blocks")
        shape = tensors.pop(name).shape
        tensors.pop(f"{plainly}_scales")
        tensors[plainly] = torch.randn(shape[0], shape[2] * 32, shape[1]).to(torch.float8_e4m3fn)
        tensors[f"{plainly}_scale"] = torch.tensor(0.01)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load(ModelSection(source=str(folder)))
    packed = exporter("safetensors", ExportSection())
    with pytest.raises(ConfigError, match=r"share one scale.*--unpack"):
        packed.check(loaded, loaded.anatomy.select())
    packed.check(loaded, loaded.anatomy.select(("attn.o_proj",)))
    exporter("safetensors", ExportSection(unpack=True)).check(loaded, loaded.anatomy.select())
