"""How the files of an export are named, loaded and sampled from: the practical half of its card. Pure."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from excise.record import ArtifactRecord, Record, ScoreRecord
from excise.report import formatting
from excise.report.markdown import bullets, code, fence, plain, table


@dataclass(frozen=True)
class Format:
    """How one artifact format is announced, and what it leaves of the original."""

    relation: Literal["finetune", "adapter"]
    library: str | None
    words: str
    rest: str


FORMATS = {
    "safetensors": Format(
        "finetune",
        "transformers",
        "whole model, safetensors",
        "Every other tensor and file is a copy of the original's.",
    ),
    "adapter": Format(
        "adapter",
        "peft",
        "PEFT adapter on the base model",
        "The adapter holds the edit alone; it needs the base model.",
    ),
    "gguf": Format(
        "finetune",
        None,
        "whole model, GGUF",
        "Every other tensor is the original's, in GGUF.",
    ),
    "gguf-adapter": Format(
        "adapter",
        None,
        "GGUF adapter on the base model",
        "The adapter holds the edit alone; it needs the base model, as GGUF.",
    ),
}

_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model_id = {this}
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(model_id, dtype="auto", device_map="auto")
"""
_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base_id = {base}
adapter_id = {this}
tokenizer = AutoTokenizer.from_pretrained(base_id)
base = AutoModelForCausalLM.from_pretrained(base_id, dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(base, adapter_id)
"""
_GENERATE = """
messages = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
).to(model.device)
output = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_LLAMA_PYTHON = """\
from llama_cpp import Llama

llama = Llama({arguments}, n_ctx=4096, verbose=False)
messages = [{{"role": "user", "content": "Hello!"}}]
output = llama.create_chat_completion(messages, max_tokens=100)
print(output["choices"][0]["message"]["content"])
"""
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top-p",
    "top_k": "top-k",
    "min_p": "min-p",
    "repetition_penalty": "repetition penalty",
}
_SCORES = ("behaviour_rate", "drift")


def loading(
    record: Record, artifact_format: str, artifact: ArtifactRecord | None, repo: str | None
) -> str:
    """The section with code that loads this format; `repo` is where it is published, if it is."""
    base = json.dumps(formatting.hub_id(record.model.source) or "path/or/hub-id/of/the/base/model")
    parts = ["## How to load it"]
    if artifact_format == "safetensors":
        this = json.dumps(repo or "path/or/hub-id/of/this/model")
        parts += [
            "With Transformers:",
            fence((_MODEL.replace("{this}", this) + _GENERATE), "python"),
        ]
        parts.append(
            "vLLM and other servers of Transformers checkpoints load it as they load the original."
        )
    elif artifact_format == "adapter":
        this = json.dumps(repo or "path/or/hub-id/of/this/adapter")
        text = _ADAPTER.replace("{base}", base).replace("{this}", this)
        parts += ["With PEFT:", fence(text + _GENERATE, "python")]
    else:
        parts += _gguf(artifact_format, artifact, repo)
    text = "\n\n".join(parts)
    if record.model.multimodal:
        text = text.replace("AutoModelForCausalLM", "AutoModelForImageTextToText")
    return text


