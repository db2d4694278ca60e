"""Loading: the dtype, the files of a checkpoint, and what is said when something is wrong."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path

import builders
import pytest
import torch
from safetensors.torch import load_file, save_file

from excise.checkpoints import loading
from excise.checkpoints.loading import load, resolve
from excise.checkpoints.model_folder import read_config, weight_files
from excise.config import ModelSection
from excise.errors import ModelError, UnknownArchitecture
from excise.runs.results import model_record
from excise.runs.study_identity import fingerprint


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint in bfloat16 that no test writes to."""
    return builders.checkpoint(tmp_path_factory.mktemp("saved") / "model", "llama")


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def section(folder, **more):
    return ModelSection(source=str(folder), **more)


@pytest.mark.parametrize("family", builders.FAMILIES)
def test_a_model_is_loaded_ready_to_be_measured(family, tmp_path):
    builders.checkpoint(tmp_path / "m", family, dtype=torch.float32)
    loaded = load(section(tmp_path / "m", revision="r1"))
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.is_local
    assert (loaded.folder, loaded.revision) == ((tmp_path / "m").resolve(), "r1")
    assert loaded.tokenizer.chat_template == builders.TEMPLATE
    assert loaded.device == loaded.model.device
    ids = torch.tensor(builders.token_ids(1), device=loaded.device)
    expected = builders.model(family)(ids.cpu()).logits
    assert torch.allclose(loaded.model(ids).logits.cpu(), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_dtype_asked_for(saved, name):
    loaded = load(section(saved, dtype=name))
    assert loaded.dtype == getattr(torch, name)
    assert {p.dtype for p in loaded.model.parameters()} == {loaded.dtype}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_is_exact_on_a_cpu_and_the_stored_dtype_elsewhere(tmp_path, stored):
    builders.checkpoint(tmp_path / "m", "qwen3", dtype=stored)
    loaded = load(section(tmp_path / "m"))
    expected = stored if loaded.device.type == "cuda" else torch.float32
    assert loaded.dtype == expected
    assert next(loaded.model.parameters()).dtype == expected


def test_the_demo_is_part_of_the_package():
    found = resolve(ModelSection(source="demo"))
    assert found == Path(str(resources.files("excise"))) / "data" / "demo" / "model"
    loaded = load(ModelSection(source="demo"))
    assert loaded.is_local
    assert loaded.source == "demo"
    assert loaded.anatomy.writers


@pytest.mark.parametrize("source", ["", "nothing", "/no/such/folder", "a/b/c"])
def test_a_source_that_is_neither_folder_nor_id(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="neither a folder nor a Hub id"):
        resolve(ModelSection(source=source))


def test_an_id_that_is_not_in_the_cache_and_cannot_be_fetched():
    """Offline (see conftest), so the Hub is never asked."""
    with pytest.raises(ModelError, match="owner/none") as error:
        load(ModelSection(source="owner/none"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["own er/na me", "owner/..", "-owner/name"])
def test_an_id_that_cannot_be_one(source):
    with pytest.raises(ModelError):
        load(ModelSection(source=source))


def test_a_relative_folder_is_local(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert resolve(ModelSection(source="model")) == folder.resolve()


def test_the_weight_files_of_whole_and_sharded_checkpoints(saved, tmp_path):
    assert [f.name for f in weight_files(saved)] == ["model.safetensors"]
    sharded = builders.checkpoint(tmp_path / "m", "llama", max_shard_size="100KB")
    names = [f.name for f in weight_files(sharded)]
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert len(names) > 1
    assert names == sorted(set(index["weight_map"].values()))
    save_file({"x": torch.zeros(1)}, sharded / "other.safetensors")
    assert [f.name for f in weight_files(sharded)] == names
    assert load(section(sharded)).anatomy.width == builders.WIDTH


def test_no_weights_or_only_pickles(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \.safetensors weights"):
        weight_files(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickled weights, which can run code"):
        load(section(folder))


def test_a_truncated_shard(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"model\.safetensors are truncated or corrupt"):
        load(section(folder))


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ("{", "checkpoint index .* is not valid JSON"),
        ("[]", "checkpoint index .* is not a JSON object"),
        ("{}", "no weight_map that names files"),
        ('{"weight_map": ["a"]}', "no weight_map that names files"),
        ('{"weight_map": 3}', "no weight_map that names files"),
        ('{"weight_map": {"a": 3}}', "no weight_map that names files"),
        ('{"weight_map": {"a": null, "b": "c"}}', "no weight_map that names files"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "outside the model folder"),
        ('{"weight_map": {"a": "/model.safetensors"}}', "outside the model folder"),
        ('{"weight_map": {"a": "model-1.safetensors"}}', "model-1.safetensors of .* is missing"),
        ('{"weight_map": {}}', "no .safetensors weights"),
    ],
)
def test_an_index_that_cannot_be_used(folder, index, text):
    (folder / "model.safetensors").unlink()  # it would be loaded in place of what an index names
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=text):
        weight_files(folder)


def test_weights_that_are_links_stay_in_the_folder_or_its_blobs(folder, tmp_path):
    weights = folder / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"model\.safetensors is a link out of its folder"):
        load(section(folder))
    weights.unlink()
    (folder / "parts").mkdir()
    (tmp_path / "elsewhere").rename(folder / "parts" / "weights")
    weights.symlink_to("parts/weights")
    assert load(section(folder)).anatomy.width == builders.WIDTH


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "has no config.json"),
        (b"{", "is not valid JSON"),
        (b"\xff", "is not UTF-8 text"),
        (b"[]", "not a JSON object"),
    ],
)
def test_a_configuration_that_cannot_be_read(folder, content, text):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=text):
        read_config(folder)


