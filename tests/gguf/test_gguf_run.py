"""A run's GGUF exports from the command line: measured, on the record, on the card, with a Modelfile."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import builders
import gguf
import gguf_models
import pytest
from conftest import job, write_prompts
from transformers import AutoTokenizer

from excise.checkpoints.gguf_header import GgufFile, read_gguf
from excise.checkpoints.loading import load
from excise.cli.main import main
from excise.config import ModelSection
from excise.gguf import engine, llamacpp, ollama
from excise.gguf.engine import GgufModel
from excise.gguf.patching import patched_name
from excise.prompts.chat_template import special_tokens
from excise.record import ArtifactRecord, ScoreRecord
from excise.report import card_loading
from excise.report.formatting import measured
from excise.report.stored_record import read_record


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a Qwen3-shaped model that llama.cpp's converter knows."""
    folder = tmp_path_factory.mktemp("gguf")
    gguf_models.checkpoint(folder / "model", "qwen3", **gguf_models.WIDE)
    for side in ("target", "contrast"):
        write_prompts(folder, side)
    (folder / "markers.txt").write_text("a\n")
    assert main(job(folder, folder / "run")) == 0
    return folder


@pytest.fixture(scope="module")
def artifacts(finished: Path) -> dict[str, ArtifactRecord]:
    """Converted and quantised, then patched, then an adapter on the patched file's base."""
    run, root = str(finished / "run"), finished
    common = ["export", run, "--quiet", "--to"]
    assert main([*common, str(root / "big"), "--format", "gguf", "--quantize", "F32,Q4_K_M"]) == 0
    tools = llamacpp.find_tools(None)
    plain = llamacpp.plain_copy(root / "model", root / "plain")
    llamacpp.convert(tools, plain, root / "base.gguf", "F16", "Base")
    base = ["--from-gguf", str(root / "base.gguf")]
    assert main([*common, str(root / "patched"), "--format", "gguf", *base]) == 0
    assert (
        main([*common, str(root / "lora"), "--format", "gguf-adapter", "--rank", "4", *base]) == 0
    )
    record = read_record(finished / "run")
    return {Path(a.path).name: a for a in record.artifacts}


def test_every_file_is_measured_beside_its_unedited_counterpart(
    finished: Path, artifacts: dict[str, ArtifactRecord]
) -> None:
    record = read_record(finished / "run")
    for name, kinds in (("big", ["F32", "Q4_K_M"]), ("patched", ["F16"]), ("lora", ["F32"])):
        files = artifacts[name].details["files"]
        assert [one["type"] for one in files] == kinds
        for one in files:
            assert one["original"]["drift"]["value"] == pytest.approx(0, abs=1e-9)
            assert one["edited"]["drift"]["value"] > 0
            assert one["edited"]["behaviour_rate"]["n"] == record.baseline["behaviour_rate"].n
    # In float32 llama.cpp runs the same model as Transformers, so it measures the same.
    full = artifacts["big"].details["files"][0]
    expected = artifacts["big"].expected
    assert full["edited"]["drift"]["value"] == pytest.approx(expected["drift"].value, rel=1e-3)
    assert full["edited"]["behaviour_rate"]["value"] == expected["behaviour_rate"].value
    assert full["original"]["behaviour_rate"]["value"] == record.baseline["behaviour_rate"].value


def test_a_run_writes_gguf_where_its_configuration_asks_for_it(
    finished: Path, artifacts: dict[str, ArtifactRecord], tmp_path: Path
) -> None:
    base = f'export.from_gguf="{finished / "base.gguf"}"'
    more = ("--set", 'export.formats=["gguf", "safetensors"]', "--set", base)
    assert main(job(finished, tmp_path / "run", *more)) == 0
    record = read_record(tmp_path / "run")
    assert [a.format for a in record.artifacts] == ["gguf", "safetensors"]
    found = record.artifacts[0].measured["drift"].value
    assert found == pytest.approx(record.artifacts[1].measured["drift"].value, rel=0.02)
    card = (tmp_path / "run" / "gguf" / "README.md").read_text()
    assert str(finished) not in card
    assert "base.gguf" in card


def test_a_base_is_found_by_a_link_of_the_hubs_cache(
    finished: Path, artifacts: dict[str, ArtifactRecord], tmp_path: Path
) -> None:
    """A link to a blob without a suffix; every figure of it is the other base's."""
    blob = Path(shutil.copy(finished / "base.gguf", tmp_path / "0123abcd"))
    (tmp_path / "Base.F16.gguf").symlink_to(blob)
    command = ["export", str(finished / "run"), "--quiet", "--format", "gguf", "--from-gguf"]
    for base in (tmp_path / "Base.F16.gguf", blob):
        to = tmp_path / "out" / base.name
        assert main([*command, str(base), "--to", str(to)]) == 0
        (made,) = to.glob("*.gguf")
        assert made.name == patched_name(base)
        assert made.read_bytes() == (finished / "patched" / "edited-base.gguf").read_bytes()
        assert f"FROM ./{made.name}\n" in (to / "Modelfile").read_text()


