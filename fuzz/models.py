"""Damaged model folders and GGUF files."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from fuzz import checks, readers
from fuzz.case import OUT, Case, Place
from fuzz.formats import change_gguf, change_safetensors
from fuzz.harmless import extended, named, padded, reedited, respaced
from fuzz.mutations import change_bytes, change_json, change_lines
from fuzz.strangers import STRANGERS
from fuzz.values import shown, to_json

_JSON = (respaced, extended)


def weights(place: Place) -> Case:
    """One file of weights."""
    model = place.copied("model")
    place.change(model / "model.safetensors", change_safetensors, harmless=[padded])
    return place.model(model, run=0.45)


def index(place: Place) -> Case:
    """The index of a checkpoint in shards, or one of these."""
    model = place.copied("sharded")
    shards = sorted(model.glob("*.safetensors"))
    if place.draw.random() < 0.25:
        place.change(place.draw.choice(shards), change_safetensors)
    else:
        file = model / "model.safetensors.index.json"
        place.change(file, change_json, _change_map, harmless=[respaced])
    return place.model(model, run=0.5)


def _change_map(data: bytes, draw: Random) -> tuple[bytes, str]:
    tree = json.loads(data)
    names, shards = sorted(tree["weight_map"]), sorted(set(tree["weight_map"].values()))
    name, other = (
        draw.choice(names),
        draw.choice([*shards, "../model/model.safetensors", "none", "", 7]),
    )
    how = draw.choice(["lost", "named", "all", "added"])
    if how == "lost":
        del tree["weight_map"][name]
    elif how == "all":
        tree["weight_map"] = dict.fromkeys(names, other)
    else:
        tree["weight_map"][name if how == "named" else name + ".x"] = other
    return json.dumps(tree).encode(), f"{how} {name} in {other!r}"


_CONFIG: dict[str, list[Any]] = {
    "model_type": ["llama", "qwen2", "gemma3_text", "bert", "t5", "whisper", "no_such", ["qwen3"], {}],
    "architectures": [["LlamaForCausalLM"], [], None, "Qwen3ForCausalLM", [None], [["x"]], {}],
    "eos_token_id": [None, [], [1], [1, 5], "1", [[1]], {"a": 1}, 299, 300, -1, 2**40, 1.5, True,
        ["x"]],
    "pad_token_id": [None, 299, 300, -1, "x", [0]],
    "dtype": ["float16", "bfloat16", "float64", "int8", "torch.float32", "float8_e4m3fn", 3, ["x"], {}],
    "quantization_config": [
        {"quant_method": "fp8"}, {"quant_method": "bitsandbytes", "load_in_4bit": True}, "fp8", [], 7,
        {"quant_method": "mxfp4"}, {"quant_method": "fp8", "weight_block_size": [0, -1]}, {},
        {"quant_method": "gptq", "bits": 4}, {"quant_method": ["x"]}, None,
    ],
    "text_config": [{}, [], "x", {"num_hidden_layers": 3}, None, {"quantization_config": "x"}],
    "num_hidden_layers": [0, 1, 3, 10**9, -1, "2", 2.0, None],
    "hidden_size": [0, 63, 128, 10**6, 2**62, -64, "64"],
    "vocab_size": [0, 299, 301, 10**8, 2**63, None],
    "num_attention_heads": [0, 1, 3, 4, 10**6], "num_key_value_heads": [0, 2, 3, None],
    "head_dim": [0, 64, 256, None, 15], "intermediate_size": [0, 95, 10**8],
    "rms_norm_eps": [0, -1, 1e30, "x", 1e-3], "hidden_act": ["gelu", "no_such", None, 7, "relu"],
    "rope_parameters": [None, {}, {"rope_type": "no_such"}, {"rope_theta": 0,
        "rope_type": "default"}, []],
    "layer_types": [[], ["full_attention"], ["sliding_attention"] * 2, ["x", "y"], "x", None],
    "sliding_window": [0, 2, -1, 10**9], "use_sliding_window": [True], "max_window_layers": [0, 1],
    "tie_word_embeddings": [False, None, "x"], "attention_bias": [True, "x"],
    "transformers_weights": ["../secret.safetensors", 7, "none.safetensors", "model.safetensors", ""],
    "auto_map": [{"AutoConfig": "evil.Config"}, {"AutoModelForCausalLM": "evil.Model"}, "x"],
    "max_position_embeddings": [0, 1, 8, -1, 10**12], "use_cache": [False, "x"],
    "output_hidden_states": [True], "return_dict": [False], "attn_implementation": ["no_such", "eager"],
    "initializer_range": ["x", 10**400], "torch_dtype": ["float16", "auto", 7],
    "is_encoder_decoder": [True],
}  # fmt: skip
_GENERATION: dict[str, list[Any]] = {
    "eos_token_id": [None, [], [1], [5], [1, 5], [4, 4], 5, "1", "x", [[1]], {"a": 1}, 299, 300, -1,
        2**70],
    "pad_token_id": [None, 1, 300, "x", []],
    "bos_token_id": [None, [2], "x"],
    "max_new_tokens": [0, -1, "x", 10**12], "max_length": [0, 5, "x", 10**30],
    "temperature": [0, -1, 1e30, "x", None, 0.1, 10**400], "top_p": [0, 2, "x", 0.5], "top_k": [0,
        -1, "x", 5],
    "do_sample": [True, "x", None], "num_beams": [0, 3, "x"], "repetition_penalty": [0, 1.3, -1, "x"],
    "suppress_tokens": [[5, 6], [], "x", [10**9]], "forced_eos_token_id": [1, "x"],
    "bad_words_ids": [[[5]], [], "x"], "use_cache": [False], "guidance_scale": [2.0, "x"],
    "stop_strings": ["x", ["e"], 7], "cache_implementation": ["no_such", "static"], "min_p": ["x", 3],
}  # fmt: skip


def _known(values: dict[str, list[Any]]) -> Any:
    """A change that puts a telling value under a key that means something."""

    def change(data: bytes, draw: Random) -> tuple[bytes, str]:
        key = draw.choice(list(values))
        value = draw.choice(values[key])
        return to_json({**json.loads(data), key: value}).encode(), f"{key} = {shown(value)}"

    return change


def config(place: Place) -> Case:
    """The model's configuration."""
    model = place.copied("model")
    known = _known(_CONFIG)
    place.change(model / "config.json", change_json, known, known, harmless=_JSON)
    return place.model(model)


