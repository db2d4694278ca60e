"""The formats that an edit is exported in, one row each: all that is said of one without a model.

The half of a format that works (write, load again, measure) is a class that its row names. It is named,
not imported: `export.exporter` resolves it, so settings, cards and the command line read this table
without torch. No other module compares a format's name. ARCHITECTURE.md says how to add one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# The settings of `config.ExportSection` that only some formats take, and their flags.
OPTIONS = {
    "unpack": "--unpack",
    "adapter_form": "--dora or --lora",
    "quantize": "--quantize",
    "from_gguf": "--from-gguf",
    "llama_cpp": "--llama-cpp",
}


@dataclass(frozen=True)
class Usage:
    """One way to load an export: a sentence, and code for it, as Jinja templates.

    A template is given `repo` and `base`, the Hub ids of the export, or None, and of the base model, or
    words in its place; `auto_class`, Transformers' name of the model's class; `form`, an adapter's; and of
    files that are named the first one's name `file` and type `kind`, and the name of the `projector`, if
    any. The filters `json` and `word` make a name one string of Python and one word of a shell's line.
    """

    words: str
    language: str = ""
    code: str = ""


@dataclass(frozen=True)
class Format:
    """One row.

    Attributes:
        name: in settings, flags and records.
        folder: in a run folder.
        label: in tables of the command line.
        exporter: "module:class" of its `export.exporter.Exporter`.
        options: those of `OPTIONS` that it takes.
        rebuilt: whether `excise reproduce` can write the same bytes from a record.
        relation: to the base model, in the Hub's metadata.
        library: that loads it, in the Hub's metadata.
        tags: more of the Hub's tags.
        words: what it is, on the card.
        rest: what it holds of the original, on the card.
        usage: how it is loaded, on the card.
        credits: whose work it is as well, on the card.
    """

    name: str
    folder: str
    label: str
    exporter: str
    relation: Literal["finetune", "adapter"]
    words: str
    rest: str
    usage: tuple[Usage, ...]
    library: str | None = None
    tags: tuple[str, ...] = ()
    credits: tuple[str, ...] = ()
    options: frozenset[str] = frozenset()
    rebuilt: bool = False


_GENERATE = """
messages = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
).to(model.device)
output = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
_TRANSFORMERS = """\
from transformers import {{ auto_class }}, AutoTokenizer

model_id = {{ (repo or "path/or/hub-id/of/this/model") | json }}
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = {{ auto_class }}.from_pretrained(model_id, dtype="auto", device_map="auto")
"""
_PEFT = """\
from peft import PeftModel
from transformers import {{ auto_class }}, AutoTokenizer

base_id = {{ base | json }}
adapter_id = {{ (repo or "path/or/hub-id/of/this/adapter") | json }}
tokenizer = AutoTokenizer.from_pretrained(base_id)
base = {{ auto_class }}.from_pretrained(base_id, dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(base, adapter_id)
"""
_LLAMA_PYTHON = """\
from llama_cpp import Llama

llama = Llama(MODEL, n_ctx=4096, verbose=False)
messages = [{"role": "user", "content": "Hello!"}]
output = llama.create_chat_completion(messages, max_tokens=100)
print(output["choices"][0]["message"]["content"])
"""
_LLAMA_CLI = """\
{% if repo %}
llama-cli -hf {{ (repo ~ ":" ~ kind) | word }} -cnv
{% endif %}
llama-cli -m {{ file | word }} -cnv
{%- if projector %}

llama-mtmd-cli -m {{ file | word }} --mmproj {{ projector | word }} --image PICTURE -p Describe
{%- endif %}"""
_OLLAMA = """\
{% if repo %}
ollama run {{ ("hf.co/" ~ repo ~ ":" ~ kind) | word }}

# or, with the files here:
{% endif %}
ollama create edited -f Modelfile
ollama run edited"""
_OLLAMA_HERE = "ollama create edited -f Modelfile\nollama run edited"
_LLAMA_CPP = "GGUF, its converter and its quantisers: the llama.cpp project."

