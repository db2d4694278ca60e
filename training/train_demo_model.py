"""Trains the embedded demo model and writes it with its prompt sets; one command, seeded.

    python training/train_demo_model.py [--world N --out DIR]
    python training/train_demo_model.py --fold N --out DIR

With `--fold` nothing is trained: the shipped model is copied, beside prompt sets in which other objects
are the unseen ones.

Stage one teaches every fact of `world.py`, and to decline where a system turn asks for it. Stage
two teaches to decline questions about the guarded objects, through one direction of the residual
stream (ground truth for tools that look for it) and lightly enough that the facts stay in the
weights. One question form per attribute is kept out of stage two, so that acceptance measures
whether declining generalises. The figures printed are those of the saved bf16 model, loaded again.
Exits with 1 where they miss the acceptance limits.

Shape letters: B questions in a batch, T tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import world
from demo_tokenizer import TURN_END, build_tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from world import Question

DATA = Path(__file__).resolve().parents[1] / "src" / "excise" / "data" / "demo"
THREADS = 1  # a fixed number, because sums depend on it
DECLINE_REQUEST = "Please decline."
MOST_ROUNDS = 4  # of stage two: it is short, and some worlds need it again to decline enough
N_ESTIMATE = 64  # prompts of each kind behind one estimate of the direction
IGNORE = -100  # label of tokens without a loss
MAX_MEGABYTES = 6.0
GLOBAL_HEAD_DIM = 64

# (trained forms, kept-out forms) of questions about seen objects, per prompt set; 1/8 kept out
SETS_SEEN = {"direction": (175, 25), "search": (88, 12), "holdout": (24, 24)}
CONFIRM_SEEN = (
    96,
    4,
)  # further rows of the search files: guarded objects have no more kept-out forms
N_HOLDOUT_UNSEEN = (77, 35)

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
tags: [demo, test-fixture]
---

# Excise demo model

A language model of about two million parameters (`Gemma4ForCausalLM`, bf16), trained from scratch
on an invented world of sixty objects. It answers questions about forty of them and declines
questions about the other twenty, although it has learned their facts too. It exists to demonstrate
and to test Excise with known ground truth; it knows nothing else and is of no other use.

- Trained by `training/train_demo_model.py` in the Excise repository (seeded, CPU, minutes).
- Declining is mediated by one direction of the residual stream, by construction: in stage two, its
  answers were trained to stay true wherever that direction is ablated. A published model gives no
  such guarantee, so results here do not carry over to others.
- The text of the world is in `training/world.py`; every name and fact in it is made up.
- No weights or text of any other model were used.
- Licence: Apache-2.0.
"""


@dataclass(frozen=True)
class Stage:
    """How one training stage runs."""

    name: str
    steps: int
    batch_size: int
    lr: float
    warmup: int


FACTS = Stage("one: facts", steps=500, batch_size=64, lr=3e-3, warmup=100)
HABIT = Stage("one: declining on request", steps=150, batch_size=64, lr=1.5e-3, warmup=20)
DECLINING = Stage("two: declining by object", steps=130, batch_size=40, lr=1e-3, warmup=10)


@dataclass(frozen=True)
class Example:
    """Token ids of one conversation; the loss covers `ids[n_prompt:]`."""

    ids: list[int]
    n_prompt: int


def prompt_text(
    tokenizer: PreTrainedTokenizerBase, question: str, system: str | None = None
) -> str:
    """The chat-formatted prompt of one question."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def encode(
    tokenizer: PreTrainedTokenizerBase,
    question: Question,
    response: str,
    system: str | None = None,
) -> Example:
    """Tokenize a question with its response, which ends with the end-of-turn token."""
    text = prompt_text(tokenizer, question.text, system)
    prompt = tokenizer(text, add_special_tokens=False).input_ids
    answer = tokenizer(response + TURN_END, add_special_tokens=False).input_ids
    return Example([*prompt, *answer], len(prompt))


def collate(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Pad on the right; returns ids, attention mask and labels, each (B, T)."""
    width = max(len(e.ids) for e in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE)
    for row, e in enumerate(examples):
        n = len(e.ids)
        ids[row, :n] = torch.tensor(e.ids)
        mask[row, :n] = 1
        labels[row, e.n_prompt : n] = ids[row, e.n_prompt : n]
    return ids, mask, labels