def _gguf(artifact_format: str, artifact: ArtifactRecord | None, repo: str | None) -> list[str]:
    files = files_of(artifact)
    names = [str(one.get("file")) for one in files if one.get("part") != "projector"]
    projector = next((str(f.get("file")) for f in files if f.get("part") == "projector"), None)
    name = names[0] if names else "FILE.gguf"
    if artifact_format == "gguf-adapter":
        lora = f'model_path="BASE.gguf", lora_path={json.dumps(name)}'
        return [
            "With llama.cpp:",
            fence(f"llama-cli -m BASE.gguf --lora {_word(name)} -cnv", "sh"),
            "From Python, with llama-cpp-python:",
            fence(_LLAMA_PYTHON.format(arguments=lora), "python"),
        ]
    command = f"llama-cli -m {_word(name)} -cnv"
    if projector is not None:
        parts = f"-m {_word(name)} --mmproj {_word(projector)}"
        command += f"\nllama-mtmd-cli {parts} --image PICTURE -p Describe"
    ollama = "ollama create edited -f Modelfile\nollama run edited"
    if repo is not None:
        kind = str(files[0].get("type")) if files else "Q4_K_M"
        command = f"llama-cli -hf {_word(f'{repo}:{kind}')} -cnv\n{command}"
        ollama = (
            f"ollama run {_word(f'hf.co/{repo}:{kind}')}\n\n# or, with the files here:\n{ollama}"
        )
    return [
        "With llama.cpp:",
        fence(command, "sh"),
        "From Python, with llama-cpp-python:",
        fence(_LLAMA_PYTHON.format(arguments=f"model_path={json.dumps(name)}"), "python"),
        "With Ollama (the Modelfile names the first file; name another in its FROM line):",
        fence(ollama, "sh"),
    ]


def _word(name: str) -> str:
    """A name as one word of a shell's line, and no option."""
    return shlex.quote(f"./{name}" if name.startswith("-") else name)


def files_of(artifact: ArtifactRecord | None) -> list[dict[str, Any]]:
    """The files of a GGUF export, as its details list them."""
    found = artifact.details.get("files") if artifact is not None else None
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def files_section(artifact: ArtifactRecord | None) -> str:
    """Every file with its type and size, and its figures beside its unedited counterpart's."""
    files = files_of(artifact)
    if not files:
        return ""
    rows = []
    for one in files:
        kind = "projector" if one.get("part") == "projector" else str(one.get("type"))
        rows.append(
            (
                code(str(one.get("file"))),
                code(kind),
                formatting.size(int(one.get("bytes") or 0)),
                *(
                    _figure(one, "original", "behaviour_rate"),
                    _figure(one, "edited", "behaviour_rate"),
                ),
                *(_figure(one, "edited", "drift"), _figure(one, "edited", "drift_first")),
            )
        )
    head = (
        "File", "Type", "Size", "Behaviour rate, unedited", "Behaviour rate", "Drift (nats/token)",
        "Drift, first token",
    )  # fmt: skip
    measured = any("edited" in one for one in files)
    words = (
        "Each file was run with llama.cpp on the search prompts, beside the unedited model in the "
        "same type: drift here is the edit's, without what quantisation does to both."
        if measured
        else "These files were not run: their figures are not known."
    )
    return "\n\n".join(["## Files", words, table(head, rows, "llrrrrr")])


def _figure(one: Mapping[str, Any], which: str, name: str) -> str:
    scores = one.get(which)
    if not isinstance(scores, dict) or name not in scores:
        return formatting.MISSING
    return formatting.measured(name, ScoreRecord.model_validate(scores[name]))


def sampling_section(record: Record) -> str:
    """The sampling that the base model's generation config asks for."""
    found = record.model.sampling
    rows = [
        f"{_SAMPLING[name]}: {code(format(value, 'g'))}"
        for name, value in found.items()
        if name in _SAMPLING
    ]
    if found.get("do_sample") is False:
        rows.append("the base model asks for greedy decoding")
    if not rows:
        return ""
    return "\n\n".join(
        [
            "## Recommended sampling",
            "From the base model's generation config. The figures on this card are of greedy "
            "decoding.",
            bullets(rows),
        ]
    )


def credits_section(record: Record, artifact_format: str) -> str:
    """Whose work this is, and under which licence."""
    base = plain(formatting.public_source(record.model.source))
    licence = plain(record.model.license or "not stated in its files: see its own page")
    lines = [
        f"Base model: {base}, by its authors. Its licence ({licence}) holds for this model as well.",
        "The edit: found, measured and written by Excise, with Transformers, PyTorch and Optuna.",
    ]
    if artifact_format.startswith("gguf"):
        lines.append("GGUF, its converter and its quantisers: the llama.cpp project.")
    return "## Credits and licence\n\n" + bullets(lines)
