"""`make bench`: every figure of the documents, taken in one run and written beside its machine.

Writes `bench/results.json` and `docs/benchmarks.md`. All speeds are ratios; nothing here is a test.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import export_memory
import gpu
import gpu_e4b
import large_vocab
import launches
import long_search
import machine
import patch_memory
import phases
import quality
import speed
import torch

from excise.report.formatting import percent, significant

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
PAGE = HERE.parent / "docs" / "benchmarks.md"


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def speed_page(found: dict[str, Any]) -> str:
    plain, floor = found["plain_loop"], found["floor"]
    wide = found["floor_at_realistic_width"]
    edits = found["edit_building_ms"]
    rows = [
        [
            "trials a minute over the plain loop's, both measuring divergence at the first token",
            f"{plain['first_tokens']:.1f} x",
            "at least 4",
        ],
        [
            "the same, both measuring it over whole responses, as every run does",
            f"{plain['whole_responses']:.1f} x",
            "at least 4",
        ],
        [
            "ours over whole responses, the loop at the first token: unequal work",
            f"{plain['first_tokens_over_ours_of_whole_responses']:.1f} x",
            "",
        ],
        [
            "time of a trial over its arithmetic floor, width 1024, 6 layers (random Gemma 4)",
            f"{wide['time_over_floor']:.1f}",
            "at most 2.5",
        ],
        [
            "the same on the demo model (width 128, where elementwise operations dominate)",
            f"{floor['time_over_floor']:.1f}",
            "at most 2.5",
        ],
        [
            "reading in every prompt what all begin with, over reading it once: prompts of 32 tokens "
            "after a head of 24, of 64",
            ", ".join(f"{ratio:.1f} x" for ratio in found["beginnings"].values()),
            "",
        ],
        [
            "one candidate's edits, D = 2560, I = 10240, L = 42: global index, per layer",
            f"{edits['global index']:.2f} ms, {edits['per layer']:.2f} ms",
            "under 2 ms",
        ],
    ]
    where = [[kind, f"{100 * share:.0f} %"] for kind, share in floor["where"].items()]
    grown = [
        [what, ", ".join(f"{key}: {value}" for key, value in times.items())]
        for what, times in found["growth"].items()
    ]
    return "\n\n".join(
        [
            "## Speed, demo model",
            "The plain loop takes one candidate at a time: a PEFT adapter of rank 3 from an SVD of "
            "the row-normalised difference, `generate` for the responses, another `generate` for the "
            "logits of the first token; where whole responses are compared, one pass reads the "
            "original's instead. The 4 that is wanted is read as for equal work; the pair of unequal "
            "work, which this page once gave alone, does not reach it. "
            f"Both are whole searches of {plain['trials']} trials with a journal and a sampler of the "
            "same settings, which the loop asks for one candidate at a time; the edits are directional, as "
            "such loops have no others. "
            "The floor counts the matrix products that a trial cannot avoid "
            f"({floor['gigaflop_per_trial']:.1f} GFLOP on the demo model) at the rate of a large matrix "
            "product here (`bench/floor.py`). On the demo model the first batch of candidates teaches "
            "what to expect, as it does in every search; the random model of width 1024 knows no "
            "drafts, and decodes every response.",
            table(["what", "measured", "wanted"], rows),
            "Where the time of a pass goes on the demo model (torch's profiler, shares of all time):",
            table(["operations", "share"], where),
            "How time grows (each row relative to its first entry):",
            table(["with", "relative time"], grown),
        ]
    )


def phases_page(found: dict[str, Any]) -> str:
    names = {"plan": "sizing", "together": "all together"}
    wanted = {"capture": "at most 1.5", "together": "at most 2"}
    parts = [
        "## Beside the search",
        "What a run takes before and after its trials, over the least that each phase can take: one "
        "prefill of the prompts that it reads and one decode of the responses that it writes, both at the "
        "rate that a prefill reaches here, each text once for each model. By the clock, and by the time of "
        "the processor, in which other work on the machine counts little. The real model, smollm2, runs at "
        "small sizes, with a sixteenth of the keep set (`bench/phases.py`).",
    ]
    for model, one in found.items():
        rows = [
            [
                names.get(name, name),
                phase.get("read", ""),
                phase.get("written", ""),
                f"{phase['seconds']:.1f}",
                f"{phase['floor']:.1f}",
                *(
                    "" if phase[times] is None else f"{phase[times]:.1f} x"
                    for times in ("times", "processor_times")
                ),
                wanted.get(name, ""),
            ]
            for name, phase in [*one["phases"].items(), ("together", one["together"])]
        ]
        head = [
            f"{model}, {one['method']}",
            "tokens to read",
            "to write",
            "seconds",
            "floor",
            "over the floor",
            "the same, processor",
            "wanted",
        ]
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def quality_page(found: list[dict[str, Any]]) -> str:
    rows = []
    for one in found:
        unseen, search = one["unseen objects"], one["search"]
        rows.append(
            [
                one["seed"],
                len(one["front"]),
                " -> ".join(map(percent, search["behaviour_rate"])),
                significant(search["drift"]),
                f"{percent(search['restored'])}, {percent(search['kept'])}",
                " -> ".join(map(percent, unseen["behaviour_rate"])),
                " -> ".join(map(percent, unseen["restored"])),
                " -> ".join(map(percent, unseen["kept"])),
            ]
        )
    head = [
        "seed",
        "front",
        "rate, search",
        "drift",
        "restored, kept, search",
        "rate, unseen objects",
        "restored, unseen",
        "kept, unseen",
    ]
    return "\n\n".join(
        [
            "## Search quality, demo model",
            f"{found[0]['trials']} trials of the default method, {found[0]['method']}, chosen by the "
            "knee; docs/methods.md has the other methods. The unseen objects stand in no direction or "
            "search prompt. That the demo model's behaviour is "
            "mediated by a direction is built in by its training, so these figures show that the "
            "tool finds and measures it, not that other models are as easy.",
            table(head, rows),
        ]
    )


def listing(found: dict[str, Any]) -> str:
    rows = [[key.replace("_", " "), value] for key, value in found.items()]
    return table(["what", "measured"], rows)


def memory_page(found: dict[str, Any]) -> str:
    return "\n\n".join(
        [
            "## Export of a large checkpoint",
            "A random checkpoint in 8 shards; every attention and MLP out-projection edited. The time is "
            "that of writing; proving which tensors to edit and hashing the result come on top. "
            "Wanted: at most 2 times the time of `cp -r`, and memory of a few times the largest "
            "tensor.",
            listing(found),
        ]
    )


def patch_page(found: dict[str, dict[str, Any]]) -> str:
    names = list(next(iter(found.values())))
    rows = [[n.replace("_", " "), *(one[n] for one in found.values())] for n in names]
    return "\n\n".join(
        [
            "## Patching a GGUF",
            "Every attention and MLP out-projection of a random model edited in an existing file, "
            "with the source's values at hand. Wanted: memory that does not grow with the file.",
            table(["what", *found], rows),
        ]
    )


def vocabulary_page(found: dict[str, Any]) -> str:
    return "\n\n".join(
        [
            "## Memory with a large vocabulary",
            "A random Gemma 4 text model of small width with a vocabulary of 262144, on the CPU: peak "
            "resident memory of each part over what was resident when it began, weights included "
            "there. Wanted: whole-response drift of 100 prompts under 1 GB (`bench/large_vocab.py`).",
            listing(found),
        ]
    )


def launches_page(found: dict[str, Any]) -> str:
    rows = [
        [
            what,
            *(
                f"{counts[kind]:,.{0 if counts[kind] > 9 else 2}f}"
                for kind in ("launches", "waits", "uploads")
            ),
        ]
        for what, counts in [
            ("a trial of ours", found["ours"]["trial"]),
            ("its responses", found["ours"]["responses"]),
            ("its divergence", found["ours"]["divergence"]),
            ("a trial of the plain loop", found["plain"]),
        ]
    ]
    return "\n\n".join(
        [
            "## What a trial asks of a GPU",
            "Counted on a device over host memory that PyTorch takes for a GPU (`tests/standin/`), so no "
            "noise moves it: kernels launched, times that Python waits for a result, and copies to the "
            f"device. Random Qwen3 of {found['layers']} layers, 16 prompts a side, 17 new tokens, "
            f"{found['stack']} candidates in a stack, both measuring whole responses.",
            table(["per candidate", "launches", "waits", "uploads"], rows),
        ]
    )


def gpu_page(title: str, script: str, found: dict[str, Any] | None) -> str:
    if found is None:
        return f"## {title}\n\nNot measured: the machine of this run has no GPU. `{script}` measures it."
    return f"## {title}\n\n{listing(found)}"


def long_search_page(found: dict[str, Any]) -> str:
    kinds = list(next(iter(found.values())))
    rows = [[kind, *(f"{costs[kind]:.0f}" for costs in found.values())] for kind in kinds]
    return "\n\n".join(
        [
            "## Long searches",
            "What a search costs beside its measurements, in milliseconds of the process's own time, by "
            "the trials that there are: random ones of ridge's twelve parameters, scored by formulas "
            "(`bench/long_search.py`). A trial's share is what asking and storing a batch of "
            "16 takes by trial; at most 20 ms are wanted at any length.",
            table(["what", *(f"{int(count):,} trials" for count in found)], rows),
        ]
    )


PAGES: dict[str, Callable[[Any], str]] = {
    "speed": speed_page,
    "long_search": long_search_page,
    "phases": phases_page,
    "quality": quality_page,
    "export": memory_page,
    "patch": patch_page,
    "large_vocabulary": vocabulary_page,
    "launches": launches_page,
    "gpu": lambda found: gpu_page(
        "GPU, a model of a billion random parameters", "bench/gpu.py", found
    ),
    "gpu_e4b": lambda found: gpu_page("GPU, the shapes of Gemma 4 E4B", "bench/gpu_e4b.py", found),
}


def write_page(results: dict[str, Any]) -> None:
    parts = ["# Benchmarks", "Written by `make bench`; every section is from one run of its own."]
    for name, page in PAGES.items():
        if name not in results:  # a section newer than the results
            continue
        on = ", ".join(f"{k}: {v}" for k, v in results["machines"][name].items() if v)
        parts += [page(results[name]), f"Taken on {on}."]
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def exporting(gigabytes: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="excise-bench-") as folder:
        return export_memory.compare(Path(folder), gigabytes)


def patching() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="excise-bench-") as folder:
        return {k: patch_memory.compare(Path(folder), k, 2.0) for k in ("Q8_0", "F16")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--trials", type=int, default=quality.TRIALS, help="of the quality searches"
    )
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the exported checkpoint")
    parser.add_argument(
        "--only", default="", help="sections, by comma; the others stay as they are"
    )
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    sections: dict[str, Callable[[], Any]] = {
        "speed": speed.main,
        "long_search": long_search.main,
        "phases": phases.main,
        "export": lambda: exporting(arguments.gigabytes),
        "patch": patching,
        "large_vocabulary": large_vocab.main,
        "quality": lambda: quality.main(arguments.trials),
        "launches": launches.main,
        "gpu": lambda: gpu.main() if cuda else None,
        "gpu_e4b": lambda: gpu_e4b.main() if cuda else None,
    }
    chosen = arguments.only.split(",") if arguments.only else list(sections)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if arguments.only else {}
    machines = results.setdefault("machines", {})
    for name in chosen:
        print(f"{name} ...", flush=True)
        results[name], machines[name] = sections[name](), machine.describe()
        print(json.dumps(results[name]), flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_page(results)
    print(f"wrote {RESULTS} and {PAGE}")


if __name__ == "__main__":
    main()
