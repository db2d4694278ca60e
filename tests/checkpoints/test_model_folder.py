"""The door of a model's folder: what is refused before a library sees it, and what it says."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import builders
import families
import pytest
import torch
from conftest import job
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from excise.checkpoints.loading import load, resolve
from excise.checkpoints.model_folder import (
    library_errors,
    read_config,
    read_generation,
    read_tensors,
    weight_files,
)
from excise.cli import main as cli
from excise.config import ModelSection
from excise.errors import ExciseError, ModelError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return builders.checkpoint(tmp_path_factory.mktemp("saved") / "model", "qwen3")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def refused(folder: Path, **more: Any) -> str:
    """The one line by which a load ends."""
    with pytest.raises(ModelError) as error:
        load(ModelSection(source=str(folder), **more))
    assert "\n" not in str(error.value)
    return str(error.value)


def change(folder: Path, name: str = "config.json", **settings: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


# -- files -----------------------------------------------------------------------------------------


def test_an_adapter_beside_a_model_would_be_put_on_top_of_it(folder):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(builders.model("qwen3"), LoraConfig(r=2, target_modules=["o_proj"]))
    adapted.save_pretrained(folder)
    line = refused(folder)
    assert "holds an adapter beside the model" in line
    assert "merge_and_unload" in line


def test_an_adapters_folder_is_no_model(folder):
    change(folder, "generation_config.json", base_model_name_or_path="owner/name")
    (folder / "generation_config.json").rename(folder / "adapter_config.json")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()
    line = refused(folder)
    assert "it is an adapter, not a model; merge it first" in line


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_in_place_of_a_file(folder, name):
    (folder / name).write_text(POINTER)
    line = refused(folder)
    assert name in line
    assert "git lfs pull" in line


def test_only_gguf_files(folder, tmp_path):
    (tmp_path / "q").mkdir()
    for name in ("b-Q4.gguf", "a-Q8.gguf"):
        (tmp_path / "q" / name).write_bytes(b"GGUF" + b"\0" * 20)
    line = refused(tmp_path / "q")
    assert f"only GGUF files: give {tmp_path / 'q' / 'a-Q8.gguf'} (of a-Q8.gguf, b-Q4.gguf)" in line
    assert "--set model.gguf_file=a-Q8.gguf" in line
    shutil.copy(folder / "config.json", tmp_path / "q")  # as many of them bring it
    assert "only GGUF files" in refused(tmp_path / "q")
    assert "has no file 'c.gguf'" in refused(tmp_path / "q", gguf_file="c.gguf")


def test_a_gguf_is_known_by_its_first_bytes_and_keeps_its_name(tmp_path):
    blob = tmp_path / "blobs" / ("0" * 64)
    blob.parent.mkdir()
    blob.write_bytes(b"GGUF" + b"\0" * 20)
    (tmp_path / "small.gguf").symlink_to(blob)
    assert resolve(ModelSection(source=str(tmp_path / "small.gguf"))) == tmp_path / "small.gguf"
    assert resolve(ModelSection(source=str(blob))) == blob
    (tmp_path / "other.gguf").write_bytes(b"GGML")
    assert "is a file and no GGUF" in refused(tmp_path / "other.gguf")


def test_a_part_of_a_trainings_checkpoint_would_be_loaded_in_its_place(folder):
    name = "shard-00001-model-00001-of-00001.safetensors"
    shutil.copy(folder / "model.safetensors", folder / name)
    assert name in refused(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "x.txt"])
def test_a_pipe_or_device_as_a_file_does_not_hang(folder, name):
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        line = refused(folder)
        assert name in line


def test_what_may_not_be_read_is_not_called_corrupt(folder, monkeypatch):
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: "model.safetensors" not in str(path) and real(path, mode)
    )
    line = refused(folder)
    assert "permission denied" in line
    assert "download" not in line


def test_a_name_longer_than_a_file_may_have(tmp_path):
    (tmp_path / "model").mkdir()
    index = {"weight_map": {"a": f"{'m' * 300}\n.safetensors", "b": "nul\0.safetensors"}}
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3"}')
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "is missing: download the model again" in refused(tmp_path / "model")


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eos_token_id": "<eos>"}, "eos_token_id is '<eos>', not a token id"),
        ({"eos_token_id": [[1]]}, "eos_token_id is [[1]], not a token id"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id is {'a': 1}, not a token id"),
        ({"eos_token_id": True}, "eos_token_id is True, not a token id"),
        ({"model_type": 3}, "model_type is 3, not a text"),
        ({"text_config": "x"}, "text_config is 'x', not a table"),
        ({"dtype": ["bfloat16"]}, "dtype is ['bfloat16'], not a text"),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures is 'Qwen3ForCausalLM', not a list"),
        ({"architectures": [3]}, "architectures is [3], not a list of texts"),
        ({"rope_parameters": {"rope_theta": int("9" * 400)}}, "rope_theta is a number of more"),
        ({"hidden_size": 1 << 63}, "hidden_size is a number of more"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf, which is no number"),
        ({"text_config": {"pad_token_id": 0.5}}, "text_config.pad_token_id is 0.5, not a token id"),
    ],
)
def test_settings_of_another_type(folder, settings, words):
    change(folder, **settings)
    assert words in refused(folder)


def test_settings_that_real_models_have(folder):
    """Limits without end in lists, padding ids of -1, nulls, and several end tokens."""
    change(
        folder,
        time_step_limit=[0.0, float("inf")],
        pad_token_id=None,
        eos_token_id=[1, 2],
        architectures=None,
        rope_scaling=None,
        num_local_experts=None,
    )
    assert read_config(folder)["time_step_limit"][1] == float("inf")
    change(folder, "generation_config.json", temperature=0, top_p=1.0, top_k=-1, pad_token_id=-1)
    assert read_generation(folder)["temperature"] == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": "hot"}, {"temperature": -1}, {"top_p": 7}, {"top_p": True}, {"top_k": [1]},
        {"eos_token_id": "x"}, {"repetition_penalty": float("nan")}, {"min_p": 2},
    ],
)  # fmt: skip
def test_a_generation_config_that_cannot_be_meant(folder, settings):
    change(folder, "generation_config.json", **settings)
    assert next(iter(settings)) in refused(folder)


def test_deep_settings(folder):
    (folder / "config.json").write_text('{"a":' * 5000 + "1" + "}" * 5000)
    assert "levels deep" in refused(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_labels": 10**9}, "num_labels is 1000000000"),
        ({"hidden_size": 10**6, "head_dim": 1000}, "it is the configuration of another model"),
        ({"hidden_size": 10**9}, ""),
        ({"vocab_size": 10**9}, "it is the configuration of another model"),
        ({"intermediate_size": 10**9}, "it is the configuration of another model"),
        ({"head_dim": 10**9}, "it is the configuration of another model"),
        ({"num_attention_heads": 10**9}, ""),
    ],
)
def test_sizes_beyond_what_the_weights_hold(folder, settings, words):
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    change(folder, layer_types=None, **settings)
    assert words in refused(folder)
    assert time.monotonic() - begun < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_experts_per_tok": -1}, "cannot be run: "),
        ({"num_experts_per_tok": 10**9}, "cannot be run: "),
        ({"rms_norm_eps": -1e9}, "gives values that are no numbers in float32"),
        ({"num_hidden_layers": 0, "layer_types": []}, "has no layers"),
    ],
)
def test_settings_that_only_a_pass_brings_to_light(tmp_path, settings, words):
    folder = families.save(families.model("qwen3_moe"), tmp_path / "model")
    change(folder, **settings)
    assert words in refused(folder)


# -- headers ---------------------------------------------------------------------------------------


def write_header(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header",
    [
        b"", b"{", b"[]", b"\xff\xff", b'{"a": 3}', b'{"a":' * 5000,
        {"a": entry(shape=[3])}, {"a": entry(shape=[-2])}, {"a": entry(shape=[2.0])},
        {"a": entry(shape="2")}, {"a": entry(dtype="F31")}, {"a": entry(dtype=["F32"])},
        {"a": entry(offsets=[8, 16])}, {"a": entry(offsets=[8, 0])}, {"a": entry(offsets=[0])},
        {"a": entry(offsets=[0, 2**80])}, {"a": entry(shape=[2**40, 2**40])}, {"a": entry(shape=[1] * 40)},
        {"a": entry(), "b": entry()}, {"a": {"dtype": "F32"}}, {}, {"a" * 501: entry()}, {"a\n": entry()},
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    ],
)  # fmt: skip
def test_a_header_that_contradicts_itself_or_the_file(tmp_path, header):
    path = write_header(tmp_path / "model.safetensors", header, b"\0" * 8)
    with pytest.raises(ModelError, match=r"model\.safetensors are truncated or corrupt") as error:
        read_tensors([path])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [0, 1 << 20, 1 << 62, (1 << 64) - 1])
def test_the_length_of_a_header(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match="truncated or corrupt"):
        read_tensors([path])


def test_a_header_is_what_the_format_says(folder):
    (file,) = weight_files(folder)
    known = load_file(file)
    found = {tensor.name: tensor for tensor in read_tensors([file])}
    assert found.keys() == known.keys()
    for name, tensor in found.items():
        assert tensor.shape == tuple(known[name].shape)
        assert tensor.read_bytes() == known[name].view(torch.uint8).numpy().tobytes()


def test_a_tensor_that_two_files_hold(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    first = dict(list(tensors.items())[:1])
    save_file(tensors, folder / "a.safetensors", metadata={"format": "pt"})
    save_file(first, folder / "b.safetensors", metadata={"format": "pt"})
    path.unlink()
    weight_map = dict.fromkeys(tensors, "a.safetensors") | dict.fromkeys(first, "b.safetensors")
    weight_map["x"] = "a.safetensors"
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"tensor {next(iter(first))} is in a.safetensors and in b.safetensors" in refused(folder)


# -- libraries -------------------------------------------------------------------------------------


class PanicException(BaseException):
    """As the tokenizers library's Rust names its own."""


