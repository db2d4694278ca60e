"""GGUF files as the model to search: read in full, of all parts, or refused in one line."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import builders
import gguf_models
import numpy as np
import pytest
import torch
from conftest import job

from excise.checkpoints.gguf_source import unpack_gguf
from excise.checkpoints.loading import load
from excise.cli import main as cli
from excise.config import ModelSection
from excise.errors import ModelError
from excise.runs.results import model_record


@pytest.mark.parametrize("kind", ["Q8_0", "F16", "Q4_0"])
def test_a_gguf_file_is_what_its_library_unpacks(tmp_path, kind):
    expected = gguf_models.gguf_file(tmp_path / "small.gguf", kind)
    loaded = load(ModelSection(source=str(tmp_path / "small.gguf"), dtype="float32"))
    found = loaded.model.state_dict()
    for key, tensor in expected.items():
        if not key.endswith(("q_proj.weight", "k_proj.weight")):
            assert torch.equal(found[key], tensor.bfloat16().float()), key
    assert "GGUF" in loaded.notes[0]
    assert loaded.tokenizer.chat_template == builders.TEMPLATE
    again = load(ModelSection(source=str(tmp_path), gguf_file="small.gguf", dtype="float32"))
    assert torch.equal(again.model.lm_head.weight, loaded.model.lm_head.weight)


def test_a_run_on_a_gguf_file(tiny, tmp_path):
    out = tmp_path / "run"
    gguf_models.gguf_file(tmp_path / "small.gguf")
    arguments = job(tiny, out)
    arguments[1] = str(tmp_path / "small.gguf")
    assert cli.main(arguments) == 0
    assert cli.main(["resume", str(out), "--trials", "14", "--quiet"]) == 0
    record = json.loads((out / "record.json").read_text())
    assert record["model"]["source"] == str(tmp_path / "small.gguf")
    (artifact,) = record["artifacts"]
    for name, score in artifact["expected"].items():
        assert artifact["measured"][name]["value"] == pytest.approx(score["value"], abs=0.05)


@pytest.mark.parametrize(("content", "architecture"), [(b"GGUFnothing", None), (None, "made-up")])
def test_a_file_that_transformers_cannot_read(tmp_path, content, architecture):
    path = tmp_path / "small.gguf"
    if content is None:
        gguf_models.gguf_file(path, architecture=architecture)
    else:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"small\.gguf (has version|cannot be read)") as error:
        load(ModelSection(source=str(path)))
    assert "\n" not in str(error.value)


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as error:
        unpack_gguf(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blk.3.ffn_down.weight", "first model.layers.3.mlp.down_proj.weight"),
        ("output_norm.weight", "first model.norm.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
    ],
)
def test_a_tensor_that_is_not_there_is_named(tmp_path: Path, name: str, words: str) -> None:
    gguf_models.gguf_file(tmp_path / "small.gguf", without=name)
    said = refused(tmp_path / "small.gguf")
    assert words in said
    assert "it would run with random values" in said


def test_a_tensor_that_finds_no_place_is_named(tmp_path: Path) -> None:
    bias = {"blk.2.attn_q.bias": np.ones(64, dtype=np.float32)}
    gguf_models.gguf_file(tmp_path / "small.gguf", more=bias)
    assert "blk.2.attn_q.bias" in refused(tmp_path / "small.gguf")


def test_all_parts_of_a_split_file_are_read(tmp_path: Path, capfd: Any) -> None:
    gguf_models.gguf_file(tmp_path / "small.gguf")
    gguf_models.gguf_file(tmp_path / "parts.gguf", split_max_tensors=20)
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    assert len(parts) == 3
    whole = load(ModelSection(source=str(tmp_path / "small.gguf"), dtype="float32"))
    joined = load(ModelSection(source=str(parts[1]), dtype="float32"))
    ours, theirs = whole.model.state_dict(), joined.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert joined.tokenizer.get_vocab() == whole.tokenizer.get_vocab()
    assert joined.tokenizer.chat_template == whole.tokenizer.chat_template
    assert joined.model.generation_config.eos_token_id == 1
    assert not [path for path in joined.folder.iterdir() if path.suffix != ".json"
                and path.name not in ("model.safetensors", "chat_template.jinja")]  # fmt: skip
    assert capfd.readouterr().err == ""  # no library's progress bar
    parts[2].unlink()
    assert "is missing beside it" in refused(parts[0])


def test_what_lies_beside_a_file_and_how_it_is_called_do_not_matter(tmp_path: Path) -> None:
    """As the Hub's cache stores it: a blob without a suffix, and other models' files around it."""
    gguf_models.gguf_file(tmp_path / "small.gguf")
    blob = (tmp_path / "small.gguf").rename(tmp_path / "0123abcd")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter_config.json").write_text("{}")
    copy = unpack_gguf(blob)
    assert json.loads((copy.folder / "config.json").read_text())["num_hidden_layers"] == 6


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("embedding_length", 1 << 22, "describes a model of"),
        ("feed_forward_length", 1 << 23, "describes a model of"),
        ("feed_forward_length", 64, "of the wrong shape"),
        ("vocab_size", 1 << 22, "describes a model of"),
        ("vocab_size", 100, "of the wrong shape"),
        ("attention.head_count", 0, "cannot be read"),
        ("attention.head_count_kv", 1, "of the wrong shape"),
        ("block_count", 5, "and holds layer 5"),
        ("block_count", 7, "no tensor of layer 6"),
    ],
)
def test_sizes_that_the_tensors_do_not_have(
    tmp_path: Path, key: str, value: int, words: str
) -> None:
    path = tmp_path / "small.gguf"
    gguf_models.gguf_file(path)
    whole = path.read_bytes()
    at = whole.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4
    path.write_bytes(whole[:at] + struct.pack("<I", value) + whole[at + 4 :])
    begun = time.monotonic()
    assert words in refused(path)
    assert time.monotonic() - begun < 20


def test_the_licence_that_a_file_names_is_on_the_record(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    gguf_models.gguf_file(path, change=lambda writer: writer.add_license("apache-2.0"))
    loaded = load(ModelSection(source=str(path)))
    assert model_record(loaded).license == "apache-2.0"


def llama3_factors(half: int, base: float = 10000.0) -> np.ndarray:
    """By what llama.cpp's converter says that Llama 3.1 divides its frequencies: by the formula."""
    out = []
    for frequency in 1.0 / base ** (np.arange(half) / half):
        wave = 2 * np.pi / frequency
        smooth = (8192 / wave - 1) / 3
        between = 1 / ((1 - smooth) / 8 + smooth) if 0 < smooth < 1 else 1.0
        out.append(8.0 if wave > 8192 else 1.0 if wave < 2048 else between)
    return np.array(out, dtype=np.float32)


