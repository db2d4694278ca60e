"""`python -m fuzz`: meet so many inputs, print the table and every fault; 1 where there is one."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

# Before any library: none may reach for the network, or make threads that a fork would lose.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

from fuzz.kinds import KINDS
from fuzz.running import SECONDS


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="decides the inputs (default 0)")
    parser.add_argument("--count", type=int, default=1500, help="how many inputs (default 1500)")
    parser.add_argument("--number", type=int, action="append", help="this input alone; it is kept")
    parser.add_argument("--only", choices=KINDS, action="append", help="this kind alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of one command")
    parser.add_argument(
        "--keep", type=Path, default=Path("runs/fuzz"), metavar="DIR", help="what fails"
    )
    return parser.parse_args()


def main() -> int:
    """Run it; 0 where nothing is wrong."""
    from fuzz import preparing
    from fuzz.fuzzing import Fuzz, listing, table

    given = arguments()
    begun = time.monotonic()
    preparing.load_libraries()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        ground = preparing.ground(Path(scratch))
        folder = given.keep.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        fuzz = Fuzz(
            ground, folder, given.seed, tuple(KINDS), given.seconds, keep=given.number is not None
        )
        numbers = given.number or preparing.numbers(given.count, given.only)
        sound = [] if given.number else fuzz.meet_all(range(len(KINDS)), given.jobs, sound=True)
        wrong = [one for one in sound if one.faults]
        if wrong:
            sys.stdout.write("undamaged input fails:\n" + listing(wrong, given.seed) + "\n")
        if any(fault.kind == "wrong result" for one in wrong for fault in one.faults):
            return 1  # no verdict on damaged input would mean anything
        verdicts = fuzz.meet_all(numbers, given.jobs)
    sys.stdout.write(table(verdicts) + "\n")
    sys.stdout.write(listing(verdicts, given.seed) + "\n")
    sys.stdout.write(f"{len(verdicts)} inputs in {time.monotonic() - begun:.0f} s\n")
    return int(any(one.faults for one in [*sound, *verdicts]))


if __name__ == "__main__":
    sys.exit(main())