@pytest.mark.parametrize("error", [Exception("plain\nmore"), SyntaxError("x"), PanicException("y")])
def test_whatever_a_library_raises_is_one_line(error):
    with (
        pytest.raises(ModelError, match=r"it cannot be loaded: (plain|x|y)$"),
        library_errors("it"),
    ):
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), ExciseError("ours")])
def test_what_is_not_the_files_fault_goes_on(error):
    with pytest.raises(type(error)), library_errors("it"):
        raise error


# -- before the work -------------------------------------------------------------------------------


def test_writers_that_could_not_be_edited_are_refused_before_the_work(
    tiny, folder, tmp_path, capsys
):
    """An FP8 that is read as it is: Transformers loads it, and nothing could be folded into it."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fnuz)
    save_file(tensors, path, metadata={"format": "pt"})
    arguments = job(tiny, tmp_path / "out")
    arguments[1] = str(folder)
    assert cli.main(arguments) == 2
    line = capsys.readouterr().err
    assert f"{name} (64, 96) in a form that can be edited" in line
    assert "F8_E4M3FNUZ" in line
    assert not (tmp_path / "out").exists()
    assert cli.main([*arguments, "--set", "edit.components=['attn.o_proj']"]) == 0


def test_tokens_that_were_added_without_an_embedding(tiny, folder, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<{n}>" for n in range(40)] + ["velm"])
    tokenizer.save_pretrained(folder)
    arguments = job(tiny, tmp_path / "out")
    arguments[1] = str(folder)
    assert cli.main(arguments) == 2
    line = capsys.readouterr().err
    assert "'velm'" in line
    assert "has 300 token ids" in line
    assert not (tmp_path / "out").exists()


def test_a_prompt_file_in_the_hubs_cache_keeps_its_suffix(tiny, tmp_path):
    """There a file is a link to a blob that is named by its hash."""
    blob = tmp_path / "blobs" / ("0" * 64)
    blob.parent.mkdir()
    shutil.copy(tiny / "target.jsonl", blob)
    link = tmp_path / "snapshot" / "target.jsonl"
    link.parent.mkdir()
    link.symlink_to(blob)
    arguments = job(tiny, tmp_path / "out", "--target", str(link), "--set", "export.formats=[]")
    assert cli.main(arguments) == 0
