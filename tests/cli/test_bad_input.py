"""Every kind of bad input: one clear line that says what to do, the right exit code, nothing written."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import builders
import families
import pytest
import torch
from conftest import job, write_prompts
from safetensors.torch import load_file, save_file

from excise import run_lock
from excise.checkpoints import memory_check
from excise.cli import main as cli
from excise.methods import registry


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may break."""
    return Path(shutil.copytree(tiny / "model", tmp_path / "model"))


@pytest.fixture
def refused(tiny: Path, tmp_path: Path, capsys):
    """Run a job with changes; check that it is refused in one line, and give that line."""

    def check(*more: str, model: Path | None = None, code: int = 2) -> str:
        out = tmp_path / "out"
        arguments = job(tiny, out, *more)
        if model is not None:
            arguments[1] = str(model)
        try:
            returned = cli.main(arguments)
        except SystemExit as exit_:  # argparse leaves by itself
            returned = exit_.code
        error = capsys.readouterr().err
        assert returned == code, error
        lines = error.strip().splitlines()
        assert len(lines) == 1, error
        assert lines[0].startswith("excise: ")
        assert "Traceback" not in error
        assert not out.exists(), "something was written"
        return lines[0]

    return check


def test_unknown_config_key_names_its_neighbour(refused):
    assert "did you mean search.trials?" in refused("--set", "search.trails=3")


def test_unknown_section_and_bad_values(refused, tmp_path):
    assert "unknown configuration key serch" in refused("--set", "serch.trials=3")
    assert "search.trials" in refused("--set", "search.trials=many")
    assert "search.trials" in refused("--trials", "0")
    assert "section.key=value" in refused("--set", "search.trials")
    bad = tmp_path / "bad.toml"
    bad.write_text("[search\n")
    assert "not valid TOML" in refused("--config", str(bad))
    assert "does not exist" in refused("--config", str(tmp_path / "none.toml"))


def test_misspelt_flag(refused):
    assert "--trails" in refused("--trails", "3")


def test_unknown_behaviour(refused):
    assert "built-in" in refused("--behaviour", "politeness")


def test_missing_prompt_file(refused, tmp_path):
    assert "does not exist" in refused("--target", str(tmp_path / "none.jsonl"))


def test_empty_prompt_file(refused, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    assert "is empty" in refused("--target", str(empty))


def test_missing_column_names_those_there_are(refused, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "what?"}\n')
    line = refused("--target", str(path))
    assert "no column 'text'" in line
    assert "question" in line


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_a_prompt_file_that_is_not_what_it_says(refused, tmp_path, suffix):
    path = tmp_path / f"p{suffix}"
    path.write_bytes(b"\xff\xfe\x00broken{")
    assert str(path) in refused("--target", str(path))


def test_target_equal_to_contrast(refused, tiny):
    assert "must differ" in refused("--target", str(tiny / "contrast.jsonl"))


def test_too_few_rows_for_evaluation(refused, tmp_path):
    path = write_prompts(tmp_path, "few", 5)
    assert "--target-eval" in refused("--target", str(path))


def test_a_dataset_that_cannot_be_had(refused):
    assert "cannot be loaded" in refused("--target", "nobody/nothing")


def test_no_markers(refused, tmp_path):
    empty = tmp_path / "markers.txt"
    empty.write_text("# none\n")
    assert "no markers" in refused("--markers", str(empty))


def test_unknown_scorer_and_component(refused):
    assert "no scorer 'charm'" in refused("--set", 'scores.report=["charm"]')
    assert "no component 'attn.q'" in refused("--set", 'edit.components=["attn.q"]')


def test_no_such_model(refused, tmp_path):
    assert "neither a folder nor a Hub id" in refused(model=tmp_path / "nothing")


def test_model_id_that_cannot_be_reached(refused):
    assert "local cache" in refused(model=Path("nobody/nothing"))


def test_model_folder_without_weights(refused, model):
    (model / "model.safetensors").unlink()
    assert "no .safetensors weights" in refused(model=model)


def test_pickled_weights_only(refused, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "convert them to safetensors" in refused(model=model)


@pytest.mark.parametrize("size", [4, 1000, -200])
def test_truncated_shard(refused, model, size):
    path = model / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:size])
    assert "truncated or corrupt" in refused(model=model)


def test_corrupt_header(refused, model):
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = b"x" * 32
    path.write_bytes(bytes(data))
    assert "truncated or corrupt" in refused(model=model)


def test_index_that_names_a_missing_or_foreign_shard(refused, model):
    (model / "model.safetensors").unlink()  # it would be loaded in place of what an index names
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert "is missing" in refused(model=model)
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    assert "outside the model folder" in refused(model=model)
    index.write_text("{")
    assert "is not valid JSON" in refused(model=model)