def generation(place: Place) -> Case:
    """The generation config."""
    model = place.copied("model")
    known = _known(_GENERATION)
    place.change(model / "generation_config.json", change_json, known, known, harmless=_JSON)
    return place.model(model, run=0.75)


def tokenizer(place: Place) -> Case:
    """tokenizer.json or tokenizer_config.json."""
    model = place.copied("model")
    if place.draw.random() < 0.55:
        place.change(model / "tokenizer.json", change_json, _change_vocabulary, harmless=[respaced])
    else:
        file, known = model / "tokenizer_config.json", _known(_TOKENIZER)
        place.change(file, change_json, known, harmless=[respaced])
    return place.model(model)


_TOKENIZER: dict[str, list[Any]] = {
    "eos_token": ["<pad>", "no such", None, {"content": "<bos>", "__type": "AddedToken"}, 7, [],
        "e", ""],
    "pad_token": [None, "no such", 7, {}], "bos_token": [None, "x", []],
    "tokenizer_class": ["LlamaTokenizer", "NoSuch", None, 7, "GPT2Tokenizer", "BertTokenizer",
        "T5Tokenizer"],
    "add_bos_token": [True, "x"], "add_eos_token": [True], "padding_side": ["left", "up", 7],
    "added_tokens_decoder": [{}, {"300": {"content": "<new>"}}, {"x": {"content": "y"}}, [], {"9": 7}],
    "chat_template": ["{{ messages[0]['content'] }}", "", 7, [], {"default": "x"},
                      [{"name": "default", "template": "{{ messages[0].content }}"}],
                      [{"name": "tools"}]],
    "model_max_length": [1, -1, "x", 10**400, 1e30], "clean_up_tokenization_spaces": [True, "x"],
    "additional_special_tokens": [["<a>", "<b>"], "x", [7], {}], "extra_special_tokens": [{}, [],
        "x", {"a": 7}],
    "auto_map": [{"AutoTokenizer": ["evil.T", None]}, "x"], "truncation_side": ["left", "x"],
}  # fmt: skip


