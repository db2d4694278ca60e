"""GGUF with real llama.cpp: converted, quantised, patched and adapted models give the edited tokens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf_models
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from excise.checkpoints.gguf_header import read_gguf, read_shards
from excise.config import ExportSection
from excise.errors import ConfigError, ExportError, ModelError
from excise.export.exporter import exporters
from excise.gguf import llamacpp
from excise.gguf.engine import GgufModel
from excise.gguf.export import export_gguf, export_gguf_adapter, plan_gguf, plan_gguf_adapter
from excise.gguf.ggml import check_file_type, from_float, to_float
from excise.gguf.patching import patch_gguf
from excise.model.anatomy import Writer, describe
from excise.model.edits import Edit

PROMPT = [2, 300, 401, 502, 17, 30, 77, 640]
SHAPES = ("llama", "qwen3", "gemma4", "mixtral")


@dataclass
class Case:
    """An original model on disk, in memory and as F32 GGUF, and an edit of every writer."""

    folder: Path
    model: Any
    gguf: Path
    edits: dict[str, Edit]

    @property
    def writers(self) -> tuple[Writer, ...]:
        return describe(self.model).writers


def tokens(model: Any, count: int = 16) -> tuple[int, ...]:
    out = model.generate(torch.tensor([PROMPT]), max_new_tokens=count, do_sample=False)
    return tuple(out[0, len(PROMPT) :].tolist())


def gguf_tokens(path: Path, count: int = 16, adapter: Path | None = None) -> tuple[int, ...]:
    with GgufModel(path, 64, adapter) as model:
        return model.greedy(PROMPT, frozenset(), count)


def gguf_logits(path: Path, adapter: Path | None = None) -> torch.Tensor:
    with GgufModel(path, 64, adapter) as model:
        return model.read(PROMPT, len(PROMPT))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def edited(case: Case, edits: dict[str, Edit] | None = None) -> Any:
    model = load(case.folder)
    with torch.no_grad():
        for writer in describe(model).writers:
            edit = (edits or case.edits)[writer.name]
            writer.weight.copy_(edit.apply_to_weight(writer.weight))
            if writer.bias is not None:
                writer.bias.copy_(edit.apply_to_bias(writer.bias))
    return model


def random_edits(
    writers: tuple[Writer, ...], rank: int = 1, *, scale: bool = True
) -> dict[str, Edit]:
    """An edit for every writer; a shift where the writer has a bias."""
    draw = torch.Generator().manual_seed(rank)

    def edit(writer: Writer) -> Edit:
        o, i = writer.weight.shape
        return Edit(
            left=0.3 * torch.randn(o, rank, generator=draw),
            right=0.3 * torch.randn(rank, i, generator=draw),
            scale=1 + 0.1 * torch.randn(o, generator=draw) if scale else None,
            shift=None if writer.bias is None else torch.randn(o, generator=draw),
        )

    return {writer.name: edit(writer) for writer in writers}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """One model of every shape. The Llama one is split into several files, as large ones are."""
    found = {}
    tools = llamacpp.find_tools(None, ["Q8_0"])
    for family in SHAPES:
        root = tmp_path_factory.mktemp(family)
        folder = gguf_models.checkpoint(root / "model", family, **gguf_models.WIDE)
        plain, target = llamacpp.plain_copy(folder, root / "plain"), root / "base-F32.gguf"
        if family == "llama":
            command = [sys.executable, str(tools.converter), str(plain), "--outtype", "f32"]
            command += ["--outfile", str(target), "--split-max-tensors", "9"]
            subprocess.run(command, check=True, capture_output=True)
            target = sorted(root.glob("base-F32-00001-of-*.gguf"))[0]
        else:
            llamacpp.convert(tools, plain, target, "F32", "Base")
        model = load(folder)
        edits = random_edits(describe(model).writers, rank=3)
        found[family] = Case(folder, model, target, edits)
    return found


def test_converted_models_give_the_tokens_of_transformers(cases: dict[str, Case]) -> None:
    for case in cases.values():
        assert gguf_tokens(case.gguf) == tokens(case.model)
        keys = read_gguf(case.gguf).keys
        assert "<|turn>" in keys["tokenizer.chat_template"]
        assert keys["general.sampling.top_k"] == 40
        assert keys["general.sampling.temp"] == pytest.approx(0.7)


def test_an_edited_model_is_converted_and_quantised(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["gemma4"]
    section = ExportSection(quantize=("F32", "F16", "q8_0", "Q4_K_M"))
    plan = plan_gguf(section)
    out = tmp_path / "out"
    done = export_gguf(case.folder, out, case.edits, case.writers, plan, "Tiny-edited")
    assert [f["type"] for f in done.details["files"]] == ["F16", "F32", "Q4_K_M", "Q8_0"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    expected = tokens(edited(case))
    assert expected != tokens(case.model)
    for kind in ("F32", "F16"):
        assert gguf_tokens(out / f"Tiny-edited-{kind}.gguf") == expected
    kinds = {t.type.name for t in read_gguf(out / "Tiny-edited-Q4_K_M.gguf").tensors.values()}
    assert {"Q4_K", "Q6_K"} <= kinds
    reference = edited(case)(torch.tensor([PROMPT])).logits[0]
    for kind, most in (("Q8_0", 0.1), ("Q4_K_M", 0.6)):
        error = gguf_logits(out / f"Tiny-edited-{kind}.gguf") - reference
        assert error.norm() < most * reference.norm()


def test_a_multimodal_model_gets_its_projector_and_is_patched_too(tmp_path: Path) -> None:
    folder = gguf_models.multimodal(tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    case = Case(folder, loaded, tmp_path / "out" / "mm-F32.gguf", {})
    case.edits = random_edits(case.writers)
    plan = plan_gguf(ExportSection(quantize=("F32",)))
    done = export_gguf(folder, tmp_path / "out", case.edits, case.writers, plan, "mm")
    parts = [(f["file"], f["part"]) for f in done.details["files"]]
    assert parts == [("mm-F32.gguf", "model"), ("mmproj-mm-F32.gguf", "projector")]
    assert read_gguf(tmp_path / "out" / "mmproj-mm-F32.gguf").architecture == "clip"
    with torch.no_grad():
        for writer in case.writers:
            writer.weight.copy_(case.edits[writer.name].apply_to_weight(writer.weight))
    assert gguf_tokens(case.gguf) == tokens(loaded)
    # The file of the edited model is, to the patch, one of this model like any other.
    patched = patch_gguf(case.gguf, tmp_path / "again", case.edits, case.writers, loaded)
    assert len(patched.tensors) == len(case.writers)


@pytest.mark.parametrize("family", SHAPES)
def test_a_patched_file_is_the_edited_model_and_else_the_base(
    cases: dict[str, Case], tmp_path: Path, family: str
) -> None:
    case = cases[family]
    shards = read_shards(case.gguf)
    done = patch_gguf(case.gguf, tmp_path / "out", case.edits, case.writers, case.model)
    assert len(done.files) == len(shards) > (2 if family == "llama" else 0)
    assert gguf_tokens(done.files[0]) == tokens(edited(case))
    changed = set()
    for before, path in zip(shards, done.files, strict=True):
        after = read_gguf(path)
        assert after.tensors == before.tensors
        old, new = before.path.read_bytes(), path.read_bytes()
        first = min(t.start for t in before.tensors.values())
        assert old[:first] == new[:first]
        spans = before.tensors.values()
        changed |= {t.name for t in spans if old[t.start : t.stop] != new[t.start : t.stop]}
    assert changed == set(done.tensors)
    places = {(w.component, w.layer) for w in case.writers}  # all experts of a layer are one tensor
    parts = 1 if family != "llama" else 2  # its biases are edited too
    assert len(changed) == parts * len(places)


@pytest.mark.parametrize(("family", "kind"), [("qwen3", "F16"), ("gemma4", "BF16"),
                                              ("qwen3", "Q8_0"), ("gemma4", "Q4_K_M"),
                                              ("mixtral", "Q4_K_M"), ("qwen3", "Q4_0")])  # fmt: skip
def test_patching_and_quantising_commute(
    cases: dict[str, Case], tmp_path: Path, family: str, kind: str
) -> None:
    """Quantised and patched, a file is byte for byte the one that was patched and quantised."""
    case = cases[family]
    tools = llamacpp.find_tools(None, [kind, "Q8_0"])
    llamacpp.quantise(tools, case.gguf, tmp_path / "small.gguf", kind)
    patched = patch_gguf(
        tmp_path / "small.gguf", tmp_path / "a", case.edits, case.writers, case.model
    )
    other = patch_gguf(case.gguf, tmp_path / "b", case.edits, case.writers, case.model)
    llamacpp.quantise(tools, other.files[0], tmp_path / "expected.gguf", kind)
    assert patched.files[0].read_bytes() == (tmp_path / "expected.gguf").read_bytes()
    if kind == "F16":
        assert gguf_tokens(patched.files[0]) == tokens(edited(case))


def test_without_the_source_the_files_own_values_are_edited(
    cases: dict[str, Case], tmp_path: Path
) -> None:
    case = cases["qwen3"]
    tools = llamacpp.find_tools(None, ["Q8_0"])
    llamacpp.quantise(tools, case.gguf, tmp_path / "small.gguf", "Q8_0")
    model = load(case.folder)
    writers = describe(model).writers
    writers[0].module.to("meta")
    done = patch_gguf(tmp_path / "small.gguf", tmp_path / "out", case.edits, writers, model)
    base, file = read_gguf(tmp_path / "small.gguf"), read_gguf(done.files[0])
    old, new = (_values(one, "blk.0.attn_output.weight") for one in (base, file))
    expected = case.edits[writers[0].name].apply_to_weight(torch.from_numpy(old)).numpy()
    kind = file.tensors["blk.0.attn_output.weight"].type
    np.testing.assert_array_equal(new, to_float(from_float(expected, kind), kind))


def _values(file: Any, name: str) -> Any:
    tensor = file.tensors[name]
    raw = np.frombuffer(file.path.read_bytes()[tensor.start : tensor.stop], dtype=np.uint8)
    return to_float(raw.reshape(tensor.shape[0], -1), tensor.type)


@pytest.mark.parametrize("family", ["qwen3", "gemma4"])
def test_an_adapter_on_the_base_is_the_edited_model(
    cases: dict[str, Case], tmp_path: Path, family: str
) -> None:
    case = cases[family]
    arch = {"qwen3": "qwen3", "gemma4": "gemma4"}[family]
    edits = random_edits(case.writers, rank=2, scale=False)
    done = export_gguf_adapter(
        tmp_path / "out", edits, case.writers, architecture=arch, layers=2, rank=2, name="tiny"
    )
    assert done.details["error"] < 1e-5
    expected = edited(case, edits)(torch.tensor([PROMPT])).logits[0]
    found = gguf_logits(case.gguf, tmp_path / "out" / "tiny-LoRA-F32.gguf")
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert (gguf_logits(case.gguf) - expected).norm() > 0.1 * expected.norm()


# -- bad input: one clear line each, nothing half-written -----------------------------------------


def refused(case: Case, base: Path, tmp_path: Path, model: Any = None) -> str:
    model = model or case.model
    with pytest.raises((ModelError, ExportError)) as error:
        patch_gguf(base, tmp_path / "out", case.edits, describe(model).writers, model)
    assert not (tmp_path / "out").exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_truncated_file_is_refused(cases: dict[str, Case], tmp_path: Path) -> None:
    case, path = cases["qwen3"], tmp_path / "cut.gguf"
    whole = case.gguf.read_bytes()
    for size in (6, 40, 5000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "truncated or corrupt" in refused(case, path, tmp_path)
    path.write_bytes(b"PK" + whole[2:])
    assert "not a GGUF" in refused(case, path, tmp_path)
    assert "does not exist" in refused(case, tmp_path / "none.gguf", tmp_path)


def test_a_missing_part_is_named(cases: dict[str, Case], tmp_path: Path) -> None:
    first = cases["llama"].gguf
    shutil.copy(first, tmp_path)
    assert "00002-of" in refused(cases["llama"], tmp_path / first.name, tmp_path)


def test_another_models_file_is_refused(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["qwen3"]
    assert "not a GGUF of this model" in refused(case, cases["gemma4"].gguf, tmp_path)
    other = load(case.folder)
    other.model.layers[0].mlp.down_proj.weight.data.roll(1, 0)
    other.model.layers[0].mlp.down_proj.weight.data += 0.05
    assert "of another model" in refused(case, case.gguf, tmp_path, other)
    other = load(case.folder)
    other.model.norm.weight.data *= 1.5
    assert "output_norm" in refused(case, case.gguf, tmp_path, other)
    wide = gguf_models.checkpoint(
        tmp_path / "wide", "qwen3", **gguf_models.WIDE | {"hidden_size": 512}
    )
    text = refused(case, case.gguf, tmp_path, load(wide))
    assert "shape" in text


def test_an_unknown_type_is_refused() -> None:
    assert check_file_type("q4_k_m") == "Q4_K_M"
    with pytest.raises(ConfigError, match="did you mean Q4_K_M"):
        check_file_type("Q4_KM")
    with pytest.raises(ConfigError, match="importance matrix"):
        check_file_type("IQ2_XXS")


def test_a_missing_converter_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"holds no convert_hf_to_gguf"):
        plan_gguf(ExportSection(llama_cpp=str(tmp_path)))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(llamacpp, "_installed_sources", list)
    with pytest.raises(ConfigError, match="was not found: get https"):
        plan_gguf(ExportSection())
    assert plan_gguf_adapter(ExportSection()).tools is None


def test_a_missing_quantiser_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(llamacpp.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "convert_hf_to_gguf.py").write_text("")
    with pytest.raises(ConfigError, match=r"Q8_0 needs llama.cpp's quantiser"):
        llamacpp.find_tools(tmp_path, ["Q8_0"])
    assert llamacpp.find_tools(tmp_path, ["F16"]).quantizer is None
    program = tmp_path / "build" / "bin" / "llama-quantize"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert llamacpp.find_tools(tmp_path, ["Q8_0"]).quantizer == (str(program),)


def test_options_that_do_not_go_together_are_refused(cases: dict[str, Case]) -> None:
    path = str(cases["qwen3"].gguf)
    with pytest.raises(ConfigError, match="keeps the file's own types"):
        plan_gguf(ExportSection(from_gguf=path, quantize=("Q8_0",)))
    section = ExportSection(quantize=("Q8_0",))
    flags = "--quantize, --from-gguf and --llama-cpp"
    with pytest.raises(ConfigError, match=f"^{flags} are for --format gguf: add it$"):
        exporters(section, ["safetensors"])
    with pytest.raises(ConfigError, match=r"^--quantize is for --format gguf: add it$"):
        exporters(section, ["safetensors", "gguf-adapter"])


def test_what_a_type_cannot_hold_is_said_and_leaves_nothing(
    cases: dict[str, Case], tmp_path: Path
) -> None:
    case = cases["qwen3"]
    tools = llamacpp.find_tools(None, ["Q8_0"])
    llamacpp.quantise(tools, case.gguf, tmp_path / "half.gguf", "F16")
    writer = case.writers[0]
    o, i = writer.weight.shape
    huge = {writer.name: Edit(torch.full((o, 1), 1e6), torch.ones(1, i))}
    with pytest.raises(ExportError, match="holds values that F16 cannot"):
        patch_gguf(tmp_path / "half.gguf", tmp_path / "out", huge, case.writers, case.model)
    assert [p.name for p in tmp_path.iterdir()] == ["half.gguf"]


def test_a_failing_tool_leaves_nothing(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["qwen3"]
    source = tmp_path / "source"
    shutil.copytree(case.folder, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps(config | {"architectures": ["NobodyForCausalLM"]})
    )
    plan = plan_gguf(ExportSection(quantize=("F32",)))
    with pytest.raises(ExportError, match=r"llama.cpp's converter failed .*Nobody"):
        export_gguf(source, tmp_path / "out", case.edits, case.writers, plan, "x")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_model_that_llama_cpp_cannot_run_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ExportError, match=r"llama.cpp cannot run") as error:
        GgufModel(tmp_path / "x.gguf", 8)
    assert "\n" not in str(error.value)


def test_what_the_converter_reads_holds_no_code(cases: dict[str, Case], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(cases["qwen3"].folder, source)
    (source / "modeling.py").write_text("raise SystemExit(3)")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "x--y.Z"}}))
    plain = llamacpp.plain_copy(source, tmp_path / "plain")
    assert not list(plain.glob("*.py"))
    assert json.loads((plain / "config.json").read_text()) == config