@pytest.mark.parametrize("model_type", ["no_such_type", "", None])
def test_an_unknown_model_type_is_refused_before_it_is_loaded(folder, model_type):
    config = read_config(folder)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    with pytest.raises(UnknownArchitecture):
        load(section(folder))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(NAME), f"1 tensors are missing .* first {NAME}"),
        (lambda t: t.update({NAME: t[NAME][:, :50].contiguous()}), "down_proj"),
        (lambda t: t[NAME].fill_(float("nan")), f"tensor {NAME} holds NaN"),
        (lambda t: t[NAME].view(-1)[:1].fill_(float("inf")), f"tensor {NAME} holds NaN or inf"),
    ],
)
def test_weights_that_would_give_wrong_figures(folder, change, text):
    change_weights(folder, change)
    with pytest.raises(ModelError, match=text):
        load(section(folder))


TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def test_a_missing_tokenizer(folder):
    for name in TOKENIZER:
        (folder / name).unlink()
    with pytest.raises(ModelError, match=r"tokenizer of .* cannot be loaded") as error:
        load(section(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "{}"])
def test_a_broken_tokenizer(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer of .* cannot be loaded|not valid JSON"):
        load(section(folder))


# -- the fingerprint of a checkpoint ---------------------------------------------------------------


def test_a_copy_has_the_same_fingerprint(saved, folder):
    assert fingerprint(saved) == fingerprint(folder)
    (folder / "README.md").write_text("notes do not count")
    assert fingerprint(saved) == fingerprint(folder)


def test_the_order_of_keys_does_not_count(saved, folder):
    config = dict(reversed(read_config(folder).items()))
    (folder / "config.json").write_text(json.dumps(config))
    assert fingerprint(saved) == fingerprint(folder)


@pytest.mark.parametrize("what", ["config", "weights", "one matrix", "file name", "missing tensor"])
def test_what_changes_the_fingerprint(saved, folder, what):
    if what == "config":
        config = read_config(folder) | {"rms_norm_eps": 1e-3}
        (folder / "config.json").write_text(json.dumps(config))
    elif what == "weights":
        change_weights(folder, lambda t: t["model.embed_tokens.weight"].mul_(2))
        change_weights(folder, lambda t: t["lm_head.weight"].mul_(2))
    elif what == "one matrix":  # as in a model that was tuned with its embeddings frozen
        change_weights(folder, lambda t: t[NAME].mul_(2))
    elif what == "file name":
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
    else:
        change_weights(folder, lambda t: t.pop(NAME))
    assert fingerprint(saved) != fingerprint(folder)


def test_only_the_hubs_cache_names_a_commit(folder, tmp_path):
    commit = "0" * 40
    for place, known in (
        ("snapshots/v1", None),
        (f"snapshots/{commit}", None),
        (f"models--owner--name/snapshots/{commit}", commit),
    ):
        (tmp_path / place).parent.mkdir(parents=True)
        shutil.copytree(folder, tmp_path / place)
        assert model_record(load(section(tmp_path / place))).revision == known
        shutil.rmtree(tmp_path / place.partition("/")[0])


def test_a_copy_of_a_quantised_snapshot_is_of_its_commit(folder, tmp_path):
    config = read_config(folder) | {"quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(config))
    place = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    place.parent.mkdir(parents=True)
    folder.rename(place)
    assert model_record(load(section(place))).revision == "0" * 40
    assert load(section(place)).revision == "0" * 40


def test_a_tokenizer_is_read_before_the_weights_are(folder, monkeypatch):
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(loading, "_load_model", None)
    with pytest.raises(ModelError, match="tokenizer of"):
        load(section(folder))
