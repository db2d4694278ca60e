"""What is damaged: small models, prompts, settings and runs, made once, and what is true of them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

WORDS = "velm tarn orb kettle lantern where who what colour made kept by".split()
SIDES = ("target", "contrast")
METHODS = ("ridge", "directional")
DIRECTION, EVAL, ROWS = 6, 6, 16
NEW_TOKENS, TRIALS = 4, 6
CARD = """---
license: apache-2.0
language: [en]
tags: [small, made-up]
---

# A small model

Made up.
"""
_STEADY = {
    "datetime_start": "2026-01-01T00:00:00+00:00",
    "datetime_complete": "2026-01-01T00:00:01+00:00",
}


@dataclass(frozen=True)
class Setup:
    """What a run is given. Its texts are read by the judge for itself."""

    model: Path
    prompts: dict[str, Path]
    markers: Path
    template: Path | None = None
    more: tuple[str, ...] = ()
    trials: int = TRIALS
    expected: dict[str, Any] = field(
        default_factory=dict
    )  # dotted keys of the record's configuration

    def flags(self) -> list[str]:
        """The flags that every command with a job takes."""
        flags = [f for side in SIDES for f in (f"--{side}", str(self.prompts[side]))]
        flags += ["--markers", str(self.markers), "--max-new-tokens", str(NEW_TOKENS)]
        flags += ["--direction-size", str(DIRECTION), "--eval-size", str(EVAL)]
        flags += ["--set", 'prompts.response_prefix=""', "--set", "engine.rows=64", "--quiet"]
        if self.template is not None:
            flags += ["--chat-template", str(self.template)]
        return [*flags, *self.more]

    def run(self, out: Path) -> list[str]:
        """The arguments of `excise run`."""
        search = ["--trials", str(self.trials), "--startup-trials", "3", "--set", "search.batch=3"]
        return ["run", str(self.model), "--out", str(out), *search, *anyway("run"), *self.flags()]

    def evaluate(self, edited: Path) -> list[str]:
        """The arguments of `excise evaluate`."""
        command = ["evaluate", str(self.model), str(edited), "--json"]
        return [*command, *anyway("evaluate"), *self.flags()]


def anyway(command: str) -> list[str]:
    """The flag that goes on where the original hardly shows the behaviour, as random models do not."""
    from excise.cli.main import build_parser

    group = build_parser()._subparsers
    assert group is not None
    choices: Any = group._group_actions[0].choices
    return ["--anyway"] if "--anyway" in choices[command]._option_string_actions else []


@dataclass(frozen=True)
class Ground:
    """The folder with all of it."""

    folder: Path

    @property
    def setup(self) -> Setup:
        """An undamaged job."""
        prompts = {side: self.folder / f"{side}.jsonl" for side in SIDES}
        return Setup(self.folder / "model", prompts, self.folder / "markers.txt")

    def run(self, method: str) -> Path:
        """A finished run of a method."""
        return self.folder / f"run-{method}"

    def truth(self, method: str) -> dict[str, Any]:
        """What is true of that run: its record, hashes of each trial's weights, its geometry."""
        found = json.loads((self.folder / f"truth-{method}.json").read_text(encoding="utf-8"))
        assert isinstance(found, dict)
        return found


def build(folder: Path) -> Ground:
    """Write all of it; the same on every machine, but for how long things took."""
    from excise.cli.main import main

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ground = Ground(folder)
    _write_models(folder)
    _write_texts(folder)
    for method in METHODS:
        _write_run(ground, method, main)
    return ground


def _write_texts(folder: Path) -> None:
    from pyarrow import parquet, table

    for side in SIDES:
        draw = Random(side)
        texts = [f"{side} {' '.join(draw.choices(WORDS, k=6))} {i}" for i in range(ROWS)]
        lines = "".join(
            json.dumps({"text": t, "group": f"g{i % 2}"}) + "\n" for i, t in enumerate(texts)
        )
        (folder / f"{side}.jsonl").write_text(lines)
        (folder / f"{side}.txt").write_text("".join(f"{text}\n" for text in texts))
        rows = "".join(f'{i},"{text}"\n' for i, text in enumerate(texts))
        (folder / f"{side}.csv").write_text(f"number,text\n{rows}")
        parquet.write_table(
            table({"text": texts, "number": range(ROWS)}), folder / f"{side}.parquet"
        )
    (folder / "markers.txt").write_text("# letters stand in for phrases\no\np\n")
    settings = {
        "description": "made up",
        "search": {"select": "knee"},
        "directions": {"projected": True},
    }
    settings |= {"edit": {"row_norms": "full"}, "scores": {"show": ["target"]}}
    (folder / "settings.toml").write_text(
        "".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items() if isinstance(v, str))
        + "".join(
            f"[{k}]\n" + "".join(f"{name} = {json.dumps(one)}\n" for name, one in v.items())
            for k, v in settings.items()
            if isinstance(v, dict)
        )
    )