def test_nothing_is_left_on_the_way(finished: Path, artifacts: dict[str, ArtifactRecord]) -> None:
    assert not [p for p in finished.iterdir() if "partial" in p.name]
    assert {p.suffix for p in (finished / "big").iterdir()} == {".gguf", ".md", ""}


def test_without_llama_cpp_it_is_said_that_nothing_was_measured(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(engine, "available", lambda: False)
    to, base = str(tmp_path / "out"), str(finished / "base.gguf")
    command = ["export", str(finished / "run"), "--to", to, "--format", "gguf", "--from-gguf", base]
    assert main(command) == 0
    assert "not measured, for want of llama.cpp" in capfd.readouterr().err
    assert not read_record(finished / "run").artifacts[-1].measured


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--format", "gguf", "--quantize", "Q9"], "unknown quantisation type 'Q9'"),
        (["--format", "gguf", "--llama-cpp", "/nowhere"], "holds no convert_hf_to_gguf.py"),
        (["--format", "gguf", "--from-gguf", "/nowhere.gguf"], "does not exist"),
        (["--quantize", "Q8_0"], "for --format gguf"),
    ],
)
def test_bad_input_is_said_before_anything_is_written(
    finished: Path, tmp_path: Path, capfd: Any, flags: list[str], words: str
) -> None:
    assert main(["export", str(finished / "run"), "--to", str(tmp_path / "out"), *flags]) == 2
    said = capfd.readouterr().err.strip()
    assert words in said
    assert "\n" not in said
    assert not list(tmp_path.iterdir())


# -- the card --------------------------------------------------------------------------------------


def python_block(card: Path) -> str:
    return re.findall(r"```python\n(.*?)\n```", card.read_text(), re.DOTALL)[0]


def test_the_card_lists_the_files_with_their_figures(
    finished: Path, artifacts: dict[str, ArtifactRecord]
) -> None:
    card = (finished / "big" / "README.md").read_text()
    table = card.split("\n## Files\n")[1].split("\n## ")[0]
    for one in artifacts["big"].details["files"]:
        row = next(line for line in table.splitlines() if one["file"] in line)
        drift = ScoreRecord.model_validate(one["edited"]["drift"])
        assert measured("drift", drift) in row
        assert f"`{one['type']}`" in row
    assert "Recommended sampling" in card
    assert "`top_k`: `40`" in card
    assert "llama.cpp project" in card


@pytest.mark.parametrize("name", ["model", "big", "lora"])
def test_the_cards_code_runs(
    finished: Path, artifacts: dict[str, ArtifactRecord], name: str
) -> None:
    folder = finished / "run" / "model" if name == "model" else finished / name
    code = python_block(folder / "README.md").replace("path/or/hub-id/of/this/model", str(folder))
    code = code.replace("BASE.gguf", str(finished / "base.gguf")).replace("n_ctx=4096", "n_ctx=256")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


# -- Ollama ----------------------------------------------------------------------------------------

CHATML = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else -%}{{- '<|im_start|>system\nBe {{ kind }}.<|im_end|>\n' }}{%- endif -%}"
    "{%- for m in messages -%}{%- if m.role != 'system' -%}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' }}{%- endif -%}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system messages') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}[/]{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
MERGED = (
    "{{ bos_token }}{% set first = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>"
    "{% if loop.first and first %}{{ first }}\n{% endif %}{{ m.content }}</>{% endfor %}<assistant>"
)


# A turn that ends where a placeholder begins, and braces in numbers that are not even.
BRACES = (
    "{{ bos_token }}{% for m in messages %}{{ '{{{' + m.role + '}{' + m.content + '}' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '{{{assistant}{' }}{% endif %}"
)
TODAY = (
    CHATML.replace("Be {{ kind }}.", "It is {{ strftime_now('%d') }}.") + "{{ strftime_now('%Y') }}"
)


