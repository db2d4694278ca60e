"""What a chat costs: processor time to the first token and to each later one, by the number of columns.

    python bench/talking.py [--models demo smollm2]

The original and edits of rank one on every writer answer a text of 24 tokens, and then one that goes on
with 8 more, from the cache and without it. Processor time of one thread, the median of three.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from excise.chat.columns import Columns
from excise.chat.sampling import Sampling
from excise.checkpoints.loading import load
from excise.config import ModelSection
from excise.engine.stacking import ORIGINAL, CandidateEdits
from excise.model.edits import Edit

TURN, MORE, NEW, TIMES = 24, 8, 6, 3


def edits(writers: list[object], seed: int) -> CandidateEdits:
    """Return small random edits."""
    draw = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return 1e-3 * torch.randn(*shape, generator=draw)

    shapes = [writer.shape for writer in writers]  # type: ignore[attr-defined]
    return [Edit(some(rows, 1), some(1, columns)) for rows, columns in shapes]


def answer(columns: Columns, texts: list[tuple[int, ...]]) -> tuple[float, float]:
    """Return the seconds to the first token, and those of each later one."""
    begun = time.process_time()
    stream = columns.answer(texts, Sampling(limit=NEW), 0)
    next(stream)
    first = time.process_time() - begun
    steps = sum(1 for _ in stream)
    return first, (time.process_time() - begun - first) / max(1, steps)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["demo", "smollm2"])
    torch.set_num_threads(1)
    print(
        "| model | columns | first token, ms | each later one, ms | second turn, cached, ms | anew, ms |"
    )
    print("|---|---|---|---|---|---|")
    for name in parser.parse_args().models:
        loaded = load(ModelSection(source=name))
        writers = loaded.anatomy.select(())
        draw = torch.Generator().manual_seed(1)
        ids = torch.randint(50, 400, (TURN + NEW + MORE,), generator=draw).tolist()
        for count in (1, 4):
            some = [ORIGINAL, *(edits(list(writers), seed) for seed in range(count - 1))]
            found = []
            for _ in range(TIMES + 1):
                columns = Columns(loaded, writers, some)
                first, later = answer(columns, [tuple(ids[:TURN])] * count)
                held = columns._group.held if columns._group else [ids[:TURN]] * count
                texts = [(*row, *ids[-MORE:]) for row in held]
                again = answer(columns, texts)[0]
                anew = answer(Columns(loaded, writers, some), texts)[0]
                found.append((first, later, again, anew))
            figures = [1000 * statistics.median(column) for column in zip(*found[1:], strict=True)]
            print(
                f"| {name} | {count} | " + " | ".join(f"{f:.0f}" for f in figures) + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