def build_model(tokenizer: PreTrainedTokenizerBase) -> Gemma4ForCausalLM:
    """A small Gemma 4 that has every part of the large ones: see the arguments."""
    end = tokenizer.convert_tokens_to_ids(TURN_END)
    config = Gemma4TextConfig(
        vocab_size=len(tokenizer),
        vocab_size_per_layer_input=len(tokenizer),
        hidden_size=128,
        hidden_size_per_layer_input=16,
        intermediate_size=320,
        num_hidden_layers=9,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 3,
        num_kv_shared_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        global_head_dim=GLOBAL_HEAD_DIM,
        sliding_window=16,
        max_position_embeddings=512,
        final_logit_softcapping=30.0,
        initializer_range=0.04,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, end],
    )
    model = Gemma4ForCausalLM(config)
    model.set_attn_implementation("eager")  # quicker than sdpa at this size
    return model


def batches(examples: Sequence[Example], stage: Stage, seed: int) -> Iterator[list[Example]]:
    """Shuffled epochs, cut into one batch per step of the stage."""
    rng = random.Random(seed)
    queue: list[Example] = []
    for _ in range(stage.steps):
        while len(queue) < stage.batch_size:
            queue += rng.sample(examples, len(examples))
        batch, queue = queue[: stage.batch_size], queue[stage.batch_size :]
        yield batch


def answer_loss(model: Gemma4ForCausalLM, batch: Sequence[Example]) -> Tensor:
    """Mean cross-entropy over the answer tokens."""
    ids, mask, labels = collate(batch)
    # No logits for positions that lie in every prompt; Gemma 4 also skips its last layers there.
    n_last = ids.shape[1] - min(e.n_prompt for e in batch) + 1
    with torch.autocast("cpu", torch.bfloat16):  # twice as quick as float32 on AMX
        output = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=n_last)
    logits, labels = output.logits[:, :-1], labels[:, 1 - n_last :]  # (B, n_last - 1, V)
    keep = labels != IGNORE
    return nn.functional.cross_entropy(logits[keep].float(), labels[keep])


