"""What does not belong in a model folder, put there: each gives what it did, in words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random
from typing import Any

from fuzz.values import odd, shown, to_json


def _link_out(model: Path, draw: Random) -> str:
    outside = model.parent / "outside"
    outside.mkdir()
    (outside / "secret").write_text("a secret\n")
    name = draw.choice(
        ["notes.txt", "tokenizer.model", "sub/notes.txt", "README.md", "generation_config.json"]
    )
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(outside / "secret")
    return f"{name} is a link out of the folder"


def _link_folder(model: Path, draw: Random) -> str:
    outside = model.parent / "outside"
    outside.mkdir()
    (outside / "secret").write_text("a secret\n")
    target: Path = draw.choice([outside, model, Path("/proc/self"), model.parent])
    (model / "more").symlink_to(target)
    return f"more is a link to the folder {target.name}"


def _weights_elsewhere(model: Path, draw: Random) -> str:
    outside = model.parent / "outside"
    outside.mkdir()
    (model / "model.safetensors").rename(outside / "model.safetensors")
    (model / "model.safetensors").symlink_to(outside / "model.safetensors")
    return "the weights are a link out of the folder"


def _odd_name(model: Path, draw: Random) -> str:
    names = [
        b"a\nb.txt",
        b"\x1b[31m.txt",
        b"\xff\xfe.txt",
        b"x" * 255,
        b"a'b\"c.txt",
        b"-rf",
        b" ",
        b"%s{0}",
    ]
    name = draw.choice(names)
    with open(os.fsencode(model) + b"/" + name, "wb") as file:  # noqa: PTH123 (bytes that are no UTF-8)
        file.write(b"hello")
    return f"a file named {name!r:.40}"


def _pipe(model: Path, draw: Random) -> str:
    name = draw.choice(
        ["notes.txt", "chat_template.json", "adapter_config.json", "sub", "added_tokens.json"]
    )
    os.mkfifo(model / name)
    return f"{name} is a pipe"


def _adapter(model: Path, draw: Random) -> str:
    settings: Any = {"peft_type": "LORA", "base_model_name_or_path": str(model), "r": 2}
    (model / "adapter_config.json").write_text(
        json.dumps(draw.choice([settings, {}, [], {"r": {}}]))
    )
    if draw.random() < 0.5:
        (model / "adapter_model.safetensors").write_bytes(
            (model / "model.safetensors").read_bytes()
        )
    return "an adapter beside the weights"


_OTHERS = (
    "pytorch_model.bin model-00001-of-00002.safetensors evil.py preprocessor_config.json vocab.json "
    "special_tokens_map.json added_tokens.json merges.txt model.gguf tokenizer.model "
    "processor_config.json chat_template.json model.safetensors.index.json quantize_config.json"
).split()


def _other_files(model: Path, draw: Random) -> str:
    name = draw.choice(_OTHERS)
    value = draw.choice(
        [
            "{}",
            "[]",
            "",
            "\x00",
            to_json(odd(draw)),
            '{"chat_template": "hi {{ messages[0].content }}"}',
        ]
    )
    (model / name).write_bytes(value.encode("utf-8", "surrogatepass"))
    return f"{name} of {shown(value)}"


def _gone(model: Path, draw: Random) -> str:
    name = draw.choice(
        ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"]
    )
    (model / name).unlink()
    if draw.random() < 0.3:
        (model / name).mkdir()
    return f"{name} is gone"


STRANGERS = (
    *(
        _link_out,
        _link_folder,
        _weights_elsewhere,
        _odd_name,
        _odd_name,
        _pipe,
        _adapter,
        _other_files,
    ),
    *(_other_files, _other_files, _gone),
)
