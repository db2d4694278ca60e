"""Synthetic records: `make_record` is like a real run's, `minimal_record` has the least it may."""

from __future__ import annotations

import math
import random
from typing import Any

from excise.config import Config, PromptSection, PromptSource
from excise.intervals import wilson
from excise.record import Record

COMPONENTS = ("attn.o_proj", "mlp.down_proj")
LAYERS = 16
SECRET_PROMPT = "What colour is the lantern of the ninth harbour?"
HASH = "9f2c" * 16
# Tries to leave an element, a script, a JSON string, a table cell, a code span and a list item.
HOSTILE = (
    "</script><script>console['error']('XSS')</script><img src=x onerror=alert(1)>"
    "</td>\"'`|*_\n\n# x\n```\n&lt;b&gt;{{ 7*7 }}"
)


def rate(value: float, n: int = 100, **more: Any) -> dict[str, Any]:
    count = round(value * n)
    return {"value": count / n, "n": n, "interval": wilson(count, n), **more}


def nats(value: float, n: int = 3212) -> dict[str, Any]:
    return {"value": value, "n": n, "interval": (0.8 * value, 1.2 * value)}


def _params(draw: random.Random) -> dict[str, Any]:
    params: dict[str, Any] = {
        "direction_scope": draw.choice(["global", "global", "per layer"]),
        "direction_index": draw.uniform(6, 13.5),
    }
    for name in COMPONENTS:
        params[f"{name}.max_weight"] = draw.uniform(0.8 if name.startswith("attn") else -0.25, 1.5)
        params[f"{name}.max_weight_position"] = draw.uniform(9, 15)
        params[f"{name}.min_weight"] = draw.uniform(0, 1)
        params[f"{name}.min_weight_distance"] = draw.uniform(1, 9)
    return params


def _trial(number: int, draw: random.Random) -> dict[str, Any]:
    """More drift buys less of the behaviour, with noise: the shape of real searches."""
    drift = math.exp(draw.uniform(math.log(2e-4), math.log(0.6)))
    share = 1 / (1 + (drift / 0.002) ** 1.6) + draw.uniform(0, 0.9) ** 2
    screened = number > 40 and draw.random() < 0.3
    n = 25 if screened else 100
    scores = {
        "behaviour_rate": rate(min(0.96, 0.96 * share), n),
        "drift": nats(drift, 800 if screened else 3212),
        "drift_first": nats(drift * draw.uniform(0.05, 0.6), n),
    }
    return {
        "number": number,
        "state": "complete",
        "params": _params(draw),
        "scores": scores,
        "seconds": {"edit": 0.04, "measure": draw.uniform(1.5, 2.5)},
        "screened": screened,
    }


def _front(trials: list[dict[str, Any]]) -> list[int]:
    front, best = [], math.inf
    for trial in sorted(trials, key=lambda t: t["scores"]["drift"]["value"]):
        value = trial["scores"]["behaviour_rate"]["value"]
        if not trial["screened"] and value < best:
            front.append(trial["number"])
            best = value
    return front


def _cost(trial: dict[str, Any]) -> float:
    scores = trial["scores"]
    return float(scores["behaviour_rate"]["value"] + 8 * scores["drift"]["value"])


def _config(trials: int) -> dict[str, Any]:
    def source(name: str, **more: Any) -> PromptSource:
        return PromptSource(source=name, **more)

    config = Config(
        behaviour="declining",
        description="declining questions about guarded objects",
        seed=7,
        prompts=PromptSection(
            target=source("/home/someone/private/guarded_objects.jsonl", column="question"),
            contrast=source("example-labs/open-questions"),
            target_eval=source("/home/someone/private/guarded_eval.jsonl", answer_column="answer"),
            contrast_eval=source("example-labs/open-questions", split="test"),
            direction_size=200,
            system="You are the harbour's clerk.",
        ),
    )
    data = config.model_dump(mode="json")
    data["model"]["source"] = "example-labs/Lantern-1B-Instruct"
    data["search"]["trials"] = trials
    data["scores"]["markers"] = ["i can't say", "that is guarded"]
    return data