def test_missing_tensor(refused, model):
    path = model / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert "down_proj" in refused(model=model)


def test_a_librarys_own_report_of_it_is_not_shown(refused, model):
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(2, 2)
    save_file(tensors, path, metadata={"format": "pt"})
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        assert "down_proj" in refused(model=model)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not said


def test_nan_weights(refused, model):
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    assert "NaN" in refused(model=model)


def test_unknown_architecture(refused, model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "no_such_type"}))
    assert "no_such_type" in refused(model=model)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_broken_config(refused, model, text):
    (model / "config.json").write_text(text)
    assert "config.json" in refused(model=model)


def test_remote_code_is_not_run(refused, model, tmp_path):
    marker = tmp_path / "was_run"
    (model / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (model / "config.json").write_text(json.dumps(config))
    refused(model=model)
    assert not marker.exists()


def test_chat_template_that_fails(tiny, model, tmp_path, capsys):
    (model / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    arguments = job(tiny, tmp_path / "out")
    arguments[1] = str(model)
    assert cli.main(arguments) == 2
    assert "chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    "template",
    ["{{ nobody.knows.this }}", "{% for m in messages %}{{ m", "{{ 1 // 0 }}", "{% x %}"],
)
def test_a_chat_template_given_by_hand_that_fails(refused, tmp_path, template):
    file = tmp_path / "mine.jinja"
    file.write_text(template)
    line = refused("--chat-template", str(file))
    assert "chat template mine.jinja cannot render a prompt" in line


def test_a_chat_template_that_is_not_there(refused, tmp_path):
    assert "neither a file nor" in refused("--chat-template", str(tmp_path / "none.jinja"))
    assert "no chat template in nobody/nothing" in refused("--chat-template", "nobody/nothing")


def change_json(path: Path, **changes) -> None:
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def test_a_tokenizer_without_an_end_token(refused, model):
    change_json(model / "tokenizer_config.json", eos_token=None)
    change_json(model / "generation_config.json", eos_token_id=None)
    change_json(model / "config.json", eos_token_id=None)
    assert "names an end token" in refused(model=model)


def test_a_tokenizer_without_a_padding_token_will_do(tiny, model, tmp_path):
    change_json(model / "tokenizer_config.json", pad_token=None)
    change_json(model / "config.json", pad_token_id=None)
    change_json(model / "generation_config.json", pad_token_id=None)
    arguments = job(tiny, tmp_path / "out", "--set", "export.formats=[]")
    arguments[1] = str(model)
    assert cli.main(arguments) == 0


@pytest.mark.parametrize("method", ["gptq", "awq", "aqlm", "bitsandbytes"])
def test_a_quantisation_that_cannot_be_unpacked(refused, model, method):
    change_json(model / "config.json", quantization_config={"quant_method": method, "bits": 4})
    path = model / "model.safetensors"
    codes = {"model.layers.1.mlp.down_proj.codes": torch.zeros(8, 8, dtype=torch.uint8)}
    save_file(load_file(path) | codes, path, metadata={"format": "pt"})
    line = refused(model=model)
    assert method in line
    assert "use the checkpoint that it was made from" in line


def test_a_model_too_large_for_the_memory_says_what_would_fit(refused, tiny, monkeypatch):
    whole = 2 * memory_check.sizes([tiny / "model" / "model.safetensors"]).bytes(torch.bfloat16)
    for free, fits, not_ in (
        (
            0.8 * whole,
            ["fit: --set model.dtype=bfloat16", "bnb-8bit", "bnb-4bit", "device_map=auto"],
            [],
        ),
        (0.4 * whole, ["bnb-4bit", "device_map=auto"], ["fit: --set model.dtype"]),
        (0.01 * whole, ["device_map=auto"], ["bnb"]),
    ):
        monkeypatch.setattr(memory_check, "free_memory", lambda f=free: (int(f), "here"))
        line = refused("--set", "model.dtype=float32")
        assert "float32" in line
        assert all(text in line for text in fits)
        assert not any(text in line for text in not_)


def test_output_folder_that_holds_another_run(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(job(tiny, out)) == 0
    capsys.readouterr()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert cli.main(job(tiny, out)) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("config.json", lambda d: {**d, "num_hidden_layers": 99}, "`num_hidden_layers` (99)"),
        ("config.json", lambda d: {**d, "hidden_size": "many"}, "expected int, got str"),
        ("config.json", lambda d: {**d, "num_attention_heads": 0}, "cannot be loaded"),
        ("generation_config.json", lambda _: [], "not a JSON object"),
    ],
)
def test_a_configuration_that_contradicts_itself(refused, model, file, change, words):
    path = model / file
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert words in refused(model=model)


def test_a_device_that_is_not_there(refused):
    assert "cannot be loaded" in refused("--set", "model.device_map=cuda:7")


