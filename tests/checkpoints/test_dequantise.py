"""Plain copies of quantised checkpoints: equal to each format's formula, and to Transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import job
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_checkpoints import fp8_checkpoint, gpt_oss_checkpoint, packed_fp8
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from excise.checkpoints.dequantise import fp8, mxfp4
from excise.checkpoints.loading import load
from excise.checkpoints.quantisation import find_scheme
from excise.checkpoints.safetensors_headers import StoredTensor
from excise.cli import main as cli
from excise.config import ModelSection
from excise.errors import ModelError

STEADY = settings(derandomize=True, deadline=None, max_examples=30)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return fp8_checkpoint(tmp_path_factory.mktemp("fp8") / "model")


# -- formulas --------------------------------------------------------------------------------------


@STEADY
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 17))
def test_fp8_blocks_are_each_times_their_scale(rows, columns, block):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    values, scale = packed_fp8(weight, block)
    found = fp8(values, scale, (block, block))
    expected = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            expected[i, j] = values[i, j].float() * scale[i // block, j // block]
    assert torch.equal(found, expected.bfloat16())
    assert torch.allclose(found.float(), weight, atol=0.07 * float(weight.abs().max()))


def test_fp8_scales_of_rows_and_of_whole_tensors():
    values = torch.randn(6, 4).to(torch.float8_e4m3fn)
    for scale in (torch.tensor(0.5), torch.tensor([0.5]), torch.rand(6, 1), torch.rand(6)):
        wide = scale[:, None] if scale.dim() == 1 and len(scale) == 6 else scale
        assert torch.equal(fp8(values, scale, None), (values.float() * wide).bfloat16())


def test_mxfp4_is_what_transformers_reads():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 140, (3, 10, 2), dtype=torch.uint8, generator=generator)
    found = mxfp4(blocks, scales)
    assert found.shape == (3, 64, 10)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales))


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "60KB"}])
def test_an_fp8_checkpoint_is_what_transformers_unpacks(tmp_path, shards):
    folder = fp8_checkpoint(tmp_path / "model", **shards)
    (folder / "more").mkdir()
    (folder / "more" / "notes.txt").write_text("kept")
    loaded = load(ModelSection(source=str(folder), dtype="bfloat16"))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    ours = loaded.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "FP8" in loaded.notes[0]
    assert loaded.folder != folder
    assert "quantization_config" not in json.loads((loaded.folder / "config.json").read_text())
    copies = {n for f in loaded.folder.glob("*.safetensors") for n in load_file(f)}
    assert not any("scale" in name for name in copies)
    assert not any(path.is_symlink() for path in loaded.folder.rglob("*"))
    assert (loaded.folder / "more" / "notes.txt").read_text() == "kept"
    scratch = loaded.folder
    del loaded
    assert not scratch.exists()
    assert (folder / "more" / "notes.txt").read_text() == "kept"


def test_tensors_that_no_class_loads_are_in_the_copy(source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    path = folder / "model.safetensors"
    extra = {"mtp.head.weight": torch.randn(4, 4, dtype=torch.bfloat16), "mtp.n": torch.arange(3)}
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})
    loaded = load(ModelSection(source=str(folder)))
    copied = load_file(loaded.folder / "model.safetensors")
    assert all(torch.equal(copied[name], tensor) for name, tensor in extra.items())


def test_scales_that_are_missing(source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.down_proj.weight_scale_inv"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"no tensor model\.layers\.1\.mlp\.down_proj\.weight_scale_inv"
    ):
        load(ModelSection(source=str(folder)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised with gptq, which cannot be unpacked"),
        ({"quant_method": "awq"}, "quantised with awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "with --quantize bnb-4bit"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "(pack-quantized)"),
        ({"bits": 3}, "an unnamed method"),
    ],
)
def test_methods_that_cannot_be_unpacked(settings, words):
    for config in (
        {"quantization_config": settings},
        {"text_config": {"quantization_config": settings}},
    ):
        weight = StoredTensor(Path("x"), "a.qweight", "I32", (4, 4), 0, 64)
        with pytest.raises(ModelError) as error:
            find_scheme(config, [weight], "owner/name")
        assert words in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "claim",
    [
        {"quant_method": "fp8", "weight_block_size": [16, 16]},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        "fp8",
        {},
    ],
)
def test_plain_weights_beside_a_claim_that_they_are_packed(tiny, tmp_path, claim):
    """Merging and tuning leave such settings behind; Transformers would act on them."""
    folder = Path(shutil.copytree(tiny / "model", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": claim}))
    loaded = load(ModelSection(source=str(folder), dtype="bfloat16"))
    expected = load(ModelSection(source=str(tiny / "model"), dtype="bfloat16"))
    found = loaded.model.state_dict()
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(found[name], tensor)
    assert "its weights are plain" in loaded.notes[0]
    assert "unpacked" not in loaded.notes[0]
    assert json.loads((loaded.folder / "config.json").read_text()) == config
    (weights,) = loaded.folder.glob("*.safetensors")
    assert weights.read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (loaded.folder / "tokenizer.json").is_file()


def rewritten(source: Path, folder: Path, change, settings=None) -> Path:
    """A copy of an FP8 checkpoint with other tensors, or other settings of its quantisation."""
    shutil.copytree(source, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings or {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_packed_weights_of_which_nothing_is_said(source, tmp_path):
    """Scales for whole tensors and for rows need no settings; without scales there is no value."""
    name = "model.layers.1.mlp.down_proj.weight"

    def one_scale(tensors):
        for key in [key for key in tensors if key.endswith("_scale_inv")]:
            rows = len(tensors[key.removesuffix("_scale_inv")])
            tensors[key] = torch.full((rows, 1) if "down" in key else (), 0.5)

    folder = rewritten(source, tmp_path / "model", one_scale)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load(ModelSection(source=str(folder), dtype="bfloat16"))
    stored = load_file(folder / "model.safetensors")[name]
    assert torch.equal(loaded.model.state_dict()[name], (stored.float() / 2).bfloat16())
    assert "FP8, unpacked" in loaded.notes[0]
    tensors = load_file(folder / "model.safetensors")
    bare = {key: t for key, t in tensors.items() if "scale" not in key}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="in FP8 without its scales"):
        load(ModelSection(source=str(folder)))


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("scale", "settings"),
    [
        (torch.ones(3, 6), {}),
        (torch.ones(4, 7), {}),
        (torch.ones(4, 6, 1), {}),
        (torch.ones(7), {}),
        (torch.ones(0), {}),
        (torch.ones(4, 6, dtype=torch.int32), {}),
        (torch.ones(4, 6), {"weight_block_size": [16, 8]}),
        (torch.ones(4, 6), {"weight_block_size": None}),
        (torch.ones(4, 6), {"weight_block_size": [0, 16]}),
        (torch.ones(4, 6), {"weight_block_size": [16, 16, 16]}),
        (torch.ones(4, 6), {"weight_block_size": "16"}),
        (torch.ones(4, 6), {"weight_block_size": [1 << 62, 16]}),
    ],
)
def test_scales_that_do_not_fit(source, tmp_path, scale, settings):
    folder = rewritten(
        source, tmp_path / "model", lambda t: t.update({f"{DOWN}_scale_inv": scale}), settings
    )
    with pytest.raises(
        ModelError, match=r"does not scale|weight_block_size is|scale_inv is I32"
    ) as error:
        load(ModelSection(source=str(folder)))
    assert "\n" not in str(error.value)


def test_tensors_of_any_dtype_beside_are_in_the_copy(source, tmp_path):
    kinds = ("uint16", "uint32", "uint64", "float64", "complex64", "bool", "float8_e8m0fnu")
    extra = {f"mtp.{kind}": torch.ones(3).to(getattr(torch, kind)) for kind in kinds}
    extra |= {"mtp.empty": torch.ones(0, 4), "mtp.scalar": torch.tensor(1.5)}
    folder = rewritten(source, tmp_path / "model", lambda tensors: tensors.update(extra))
    loaded = load(ModelSection(source=str(folder)))
    copied = load_file(loaded.folder / "model.safetensors")
    for name, tensor in extra.items():
        assert copied[name].dtype == tensor.dtype
        assert copied[name].shape == tensor.shape
        assert copied[name].flatten().tolist() == tensor.flatten().tolist()


# -- whole runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["directional", "ridge", "ara", "subspace"])
def test_a_run_on_fp8_exports_a_plain_model_where_it_is_asked_for(
    method, tiny, source, tmp_path, capsys
):
    out = tmp_path / "run"
    before = {path: path.read_bytes() for path in source.iterdir()}
    formats = 'export.formats=["safetensors", "adapter"]'
    plain = ("--set", "export.unpack=true")
    arguments = job(tiny, out, "--method", method, "--set", formats, *plain)
    arguments[1] = str(source)
    assert cli.main(arguments) == 0
    record = json.loads((out / "record.json").read_text())
    assert record["model"]["source"] == str(source)
    assert "unpacked to bfloat16" in record["model"]["notes"][0]
    assert "unpacked to bfloat16" in (out / "model" / "README.md").read_text()
    assert before == {path: path.read_bytes() for path in source.iterdir()}
    whole = record["artifacts"][0]
    for name, score in whole["expected"].items():
        assert whole["measured"][name]["value"] == pytest.approx(score["value"], abs=0.02)
    edited = load_file(out / "model" / "model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).state_dict()
    changed = {name for name, tensor in edited.items() if not torch.equal(tensor, base[name])}
    assert changed
    assert changed == set(whole["details"]["tensors"])
    adapter = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] is None  # a folder is nobody else's business
    capsys.readouterr()
    assert cli.main(["resume", str(out), "--trials", "14", "--quiet"]) == 0


# -- MXFP4, as gpt-oss stores it -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["few groups", "other dtype", "half", "flat"])
def test_mxfp4_scales_that_do_not_fit(gpt_oss, tmp_path, kind):
    folder = Path(shutil.copytree(gpt_oss, tmp_path / "model"))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("down_proj_blocks"))
    scales = name.replace("_blocks", "_scales")
    if kind == "few groups":
        tensors[scales] = tensors[scales][..., :1].contiguous()
    elif kind == "other dtype":
        tensors[scales] = tensors[scales].float()
    elif kind == "half":
        tensors[name] = tensors[name][..., :8].contiguous()
    else:
        tensors |= {name: tensors[name].flatten(), scales: tensors[scales].flatten()}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="does not scale"):
        load(ModelSection(source=str(folder)))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory) -> Path:
    return gpt_oss_checkpoint(tmp_path_factory.mktemp("gpt_oss"))


def test_an_mxfp4_checkpoint_is_what_transformers_unpacks(gpt_oss):
    loaded = load(ModelSection(source=str(gpt_oss), dtype="bfloat16"))
    theirs = AutoModelForCausalLM.from_pretrained(
        gpt_oss, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    ).state_dict()
    ours = loaded.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any("experts" in name for name in ours)
    assert "MXFP4" in loaded.notes[0]


@pytest.mark.parametrize("method", ["directional", "ridge", "ara", "subspace"])
def test_a_run_on_mxfp4_edits_experts_and_begins_in_the_final_channel(
    method, tiny, gpt_oss, tmp_path
):
    out = tmp_path / "run"
    arguments = job(tiny, out, "--method", method, "--set", "model.dtype=bfloat16")
    arguments[1] = str(gpt_oss)
    assert cli.main(arguments) == 0
    record = json.loads((out / "record.json").read_text())
    assert record["formatting"]["header"] == "<|channel|>final<|message|>"
    key = "experts.down_proj.max_weight"
    number = max(record["trials"], key=lambda trial: trial["params"].get(key, 0.0))["number"]
    words = ["--to", str(tmp_path / "model"), "--trial", str(number), "--quiet"]
    assert cli.main(["export", str(out), *words]) == 0
    artifact = json.loads((out / "record.json").read_text())["artifacts"][-1]
    assert any("experts.down_proj" in name for name in artifact["details"]["tensors"])
    for name, score in artifact["expected"].items():
        assert artifact["measured"][name]["value"] == pytest.approx(score["value"], abs=0.05)