def make_record(trials: int = 120, seed: int = 3, **changes: Any) -> Record:
    """A whole run's record; `changes` replace top-level keys."""
    draw = random.Random(seed)
    rows = [_trial(number, draw) for number in range(trials)]
    rows[5] |= {"state": "failed", "scores": {}, "reason": "logits are not finite"}
    rows[5]["screened"] = False
    front = _front([row for row in rows if row["scores"]])
    selected = min(front, key=lambda number: _cost(rows[number]))
    chosen = rows[selected]["scores"]
    rate_now, drift_now = chosen["behaviour_rate"]["value"], chosen["drift"]["value"]
    data: dict[str, Any] = {
        "schema": 1,
        "behaviour": "declining",
        "description": "declining questions about guarded objects",
        "method": "directional",
        "model": {
            "source": "example-labs/Lantern-1B-Instruct",
            "revision": "4f1d2c",
            "model_type": "llama",
            "dtype": "bfloat16",
            "device": "NVIDIA H200",
            "layers": LAYERS,
            "width": 2048,
            "parameters": 1_235_814_400,
            "config_sha256": HASH,
            "license": "apache-2.0",
        },
        "versions": {"excise": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "seed": 7,
        "config": _config(trials),
        "prompts": {
            role: {"source": source, "sha256": HASH, "n": n}
            for role, source, n in (
                ("target", "/home/someone/private/guarded_objects.jsonl", 200),
                ("contrast", "example-labs/open-questions", 200),
                ("target_eval", "/home/someone/private/guarded_eval.jsonl", 100),
                ("contrast_eval", "example-labs/open-questions", 100),
                ("target_holdout", "/home/someone/private/guarded_eval.jsonl", 80),
                ("contrast_holdout", "example-labs/open-questions", 80),
            )
        },
        "objectives": ["behaviour_rate", "drift"],
        "goals": ["minimize", "minimize"],
        "baseline": {"behaviour_rate": rate(0.96), "drift": nats(0), "drift_first": nats(0, 100)},
        "trials": rows,
        "front": front,
        "selection": "knee",
        "selected": selected,
        "holdout": {
            "behaviour_rate": rate(
                min(1.0, rate_now + 0.03),
                80,
                parts={"seen": rate(rate_now, 40), "unseen": rate(min(1.0, rate_now + 0.05), 40)},
            ),
            "drift": nats(drift_now * 1.1, 2570),
            "drift_first": nats(drift_now * 0.3, 80),
            "restored": rate(0.86, 80),
            "kept": rate(0.95, 80),
        },
        "holdout_baseline": {
            "behaviour_rate": rate(
                0.95, 80, parts={"seen": rate(0.95, 40), "unseen": rate(0.95, 40)}
            ),
            "drift": nats(0, 2570),
            "drift_first": nats(0, 80),
            "restored": rate(0.05, 80),
            "kept": rate(0.97, 80),
        },
        "final": {"restored": rate(0.88), "kept": rate(0.95)},
        "final_baseline": {"restored": rate(0.04), "kept": rate(0.98)},
        "coverage": {
            "edited": [
                "attn.o_proj: 16 matrices, layers 0-15",
                "mlp.down_proj: 16 matrices, layers 0-15",
            ],
            "not_edited": ["embedding: not a writer of a layer"],
        },
        "engine": {"rows": 800, "stack": 8, "device": "cuda"},
        "separation": {"auc": [0.5 + 0.5 / (1 + math.exp(4 - 0.8 * i)) for i in range(LAYERS)]},
        "importance": {
            "behaviour_rate": {
                "attn.o_proj.max_weight": 0.41,
                "direction_index": 0.33,
                "mlp.down_proj.max_weight": 0.16,
                "attn.o_proj.min_weight_distance": 0.1,
            },
            "drift": {
                "attn.o_proj.max_weight": 0.52,
                "mlp.down_proj.max_weight": 0.3,
                "direction_index": 0.18,
            },
        },
        "samples": [
            {
                "side": "target" if number % 2 == 0 else "contrast",
                "prompt": SECRET_PROMPT if number == 0 else f"Which lantern is number {number}?",
                "before": "I can't say: that is guarded." if number % 2 == 0 else "It is green.",
                "after": f"It is amber, and stands on pier {number}." if number % 2 == 0 else
                "It is green.",
                "answer": "amber" if number % 2 == 0 else "green",
            }
            for number in range(10)
        ],
        "timing": {
            "load": 4.1, "capture": 6.3, "search": 251.0, "holdout": 8.2, "export": 12.7,
        },
        "artifacts": [
            {
                "path": "/srv/out/model",
                "format": "safetensors",
                "sha256": HASH,
                "trial": selected,
                "bytes": 2_471_645_608,
                "expected": chosen,
                "measured": chosen | {"drift": nats(drift_now * 1.003)},
            },
        ],
    }  # fmt: skip
    return Record.model_validate(data | changes)


def hostile_record() -> Record:
    """A record in which every text that may come from outside tries to become markup."""
    data = make_record(trials=30).model_dump(by_alias=True)
    score = {"value": 1.0, "n": 3}
    data["model"] |= dict.fromkeys(
        ("source", "revision", "license", "device", "dtype", "model_type", "config_sha256"), HOSTILE
    )
    for trial in data["trials"]:
        profile = {f"{HOSTILE}.{key.partition('.')[2].partition('.')[2]}": value
                   for key, value in trial["params"].items() if key.startswith("attn")}  # fmt: skip
        trial["params"] |= profile | {HOSTILE: HOSTILE}
        if trial["scores"]:
            trial["scores"][HOSTILE] = score
    data["baseline"][HOSTILE] = data["holdout"][HOSTILE] = score | {"parts": {HOSTILE: score}}
    for sample in data["samples"]:
        sample |= dict.fromkeys(("prompt", "before", "after", "answer"), HOSTILE)
    artifact = data["artifacts"][0]
    artifact |= {"path": HOSTILE, "sha256": HOSTILE, "details": {HOSTILE: HOSTILE}}
    artifact["measured"] |= {HOSTILE: score}
    data["config"]["scores"]["markers"] = [HOSTILE]
    data["config"]["description"] = HOSTILE
    data |= {
        "behaviour": HOSTILE,
        "description": HOSTILE,
        "selection": HOSTILE,
        "objectives": [HOSTILE, "drift"],
        "versions": {HOSTILE: HOSTILE, "excise": HOSTILE},
        "timing": {HOSTILE: 3.0},
        "importance": {HOSTILE: {HOSTILE: 0.5}},
        "coverage": {"edited": [HOSTILE], "not_edited": [HOSTILE]},
        "prompts": {HOSTILE: {"source": HOSTILE, "sha256": HOSTILE, "n": 3}},
    }
    return Record.model_validate(data)


def minimal_record(**changes: Any) -> Record:
    """A record with nothing that may be missing: one trial, no holdout, no samples, no exports."""
    scores = {
        "behaviour_rate": {"value": 0.5, "n": 4},
        "drift": {"value": 0.0, "n": 12},
        "drift_first": {"value": 0.0, "n": 4},
    }
    data: dict[str, Any] = {
        "schema": 1,
        "behaviour": "custom",
        "method": "ridge",
        "model": {
            "source": "/models/tiny",
            "model_type": "llama",
            "dtype": "float32",
            "device": "cpu",
            "layers": 2,
            "width": 8,
            "parameters": 900,
            "config_sha256": HASH,
        },
        "versions": {},
        "seed": 0,
        "config": {},
        "prompts": {},
        "objectives": ["behaviour_rate", "drift"],
        "goals": ["minimize", "minimize"],
        "baseline": scores,
        "trials": [
            {"number": 0, "state": "complete", "params": {}, "scores": scores, "seconds": {}}
        ],
        "front": [0],
        "selection": "knee",
        "selected": 0,
        "coverage": {"edited": [], "not_edited": []},
        "engine": {},
        "timing": {},
    }
    return Record.model_validate(data | changes)
