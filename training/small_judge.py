"""Train a small judge on half of a labelled set, and write the other half to certify it on.

    python training/small_judge.py --out runs/small-judge
    excise judge runs/small-judge --labelled runs/small-judge/held.jsonl

A transformer of one layer over words, trained from nothing in seconds: enough for stock phrases and for
tests, and a start for a set of your own (`--labelled FILE`). Fine-tune a pretrained encoder where you can.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from excise.judges.labelled import read_labelled
from excise.judges.verdicts import Exchange

LONGEST = 128  # tokens
RATE = 1e-2
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def train(
    folder: Path,
    exchanges: Sequence[Exchange],
    verdicts: Sequence[str],
    *,
    steps: int = 100,
    dropout: float = 0.0,
) -> Path:
    """Train a classifier of prompts and responses, and save it with its tokenizer."""
    labels = sorted(set(verdicts))
    tokenizer = word_tokenizer([t for one in exchanges for t in (one.prompt, one.response)])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=LONGEST, num_labels=len(labels),
        id2label=dict(enumerate(labels)), label2id={name: n for n, name in enumerate(labels)},
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model: Any = BertForSequenceClassification(config)
    batch = tokenizer(
        [one.prompt for one in exchanges], [one.response for one in exchanges],
        padding=True, truncation=True, max_length=LONGEST, return_tensors="pt",
    )  # fmt: skip
    true = torch.tensor([labels.index(verdict) for verdict in verdicts])
    # Rare verdicts weigh as much as common ones.
    weights = len(true) / (len(labels) * true.bincount(minlength=len(labels)).float())
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(**batch).logits, true, weights)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def word_tokenizer(texts: Sequence[str]) -> Any:
    """Return a tokenizer whose vocabulary is the words of these texts."""
    normal, split = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    words = {w for text in texts for w, _ in split.pre_tokenize_str(normal.normalize_str(text))}
    vocabulary = {word: n for n, word in enumerate([*SPECIAL, *sorted(words - set(SPECIAL))])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normal, split
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=LONGEST,
    )  # fmt: skip


def main() -> None:
    """Train on the even rows; write the odd ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--labelled", default="builtin")
    parser.add_argument("--steps", type=int, default=120)
    given = parser.parse_args()
    known = read_labelled(given.labelled)
    train(given.out, known.exchanges[::2], known.verdicts[::2], steps=given.steps, dropout=0.3)
    rows = [
        {"prompt": e.prompt, "response": e.response, "ended": e.ended, "verdict": v}
        for e, v in zip(known.exchanges[1::2], known.verdicts[1::2], strict=True)
    ]
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (given.out / "held.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{given.out}: trained on {len(known.verdicts) - len(rows)}, held {len(rows)}")


if __name__ == "__main__":
    main()