def _write_models(folder: Path) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    # Transformers takes 128 for the head of any Qwen3 in a GGUF.
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, **special, tie_word_embeddings=True))
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.rand_like(parameter) + 0.5)
        else:
            parameter.mul_(3)
        parameter.copy_(parameter.bfloat16())  # so that a GGUF loses nothing of it
    tokenizer = _tokenizer()
    for name, shard in (("model", "1GB"), ("sharded", "150KB")):
        model.save_pretrained(folder / name, max_shard_size=shard)
        tokenizer.save_pretrained(folder / name)
        (folder / name / "README.md").write_text(CARD)
    _write_gguf(folder / "model.gguf", model, tokenizer)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    inner.train_from_iterator([" ".join(WORDS)], trainer)
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    out = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    out.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return out


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """A parameter's name in a GGUF."""
    own = name.removesuffix(".weight")
    layer = re.match(r"model\.layers\.(\d+)\.(.+)", own)
    short = GGUF_NAMES[layer[2] if layer else own]
    return f"blk.{layer[1]}.{short}.weight" if layer else f"{short}.weight"


def _write_gguf(path: Path, model: Any, tokenizer: Any) -> None:
    from gguf import GGUFWriter

    config, writer = model.config, GGUFWriter(path, "qwen3")
    writer.add_name("small")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(inner["model"]["vocab"].items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([text for text, _ in vocabulary])
    writer.add_token_types([3 if number < 6 else 1 for _, number in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in inner["model"]["merges"]])
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    for name, parameter in model.named_parameters():
        writer.add_tensor(gguf_name(name), parameter.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_run(ground: Ground, method: str, main: Callable[[list[str]], int]) -> None:
    out = ground.run(method)
    setup = Setup(**{**vars(ground.setup), "more": ("--method", method)})
    with _steady_journal():
        assert main(setup.run(out)) == 0, "the undamaged run failed"
    truth: dict[str, Any] = {"weights": {}}
    _steady(out)
    for number in range(TRIALS):
        to = ground.folder / f"export-{method}-{number}"
        arguments = ["export", str(out), "--to", str(to), "--trial", str(number), "--quiet"]
        assert main(arguments) == 0, "an undamaged export failed"
        truth["weights"][str(number)] = weights(to)
        shutil.rmtree(to)
    truth["geometry"] = _geometry(out, ground.folder / "surveyed")
    assert weights(out / "model") == truth["weights"][str(_record(out)["selected"])]
    _steady(out)
    truth["record"] = _record(out)
    (ground.folder / f"truth-{method}.json").write_text(json.dumps(truth))


def _geometry(run: Path, copy: Path) -> Any:
    from excise.runs.finished_run import survey

    shutil.copytree(run, copy)
    found = survey(copy)
    shutil.rmtree(copy)
    return found


def _record(run: Path) -> Any:
    return json.loads((run / "record.json").read_text(encoding="utf-8"))


def weights(folder: Path) -> dict[str, str]:
    """Each tensor of a checkpoint by its hash, from the files that Transformers loads."""
    from safetensors import safe_open

    index, whole, found = folder / "model.safetensors.index.json", folder / "model.safetensors", {}
    names = {whole.name}
    if index.is_file() and not whole.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for path in sorted(folder / name for name in names):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                tensor = file.get_tensor(name)
                head = f"{tensor.dtype} {tensor.shape}".encode()
                found[name] = hashlib.sha256(head + tensor.tobytes()).hexdigest()
    return found


@contextmanager
def _steady_journal() -> Iterator[None]:
    """Within this context every journal holds the same times, so that changes of it are the same."""
    from excise.search.journal import Journal

    write = Journal.append_logs

    def append(self: Journal, logs: list[dict[str, Any]]) -> None:
        write(self, [_timeless(log) for log in logs])

    with mock.patch.object(Journal, "append_logs", append):
        yield


def _steady(run: Path) -> None:
    """The same for a record; of what was exported it keeps the run's own."""
    data = {**_timeless(_record(run)), "artifacts": _record(run)["artifacts"][:1]}
    (run / "record.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _timeless(data: Any) -> Any:
    if isinstance(data, list):
        return [_timeless(one) for one in data]
    if not isinstance(data, dict):
        return data
    found = {key: _STEADY.get(key, _timeless(value)) for key, value in data.items()}
    for name in ("seconds", "timing"):
        if isinstance(found.get(name), dict):
            found[name] = dict.fromkeys(found[name], 0.125)
    return found