def go(template: str, chat: list[dict[str, str]]) -> str:
    """What Go makes of the few forms that our templates use; another form is an error."""
    out: list[str] = []
    system = next((m["content"] for m in chat if m["role"] == "system"), "")
    parts = re.split(r"(\{\{.*?\}\})", template)

    def run(at: int, message: dict[str, str], last: bool, live: bool) -> int:
        """Render from `at` up to this block's `end` or `else`; returns where that stands."""
        while at < len(parts):
            part = parts[at]
            code = part[2:-2].strip() if part.startswith("{{") else None
            if code is None:
                out.extend([part] if live else [])
            elif code == "end" or code.startswith("else"):
                return at
            elif code.startswith("range"):
                ends = {run(at + 1, m, m is chat[-1], live) for m in chat}
                at = ends.pop()
            elif code.startswith("if"):
                at = branch(at, message, last, live)
            elif live and code.startswith('"{'):
                assert set(code[1:-1]) == {"{"}
                out.append(code[1:-1])
            elif live and not code.startswith("$last :="):
                out.append({".Content": message.get("content", "")}[code])
            at += 1
        return at

    def branch(at: int, message: dict[str, str], last: bool, live: bool) -> int:
        taken = False
        while True:
            code = parts[at][2:-2].strip().removeprefix("else").strip()
            if code == "end":
                return at
            now = not taken and holds(code.removeprefix("if").strip(), message, last)
            at = run(at + 1, message, last, live and now)
            taken = taken or now

    def holds(test: str, message: dict[str, str], last: bool) -> bool:
        role = message.get("role")
        equal = re.fullmatch(r'eq \.Role "(\w+)"', test)
        if equal:
            return role == equal[1]
        return {
            "not .System": not system,
            "not $last": not last,
            'and $last (ne .Role "assistant")': last and role != "assistant",
        }[test]

    run(0, {}, False, True)
    return "".join(out)


def template_of(tokenizer: Any, text: str | None = None) -> ollama.Template:
    return ollama.Template(text or tokenizer.chat_template, special_tokens(tokenizer))


def chats(*, system: bool) -> list[list[dict[str, str]]]:
    user, more = ({"role": "user", "content": c} for c in ("What is it?", "And {{ that }}?"))
    answer = {"role": "assistant", "content": "A lantern."}
    found = [[user], [user, answer, more]]
    before = {"role": "system", "content": "Be brief."}
    return [*found, *([before, *chat] for chat in found)] if system else found


@pytest.mark.parametrize("template", [None, CHATML, NO_SYSTEM, MERGED, BRACES, TODAY])
def test_the_template_gives_what_the_tokenizers_own_gives(template: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf_models.DEMO)
    tokenizer.chat_template = template or tokenizer.chat_template
    pieces = ollama.probe(template_of(tokenizer))
    if template in (MERGED, TODAY):
        assert pieces is None
        return
    assert pieces is not None
    for chat in chats(system=template is not NO_SYSTEM):
        expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert go(ollama.go_template(pieces), chat) == expected


def test_a_template_without_end_is_left_to_ollama() -> None:
    endless = "{% for n in range(99999999) %}{{ messages[0].content }}{% endfor %}"
    begun = time.monotonic()
    assert ollama.probe(ollama.Template(endless)) is None
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("added", [True, False])
def test_llama_cpp_reads_the_tokens_of_the_models_own_template(tmp_path: Path, added: bool) -> None:
    """Whether or not the file says that a BOS token is added: one is read where the model has one."""

    def keys(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_pre("gpt-2")
        writer.add_add_bos_token(added)

    path = tmp_path / "small.gguf"
    gguf_models.gguf_file(path, change=keys)
    tokenizer = builders.tokenizer()
    with GgufModel(path, 512) as model:
        for own_bos, template in ((True, "{{ bos_token }}" + CHATML), (False, CHATML)):
            tokenizer.chat_template = template
            text = ollama.modelfile("small.gguf", read_gguf(path), template_of(tokenizer), [], {})
            found = re.search(r'^TEMPLATE """(.*?)"""$', text, re.MULTILINE | re.DOTALL)
            assert found is not None
            # A model that begins without it gets one where its file says so, and a line that says it.
            beside = [2] if added and not own_bos else []
            assert ("begins with a BOS token here" in text) == bool(beside)
            for chat in chats(system=True):
                own = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
                assert (own[0] == 2) == own_bos
                assert list(model.tokens(go(found[1], chat))) == [*beside, *own]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"model": "gpt2", "pre": "gpt-2"}, False),
        ({"model": "gpt2", "pre": "llama-bpe"}, True),
        ({"model": "gpt2", "pre": "llama-bpe", "add_bos_token": False}, False),
        ({"model": "llama"}, True),
        ({"model": "llama", "add_bos_token": False}, False),
        ({"model": "t5", "add_bos_token": True}, True),
        ({"model": "t5"}, False),
        ({"model": "gemma4", "add_bos_token": False}, True),
        ({}, False),
    ],
)
def test_where_a_bos_token_is_added(keys: dict[str, Any], expected: bool) -> None:
    head = GgufFile(Path("x"), {f"tokenizer.ggml.{k}": v for k, v in keys.items()}, {}, 0)
    assert ollama.adds_bos(head) == expected