def _change_vocabulary(data: bytes, draw: Random) -> tuple[bytes, str]:
    """Changes that fit the form of tokenizer.json."""
    tree = json.loads(data)
    model = tree["model"]
    name = draw.choice(sorted(model["vocab"]))
    how = draw.choice(
        ["beyond", "added", "lost", "merge", "type", "version", "normalizer", "shift", "twice"]
    )
    if how == "beyond":
        model["vocab"][name] = draw.choice([300, 5000, 2**31, 2**40])
    elif how == "added":
        token = {"id": draw.choice([300, 305, 1, 10**6]), "content": "velm", "single_word": False}
        token |= {
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": draw.random() < 0.5,
        }
        tree["added_tokens"].append(token)
    elif how == "lost":
        del model["vocab"][name]
    elif how == "merge":
        model["merges"].insert(0, draw.choice([["x", "y"], "x y", ["v"], [], "v", ["v", "e"], 7]))
    elif how == "type":
        model["type"] = draw.choice(["WordPiece", "Unigram", "WordLevel", "NoSuch", None])
    elif how == "version":
        tree["version"] = draw.choice(["2.0", 1, None])
    elif how == "normalizer":
        kinds: list[Any] = [{"type": "NFKC"}, {"type": "Lowercase"}, {"type": "NoSuch"}, {}, "NFC"]
        tree["normalizer"] = draw.choice(kinds)
    elif how == "shift":
        model["vocab"] = {text: number + 1 for text, number in model["vocab"].items()}
    else:
        model["vocab"][name] = model["vocab"][draw.choice(sorted(model["vocab"]))]
    return json.dumps(tree).encode(), f"{how} {name!r}"


def gguf(place: Place) -> Case:
    """A GGUF file."""
    file = place.copied("model.gguf")
    place.change(file, change_gguf, harmless=[named])
    return place.model(file, run=0.55)


_MATTER = (
    *(
        "license: mit",
        "license: [mit, apache-2.0]",
        "license: {a: mit}",
        "license: 7",
        "license:",
        "license: ''",
    ),
    *(
        "license: 2024-01-01",
        "license: !!python/object/apply:os.getcwd []",
        "license: 'm\x1b[31mit'",
        "{",
    ),
    *(
        "license: mit\nlicense: other",
        "- a\n- b",
        "just text",
        "license: *a",
        "a: b: c",
        "\tlicense: mit",
    ),
    *(
        "license: " + "x" * 5000,
        "license: " + "[" * 400 + "]" * 400,
        "? [a, b]\n: c",
        "tags: 7",
        "language: {}",
    ),
    *(
        "model-index: 7",
        "model-index:\n- name: x\n  results: 7",
        "eval_results: x",
        "license: !!binary aGk=",
    ),
    *(
        "license: |\n  two\n  lines",
        "license: \u2028",
        "base_model: [[[]]]",
        "license: 1e400",
        "license: .nan",
    ),
    "a0: &a0 [x, x]\n"
    + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 30)),
    "a: &a [*a]\nlicense: *a",
    "license: mit\n---\nlicense: other",
    "datasets: [1, {}]",
    "license: 'm\u0000'",
)


def readme(place: Place) -> Case:
    """The metadata of the source's README.md: it may say anything, and nothing else may come of it."""
    model = place.copied("model")
    page = model / "README.md"
    if place.draw.random() < 0.6:
        matter = place.draw.choice(_MATTER)
        place.put(page, f"---\n{matter}\n---\n\n# A model\n", shown(matter))
        place.harmless = True
    else:
        place.change(page, change_bytes, change_lines, harmless=[reedited])
    setup, out = place.setup(model=model), place.folder / OUT

    def check(_: str) -> Any:
        yield from checks.check_run(setup, out)
        record = json.loads((out / "record.json").read_text(encoding="utf-8"))
        known, said = readers.front_matter(page).get("license"), record["model"]["license"]
        if said is not None and not (isinstance(said, str) and len(said) <= 200):
            yield f"a licence of {len(str(said))} characters"
        if (
            isinstance(known, str)
            and known.isprintable()
            and known
            and len(known) < 100
            and said != known
        ):
            yield f"the licence is said to be {said!r:.50} and is {known!r:.50}"

    return Case(setup.run(out), check, absent=(out,))


def folder(place: Place) -> Case:
    """Files in a model folder that do not belong there, or are not what their names say."""
    model = place.copied("model")
    if not place.sound:
        place.said.append(place.draw.choice(STRANGERS)(model, place.draw))
    return place.model(model, run=0.7)