def own_scorer(folder: Path, needs: str, returns: str) -> list[str]:
    """Flags of a run whose first objective is a user's scorer with these expressions."""
    file = folder / "mine.py"
    file.write_text(
        "from excise import Divergence, Responses, Score, scorer\n"
        f"@scorer('mine', needs=lambda _: {needs})\ndef mine(e, c):\n    return {returns}\n"
    )
    sets = (f'scores.files=["{file}"]', 'scores.objectives=["mine", "drift"]')
    return [part for one in sets for part in ("--set", one)]


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        ("3", "must be a list of Responses and Divergence"),
        ("[Responses('nobody')]", "of target or contrast"),
        ("1 / 0", "its needs raise ZeroDivisionError"),
    ],
)
def test_a_users_scorer_whose_needs_do_not_fit(refused, tmp_path, needs, words):
    assert words in refused(*own_scorer(tmp_path, needs, "Score(0.5, 1)"))


@pytest.mark.parametrize(
    ("returns", "words"),
    [
        ("0.5", "must return a Score with a number, and returned 0.5"),
        ("1 / 0", "scorer mine raises ZeroDivisionError"),
    ],
)
def test_a_users_scorer_that_fails_while_running(tiny, tmp_path, capsys, returns, words):
    out = tmp_path / "out"
    assert cli.main(job(tiny, out, *own_scorer(tmp_path, "[Responses('target')]", returns))) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert not (out / "record.json").exists()


def test_a_users_scorer_is_an_objective_or_only_reported(tiny, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from excise import Divergence, Responses, Score, scorer\n"
        "@scorer('length', needs=lambda _: [Responses('target')])\n"
        "def length(e, c):\n"
        "    rows = e.responses['target']\n"
        "    return Score(sum(len(r.tokens) for r in rows) / len(rows), len(rows))\n"
    )
    for where in ("objectives", "report"):
        names = {"objectives": ["length", "drift"], "report": ["length"]}[where]
        out = tmp_path / where
        sets = (f'scores.files=["{file}"]', f"scores.{where}={json.dumps(names)}")
        flags = [part for one in sets for part in ("--set", one)]
        assert cli.main(job(tiny, out, *flags)) == 0
        record = json.loads((out / "record.json").read_text())
        assert ("length" in record["objectives"]) == (where == "objectives")
        assert all(0 < t["scores"]["length"]["value"] <= 4 for t in record["trials"])