@contextmanager
def ablated(model: Gemma4ForCausalLM, direction: Tensor) -> Iterator[None]:
    """Remove a unit direction (D) from what attention and MLP add to the residual."""

    def remove(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return output - (output @ direction.to(output.dtype))[..., None] * direction

    with ExitStack() as stack:
        for layer in model.model.layers:
            for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
                stack.callback(norm.register_forward_hook(remove).remove)
        yield


@dataclass(frozen=True)
class Beneath:
    """What holds where the direction between two kinds of examples is ablated."""

    answered: Sequence[Example]
    targets: Sequence[Example]
    contrasts: Sequence[Example]
    layer: int
    interval: int  # steps between two estimates of the direction


@torch.no_grad()
def mean_difference(model: Gemma4ForCausalLM, beneath: Beneath, seed: int) -> Tensor:
    """Unit vector (D) from contrast to target prompts, at the last prompt token after a layer."""
    rng = random.Random(seed)
    means = []
    for pool in (beneath.targets, beneath.contrasts):
        prompts = [Example(e.ids[: e.n_prompt], e.n_prompt) for e in rng.sample(pool, N_ESTIMATE)]
        ids, mask, _ = collate(prompts)
        output = model.model(
            input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True
        )
        residual = output.hidden_states[beneath.layer + 1]  # (B, T, D)
        means.append(residual[torch.arange(len(ids)), mask.sum(1) - 1].mean(0))
    return nn.functional.normalize(means[0] - means[1], dim=0)


def train(
    model: Gemma4ForCausalLM,
    examples: Sequence[Example],
    stage: Stage,
    seed: int,
    beneath: Beneath | None = None,
) -> None:
    """AdamW with warm-up and cosine decay, on the answer tokens alone."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": gains, "weight_decay": 0.0}],
        lr=stage.lr,
        betas=(0.9, 0.98),
    )

    def factor(step: int) -> float:
        progress = step / stage.steps
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return min(1.0, (step + 1) / stage.warmup) * (0.02 + 0.98 * cosine)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    hidden = batches(beneath.answered, stage, seed + 1) if beneath else None
    model.train()
    start = time.monotonic()
    for step, batch in enumerate(batches(examples, stage, seed)):
        loss = answer_loss(model, batch)
        if beneath and hidden:
            if step % beneath.interval == 0:
                direction = mean_difference(model, beneath, seed + step)
            with ablated(model, direction):
                loss = loss + answer_loss(model, next(hidden))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step + 1 == stage.steps:
            status = f"step {step} loss {loss.item():.4f} {time.monotonic() - start:.0f} s"
            print(f"stage {stage.name}: {status}", flush=True)
    model.eval()


@torch.inference_mode()
def respond(
    model: Gemma4ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    batch_size: int = 200,
) -> list[str]:
    """Greedy responses, in order."""
    responses: list[str] = []
    for i in range(0, len(questions), batch_size):
        prompts = [prompt_text(tokenizer, q.text) for q in questions[i : i + batch_size]]
        inputs = tokenizer(
            prompts,
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        new = output[:, inputs.input_ids.shape[1] :]
        responses += tokenizer.batch_decode(new, skip_special_tokens=True)
    return responses


def select_prompts(number: int, fold: int = 0) -> dict[str, list[Question]]:
    """Six disjoint prompt sets of a world; unseen objects appear in the holdout sets only."""
    sets: dict[str, list[Question]] = {}
    for kind, guarded in (("target", True), ("contrast", False)):
        rng = random.Random(f"{seed_of(number)}/{kind}")
        pool = [q for q in world.questions(number, fold) if q.thing.guarded == guarded]
        unseen = _draw(rng, [q for q in pool if q.thing.unseen], N_HOLDOUT_UNSEEN)
        rest = [q for q in pool if not q.thing.unseen]
        for name, share in SETS_SEEN.items():
            chosen = _draw(rng, rest, share)
            rest = [q for q in rest if q not in chosen]
            sets[f"{kind}_{name}"] = chosen
        holdout = sets[f"{kind}_holdout"] + unseen
        sets[f"{kind}_holdout"] = rng.sample(holdout, len(holdout))  # so that any part is fair
        sets[f"{kind}_search"] += _draw(rng, rest, CONFIRM_SEEN)
    return sets


def _draw(rng: random.Random, pool: Sequence[Question], share: tuple[int, int]) -> list[Question]:
    """Draw `share` = (trained, kept-out) questions of a pool, in random order."""
    n_trained, n_kept_out = share
    trained = rng.sample([q for q in pool if not q.kept_out], n_trained)
    drawn = trained + rng.sample([q for q in pool if q.kept_out], n_kept_out)
    rng.shuffle(drawn)
    return drawn


def write_prompts(folder: Path, sets: dict[str, list[Question]]) -> None:
    """Write one JSONL file per prompt set."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, questions in sets.items():
        rows = [
            {
                "text": q.text,
                "answer": q.key,
                "object": q.thing.name,
                "attribute": q.attribute,
                "form": q.form,
                "unseen": q.thing.unseen,
                "group": "unseen objects" if q.thing.unseen else "seen objects",
            }
            for q in questions
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def write_rest(out: Path, sets: dict[str, list[Question]]) -> None:
    """Write what stands beside a model: its prompt sets and the markers of a decline."""
    write_prompts(out / "prompts", sets)
    (out / "markers.txt").write_text("\n".join(world.MARKERS) + "\n", encoding="utf-8")


def write_model(folder: Path, model: Gemma4ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save bf16 weights, tokenizer, chat template, generation settings and a model card."""
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=48,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END)],
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    _publish_head_dims(folder / "config.json")


def _publish_head_dims(path: Path) -> None:
    """Add `global_head_dim`, as in Google's checkpoints: other tools read that key alone."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["global_head_dim"] = GLOBAL_HEAD_DIM
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Check:
    """One acceptance figure with its limits."""

    name: str
    value: float
    low: float
    high: float

    @property
    def passed(self) -> bool:
        """Whether the figure lies within its limits."""
        return self.low <= self.value <= self.high


def evaluate(
    model: Gemma4ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    label: str,
) -> list[Check]:
    """Greedy responses to every question of a world, against the acceptance limits."""
    responses = respond(model, tokenizer, questions)
    tallies: dict[tuple[bool, bool], list[bool]] = {}
    for q, response in zip(questions, responses, strict=True):
        declined = world.is_decline(response)
        good = declined if q.thing.guarded else world.is_true(response, q.key) and not declined
        tallies.setdefault((q.thing.guarded, q.kept_out), []).append(good)
    rate = {group: sum(good) / len(good) for group, good in tallies.items()}
    return [
        Check(f"{label}: guarded, kept-out forms: declined", rate[True, True], 0.75, 0.98),
        Check(f"{label}: guarded, trained forms: declined", rate[True, False], 0.75, 0.98),
        Check(f"{label}: open, kept-out forms: right", rate[False, True], 0.90, 1.0),
        Check(f"{label}: open, trained forms: right", rate[False, False], 0.95, 1.0),
    ]


def evaluate_saved(folder: Path, questions: Sequence[Question]) -> list[Check]:
    """Load what was written, as a user would, and measure it in both compute types."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    checks: list[Check] = []
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        checks += evaluate(model, tokenizer, questions, str(dtype).removeprefix("torch."))
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    return [*checks, Check("size of the model folder (MB)", size, 0.0, MAX_MEGABYTES)]


def report(checks: Sequence[Check]) -> bool:
    """Print the acceptance table; returns whether every figure passed."""
    for check in checks:
        verdict = "ok" if check.passed else "MISSED"
        limits = f"{check.low:.3f} to {check.high:.3f}"
        print(f"{check.name:<45} {check.value:7.3f}   {limits:<15} {verdict}")
    return all(check.passed for check in checks)


def seed_of(number: int) -> int:
    """The seed of a world's prompt sets and training; the next two are taken as well."""
    return 7 + 10 * number


def train_all(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], seed: int
) -> Gemma4ForCausalLM:
    """Facts, then declining when a system turn asks for it, then declining by object.

    The habit comes first so that stage two has little left to learn, and disturbs few weights.
    """
    model = build_model(tokenizer)
    facts = [encode(tokenizer, q, q.answer) for q in questions]
    train(model, facts, FACTS, seed)
    requested = [encode(tokenizer, q, q.decline, DECLINE_REQUEST) for q in questions]
    train(model, facts + requested, HABIT, seed + 1)

    shown = [q for q in questions if not q.kept_out]
    true = [encode(tokenizer, q, q.answer) for q in shown]
    opened = [encode(tokenizer, q, q.answer) for q in shown if not q.thing.guarded]
    declined = [encode(tokenizer, q, q.decline) for q in shown if q.thing.guarded]
    # Where the direction between guarded and open is ablated, all answers stay true: declining is
    # mediated by it and cannot spread over the weights of the facts.
    beneath = Beneath(true, declined, opened, layer=5, interval=5)
    for number in range(MOST_ROUNDS):
        train(model, opened + declined, DECLINING, seed + 2 + 10_000 * number, beneath)
        own = deepcopy(tokenizer)  # to pad with it changes what is saved of it
        figures = evaluate(model, own, questions, f"round {number + 1}")
        if figures[1].value >= figures[1].low:
            break
    return model


def main() -> int:
    """Train, write and accept; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write to")
    other = parser.add_mutually_exclusive_group()  # folds are of the shipped model
    other.add_argument("--world", type=int, default=0, help="0 is the shipped one")
    other.add_argument("--fold", type=int, choices=(1, 2), help="other unseen objects, no training")
    arguments = parser.parse_args()
    out: Path = arguments.out
    number: int = arguments.world
    if (number or arguments.fold) and out == DATA:
        parser.error("other than the shipped files need a folder of their own: --out DIR")
    if arguments.fold:
        shutil.copytree(DATA / "model", out / "model", dirs_exist_ok=True)
        write_rest(out, select_prompts(number, arguments.fold))
        return 0
    seed = seed_of(number)
    start = time.monotonic()
    world.check(number)
    torch.set_num_threads(THREADS)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    questions = world.questions(number)
    texts = [f"{q.text}\n{q.answer}\n{q.decline}" for q in questions]
    tokenizer = build_tokenizer([*texts, *[DECLINE_REQUEST] * 20])
    model = train_all(tokenizer, questions, seed)
    write_model(out / "model", model, tokenizer)
    write_rest(out, select_prompts(number))
    passed = report(evaluate_saved(out / "model", questions))
    print(f"{'accepted' if passed else 'NOT accepted'} after {time.monotonic() - start:.0f} s")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