def test_the_stretched_angles_of_llama_3_are_kept(tmp_path: Path) -> None:
    factors = llama3_factors(8)
    assert len(set(factors.tolist())) > 1
    gguf_models.gguf_file(tmp_path / "small.gguf", more={"rope_freqs.weight": factors})
    model = load(ModelSection(source=str(tmp_path / "small.gguf"), dtype="float32")).model
    plain = 1.0 / 10000.0 ** (np.arange(8) / 8)
    assert torch.allclose(
        model.model.rotary_emb.inv_freq, torch.from_numpy(plain / factors).float(), rtol=1e-4
    )
    odd = {"rope_freqs.weight": factors * 3}
    gguf_models.gguf_file(tmp_path / "odd.gguf", more=odd)
    assert "turns its positions by angles of its own" in refused(tmp_path / "odd.gguf")


def test_a_split_file_is_downloaded_with_all_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the Hub's cache stores it: the names are links to blobs without names."""
    gguf_models.gguf_file(tmp_path / "parts.gguf", split_max_tensors=20)
    asked = []

    def download(repo: str, name: str, revision: str | None) -> str:
        asked.append((repo, name, revision))
        blob = tmp_path / "blobs" / f"{len(asked):064x}"
        link = tmp_path / "snapshots" / ("a" * 40) / name
        for folder in (blob.parent, link.parent):
            folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / Path(name).name).rename(blob)
        link.symlink_to(blob)
        return str(link)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    name = "Q8_0/parts-00002-of-00003.gguf"
    section = ModelSection(source="owner/name", gguf_file=name, revision="b")
    loaded = load(section)
    assert loaded.model.config.num_hidden_layers == 6
    assert asked == [("owner/name", f"Q8_0/parts-0000{n}-of-00003.gguf", "b") for n in (1, 2, 3)]


def test_the_copy_of_a_killed_process_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, place = tmp_path / "small.gguf", tmp_path / "tmp"
    gguf_models.gguf_file(path)
    place.mkdir()
    code = "import sys, time; from pathlib import Path\n"
    code += "from excise.checkpoints.gguf_source import unpack_gguf\n"
    code += "copy = unpack_gguf(Path(sys.argv[1])); print(copy.folder, flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, str(path)]
    env = os.environ | {"TMPDIR": str(place)}
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            theirs = Path(other.stdout.readline().strip())
            first = unpack_gguf(path)
            assert theirs.parent == place
            assert theirs.is_dir()  # it is in use
        finally:
            other.kill()
    second = unpack_gguf(path)
    assert not theirs.exists()
    ours = {copy.folder.name for copy in (first, second)}
    assert {path.name for path in place.iterdir()} == ours | {f"{name}.lock" for name in ours}