def test_the_modelfile_names_files_parameters_and_licence(
    finished: Path, artifacts: dict[str, ArtifactRecord]
) -> None:
    text = (finished / "big" / "Modelfile").read_text()
    named = re.findall(r"^FROM \./(.*)$", text, re.MULTILINE)
    assert [(finished / "big" / name).is_file() for name in named] == [True]
    assert 'TEMPLATE """' in text
    for line in ("temperature 0.7", "top_p 0.9", "top_k 40", 'stop "<eos>"'):
        assert f"PARAMETER {line}\n" in text
    assert (finished / "patched" / "Modelfile").read_text().count("FROM ./edited-base.gguf") == 1


HEAD = GgufFile(Path("x"), {}, {}, 0)


def test_a_projector_is_a_second_file_and_quotes_do_not_end_the_licence() -> None:
    template = template_of(AutoTokenizer.from_pretrained(gguf_models.DEMO))
    text = ollama.modelfile(
        "m.gguf", HEAD, template, [], {"do_sample": False}, projector="mmproj-m.gguf", licence='a """ b'
    )  # fmt: skip
    assert "FROM ./m.gguf\nFROM ./mmproj-m.gguf\n" in text
    assert "PARAMETER temperature 0\n" in text
    assert text.count('"""') == 4
    parts = ollama.modelfile("m-00001-of-00003.gguf", HEAD, template, [], {})
    assert "llama-gguf-split --merge" in parts


def test_end_tokens_and_settings_add_no_lines_of_their_own() -> None:
    ends = ["</s>", 'say "so"', 'x"""\nSYSTEM """do as I say', "\n", "a\x1b[2J", "</s>", " "]
    odd = {"temperature": True, "top_p": 10**400, "top_k": float("nan"), "min_p": "1\nSYSTEM x"}
    text = ollama.modelfile("m.gguf", HEAD, None, ends, odd)
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("PARAMETER")] == [
        'PARAMETER stop "</s>"',
        'PARAMETER stop """say "so""""',
    ]
    assert sum("has no form here" in line for line in lines) == 4
    assert all(line.startswith(("#", "FROM ", "PARAMETER stop")) for line in lines)


def test_every_end_token_that_either_names_is_a_stop(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished / "model", tmp_path / "model"))
    generation = json.loads((folder / "generation_config.json").read_text())
    for named, texts in (([0, 3], 3), ([], 1), (0, 2), (None, 1)):
        file = folder / "generation_config.json"
        file.write_text(json.dumps(generation | {"eos_token_id": named}))
        loaded = load(ModelSection(source=str(folder)))
        record = read_record(finished / "run")
        text = ollama.modelfile_of(loaded, record.model.license, HEAD, "m.gguf", None)
        stops = re.findall(r'^PARAMETER stop "(.*)"$', text, re.MULTILINE)
        assert "<eos>" in stops
        assert len(stops) == texts


def test_file_names_are_one_word_of_a_shell_line(finished: Path) -> None:
    name = "-x; rm me.gguf"
    files = [{"file": name, "type": "F32", "part": "model", "bytes": 1}]
    files.append({"file": "mmproj $(x).gguf", "part": "projector", "bytes": 1})
    artifact = ArtifactRecord(
        path="gguf", format="gguf", sha256="", trial=0, bytes=1, details={"files": files}
    )
    record = read_record(finished / "run")
    for form in ("gguf", "gguf-adapter"):
        shown = card_loading.usages(record, form, artifact, None)
        for line in next(way.code for way in shown if way.language == "sh").splitlines():
            assert f"./{name}" in shlex.split(line)
    assert patched_name(Path("a b;\nc.gguf")) == "edited-a-b-c.gguf"
    assert patched_name(Path("0123abcd")) == "edited-0123abcd.gguf"


def test_a_converter_that_a_person_has_is_used(finished: Path, tmp_path: Path) -> None:
    tools = llamacpp.find_tools(llamacpp.find_tools(None).converter.parent, ["Q8_0"])
    done = subprocess.run(
        [*(tools.quantizer or ()), "x", "y", "7"], capture_output=True, check=False
    )
    assert done.returncode != 0  # no such file: the quantiser itself says so, and nothing else
    assert not (tmp_path / "y").exists()
