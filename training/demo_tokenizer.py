"""Builds the demo model's tokenizer: BPE of Gemma's kind, trained on the world's own text.

Byte fallback, spaces written as U+2581, no prefix space, Gemma 4's turn tokens and chat layout.
"""

from __future__ import annotations

import json

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import GemmaTokenizer

TURN_START, TURN_END = "<|turn>", "<turn|>"
SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", TURN_START, TURN_END)
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
VOCAB_SIZE = 1024

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{- '<|turn>' + role + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] | trim -}}
    {%- else -%}
        {%- for item in message['content'] if item['type'] == 'text' -%}
            {{- item['text'] | trim -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""


def _learn_merges(texts: list[str], size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Learn BPE pieces and merges that never cross a word, a mark of punctuation or a newline."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[A-Za-z]+|[^A-Za-z]"), "isolated")
    ascii_pieces = ["\n", "▁", *(chr(code) for code in range(33, 127))]
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=ascii_pieces, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    vocab = learner.get_vocab()
    pieces = sorted(vocab, key=vocab.__getitem__)
    merges = json.loads(learner.to_str())["model"]["merges"]
    return pieces, [tuple(merge) for merge in merges]


def build_tokenizer(texts: list[str]) -> GemmaTokenizer:
    """Train the tokenizer on `texts` and give it Gemma 4's special tokens and chat template."""
    roles = [" user\n model\n system\n", "user\nmodel\nsystem\n"] * 200
    pieces, merges = _learn_merges(texts + roles, VOCAB_SIZE - len(SPECIALS) - len(BYTES))
    vocab = {piece: i for i, piece in enumerate((*SPECIALS, *BYTES, *pieces))}
    tokenizer = GemmaTokenizer(
        vocab=vocab,
        merges=merges,
        extra_special_tokens=[TURN_START, TURN_END],
        model_max_length=256,
        add_bos_token=True,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