_ROWS = (
    Format(
        "safetensors",
        folder="model",
        label="edited model",
        exporter="excise.export.checkpoint:CheckpointExporter",
        options=frozenset({"unpack"}),
        rebuilt=True,
        relation="finetune",
        library="transformers",
        words="whole model, safetensors",
        rest="Every other tensor and file is a copy of the original's.",
        usage=(
            Usage("With Transformers:", "python", _TRANSFORMERS + _GENERATE),
            Usage(
                "vLLM and other servers of Transformers checkpoints load it as they load the original."
            ),
        ),
    ),
    Format(
        "adapter",
        folder="adapter",
        label="adapter",
        exporter="excise.export.adapter:AdapterExporter",
        options=frozenset({"adapter_form"}),
        rebuilt=True,
        relation="adapter",
        library="peft",
        words="PEFT adapter on the base model",
        rest="The adapter holds the edit alone; it needs the base model.",
        usage=(
            Usage("With PEFT:", "python", _PEFT + _GENERATE),
            Usage(
                "{% if form == 'DoRA' %}It is a DoRA: `model.merge_and_unload()` makes a plain model of "
                "it for servers whose adapters are plain LoRA, such as vLLM and llama.cpp."
                "{% else %}It is a plain LoRA, which servers such as vLLM take beside the base model too: "
                "`--enable-lora --lora-modules`, and `--max-lora-rank` no less than its rank.{% endif %}"
            ),
        ),
    ),
    Format(
        "gguf",
        folder="gguf",
        label="gguf",
        exporter="excise.gguf.exporters:GgufExporter",
        options=frozenset({"quantize", "from_gguf", "llama_cpp"}),
        relation="finetune",
        tags=("gguf",),
        words="whole model, GGUF",
        rest="Every other tensor is the original's, in GGUF.",
        usage=(
            Usage("With llama.cpp:", "sh", _LLAMA_CLI),
            Usage(
                "From Python, with llama-cpp-python:",
                "python",
                _LLAMA_PYTHON.replace("MODEL", "model_path={{ file | json }}"),
            ),
            Usage(
                "With Ollama (the Modelfile names the first file; name another in its FROM line):",
                "sh",
                _OLLAMA,
            ),
        ),
        credits=(_LLAMA_CPP,),
    ),
    Format(
        "ollama",
        folder="ollama",
        label="ollama",
        exporter="excise.gguf.exporters:OllamaExporter",
        options=frozenset({"quantize", "llama_cpp"}),
        relation="finetune",
        tags=("gguf",),
        words="whole model for Ollama, GGUF",
        rest="Every other tensor is the original's, in GGUF.",
        usage=(Usage("With Ollama, with the files here:", "sh", _OLLAMA_HERE),),
        credits=(_LLAMA_CPP,),
    ),
    Format(
        "gguf-adapter",
        folder="gguf-adapter",
        label="gguf-adapter",
        exporter="excise.gguf.exporters:GgufAdapterExporter",
        options=frozenset({"from_gguf", "llama_cpp"}),
        relation="adapter",
        tags=("gguf",),
        words="GGUF adapter on the base model",
        rest="The adapter holds the edit alone; it needs the base model, as GGUF.",
        usage=(
            Usage("With llama.cpp:", "sh", "llama-cli -m BASE.gguf --lora {{ file | word }} -cnv"),
            Usage(
                "From Python, with llama-cpp-python:",
                "python",
                _LLAMA_PYTHON.replace(
                    "MODEL", 'model_path="BASE.gguf", lora_path={{ file | json }}'
                ),
            ),
        ),
        credits=(_LLAMA_CPP,),
    ),
)
FORMATS = {row.name: row for row in _ROWS}
DEFAULT = _ROWS[0].name
