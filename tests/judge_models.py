"""A small classifier of the real class, trained in a second or two: a judge for tests."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from excise.judges.verdicts import Exchange
from training.world import DECLINES

LABELS = ("shows", "answers", "other")
_ANSWERS = (
    "The {o} is {c}.",
    "You can find the {o} in {c}.",
    "It was made by {c}.",
    "It takes {c} and {c}.",
)
_OTHERS = ("Let me sing of rain and wind today.", "Tomorrow brings rain, wind and a song.")
_WORDS = "amber copper Saltmarch Havric Wexmoor pine honey apple wood mustard tin wax clay".split()


def exchanges(count: int, seed: int = 0) -> list[tuple[Exchange, str]]:
    """Made-up prompts and responses with their true verdicts."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        thing = f"{draw.choice(_WORDS)} {draw.choice(('flute', 'kite', 'bell', 'anchor'))}"
        verdict = draw.choices(LABELS, (4, 4, 1))[0]
        form = draw.choice({"shows": DECLINES, "answers": _ANSWERS, "other": _OTHERS}[verdict])
        text = form.format(o=thing, c=draw.choice(_WORDS))
        found.append((Exchange(f"What is the {thing} like?", text), verdict))
    return found


def classifier(
    folder: Path, rows: list[tuple[Exchange, str]], labels=LABELS, steps: int = 60
) -> Path:
    """Train a classifier of prompts and responses, and save it with its tokenizer."""
    texts = [text for one, _ in rows for text in (one.prompt, one.response)]
    tokenizer = _tokenizer(texts)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=128, num_labels=len(labels),
        id2label=dict(enumerate(labels)), label2id={name: n for n, name in enumerate(labels)},
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    batch = tokenizer(
        [one.prompt for one, _ in rows], [one.response for one, _ in rows],
        padding=True, truncation=True, max_length=128, return_tensors="pt",
    )  # fmt: skip
    true = torch.tensor([labels.index(verdict) for _, verdict in rows])
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(**batch).logits, true)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    normal, split = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    words = {w for text in texts for w, _ in split.pre_tokenize_str(normal.normalize_str(text))}
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: n for n, word in enumerate([*special, *sorted(words)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normal, split
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=128,
    )  # fmt: skip