def test_a_folder_below_a_file(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert cli.main(job(tiny, tmp_path / "file" / "run")) == 2
    assert "file is a file" in capsys.readouterr().err


def test_a_lock_alone_is_no_run(tiny, tmp_path):
    """What a kill in the first moment leaves."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    assert cli.main(job(tiny, tmp_path / "run")) == 0


@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_finished_run_without_its_journal_is_not_begun_again(tiny, tmp_path, capsys, how):
    out = tmp_path / "run"
    assert cli.main(job(tiny, out)) == 0
    before = (out / "record.json").read_bytes()
    (out / "study.journal").unlink()
    if how == "empty":
        (out / "study.journal").touch()
    capsys.readouterr()
    assert cli.main(["resume", str(out), "--quiet"]) == 2
    assert "put the journal back" in capsys.readouterr().err
    assert (out / "record.json").read_bytes() == before


def test_a_run_of_a_model_that_has_changed_is_not_exported(tiny, tmp_path, capsys):
    place, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(tiny / "model", place)
    arguments = job(tiny, out)
    arguments[1] = str(place)
    assert cli.main(arguments) == 0
    builders.checkpoint(place, "qwen3", seed=5)
    capsys.readouterr()
    for command in (["export", str(out), "--to", str(tmp_path / "to")], ["geometry", str(out)]):
        assert cli.main([*command, "--quiet"]) == 2
        assert "has changed since the run" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("chat.jsonl", '{"text": [{"role": "user", "content": "q"}]}\n', "holds list, not text"),
        ("flag.jsonl", '{"text": true}\n', "holds bool, not text"),
        ("comma.csv", "id,text\n3,question 3, with a comma?\n", "more fields than the header"),
        ("quote.csv", 'id,text\n3,"question 3?\n4,question 4?\n', "line 3: unexpected end"),
    ],
)
def test_prompts_that_are_not_text(refused, tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    assert words in refused("--target", str(tmp_path / name))


@pytest.mark.parametrize(
    ("declared", "words"),
    [("'drift'", "is built in"), ("'mine', goal='smaller'", "minimize or maximize")],
)
def test_a_scorer_that_cannot_be_registered(refused, tmp_path, declared, words):
    file = tmp_path / "own.py"
    file.write_text(
        "from excise import scorer\n"
        f"@scorer({declared}, needs=lambda _: [])\ndef own(e, c):\n    return None\n"
    )
    assert words in refused("--set", f'scores.files=["{file}"]')


def test_a_run_folder_that_cannot_be_written(tiny, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert cli.main(job(tiny, out)) == 0

    def deny(*_args, **_kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(run_lock.FileLock, "acquire", deny)
    for command in (["geometry", str(out)], ["resume", str(out)]):
        capsys.readouterr()
        assert cli.main([*command, "--quiet"]) == 1
        assert "Read-only file system" in capsys.readouterr().err


def test_half_a_character(refused, tmp_path):
    rows = [*({"text": f"question {n}"} for n in range(30)), {"text": "half \ud800"}]
    path = tmp_path / "half.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "half.jsonl, line 31 holds half of a character" in refused("--target", str(path))


def test_more_text_than_a_model_has_positions(refused, tmp_path, tiny):
    from transformers import AutoTokenizer

    gpt2 = families.model("gpt2")
    gpt2.save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(tmp_path / "gpt2")
    most = gpt2.config.max_position_embeddings
    line = refused("--max-new-tokens", str(most), model=tmp_path / "gpt2")
    assert f"do not fit the {most} positions" in line


def test_a_run_inside_the_models_folder_is_refused(tiny, tmp_path, capsys):
    """Every export is a copy of that folder."""
    shutil.copytree(tiny / "model", tmp_path / "model")
    arguments = job(tiny, tmp_path / "model" / "run")
    arguments[1] = str(tmp_path / "model")
    assert cli.main(arguments) == 2
    assert "is inside the model's folder" in capsys.readouterr().err
    assert not (tmp_path / "model" / "run").exists()


def test_output_that_is_a_file_or_full_of_other_things(tiny, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    assert cli.main(job(tiny, file)) == 2
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert cli.main(job(tiny, folder)) == 2
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]
    assert "not empty" in capsys.readouterr().err


def test_a_journal_of_another_model(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(job(tiny, out)) == 0
    other = builders.checkpoint(tmp_path / "other", "qwen3", seed=5)
    text = (out / "config.toml").read_text()
    (out / "config.toml").write_text(text.replace(str(tiny / "model"), str(other)))
    capsys.readouterr()
    assert cli.main(["resume", str(out), "--trials", "16", "--quiet"]) == 2
    assert "model differ" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["resume", "front", "report"])
def test_a_folder_that_is_no_run(tmp_path, capsys, command):
    assert cli.main([command, str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_export_where_it_cannot(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(job(tiny, out, "--set", "export.formats=[]")) == 0
    capsys.readouterr()
    (tmp_path / "there").mkdir()
    for more, text in (
        (["--to", str(tmp_path / "there")], "exists"),
        (["--to", str(tmp_path / "new"), "--trial", "99"], "no trial 99"),
        (["--to", str(tmp_path / "new"), "--select", "best"], "cannot select by"),
        (["--to", str(tmp_path / "new"), "--select", "drift<=-1"], "no trial on the front"),
    ):
        assert cli.main(["export", str(out), *more, "--quiet"]) == 2
        assert text in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_prompts_that_changed_since_the_run(tiny, tmp_path, capsys):
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    out = tmp_path / "run"
    assert cli.main(job(folder, out, "--set", "export.formats=[]")) == 0
    write_prompts(folder, "target", 29)
    path = folder / "target.jsonl"
    path.write_text(path.read_text().replace("target", "changed"))
    capsys.readouterr()
    assert cli.main(["export", str(out), "--to", str(tmp_path / "new"), "--quiet"]) == 2
    assert "have changed since the run" in capsys.readouterr().err


def test_models_that_are_not_of_one_base(tiny, tmp_path, capsys):
    other = tmp_path / "other"
    torch.manual_seed(0)
    wide = builders.model("qwen3", hidden_size=32).to(torch.bfloat16)
    wide.save_pretrained(other)
    builders.tokenizer().save_pretrained(other)
    arguments = job(tiny, tmp_path)[4:14]
    assert cli.main(["evaluate", str(tiny / "model"), str(other), *arguments, "--quiet"]) == 2
    assert "other shapes" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["resume", "export"])
def test_a_run_of_a_version_that_captured_other_things(
    tiny, tmp_path, capsys, monkeypatch, command
):
    out, to = tmp_path / "run", tmp_path / "to"
    assert cli.main(job(tiny, out, "--method", "ridge")) == 0
    monkeypatch.setitem(registry.KINDS, "ridge", replace(registry.KINDS["ridge"], layout="later"))
    arguments = ["--trials", "20"] if command == "resume" else ["--to", str(to)]
    capsys.readouterr()
    assert cli.main([command, str(out), *arguments, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert "another version of Excise" in error
    assert "Traceback" not in error
    assert not to.exists()
