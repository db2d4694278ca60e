"""What an adapter of a given error costs: rank, and the figures of the adapted demo model.

    python bench/adapter_rank.py [--trials 48]

Prints one row per method and error; `export.adapter_error` has its default from here.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from excise.cli import main as cli
from excise.config import load_config
from excise.report.stored_record import read_record
from excise.runs.pipeline import run

ERRORS = (0.5, 0.3, 0.2, 0.1, 0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=48)
    trials = parser.parse_args().trials
    print("method, error asked, rank, error, rate (edit -> adapter), drift (edit -> adapter)")
    for method in ("directional", "ridge"):
        with tempfile.TemporaryDirectory() as name:
            out = Path(name) / "run"
            flags = {
                "method": method,
                "model.source": "demo",
                "search.trials": trials,
                "search.startup_trials": trials // 2,
                "export.formats": [],
            }
            run(load_config(behaviour="demo", flags=flags), out)
            written = out / "config.toml"
            text = written.read_text(encoding="utf-8")
            for error in (None, *ERRORS):
                key, value = ("rank", 1) if error is None else ("error", error)
                lines = [x for x in text.splitlines() if not x.startswith("adapter_")]
                at = lines.index("[export]") + 1
                lines.insert(at, f"adapter_{key} = {value}")
                written.write_text("\n".join(lines) + "\n", encoding="utf-8")
                to = Path(name) / f"adapter-{value}"
                code = cli.main(
                    ["export", str(out), "--to", str(to), "--format", "adapter", "--quiet"]
                )
                assert code == 0
                artifact = read_record(out).artifacts[-1]
                pairs = (
                    f"{artifact.expected[k].value:.4g} -> {artifact.measured[k].value:.4g}"
                    for k in ("behaviour_rate", "drift")
                )
                details = artifact.details
                print(method, value, details["rank"], f"{details['error']:.3f}", *pairs, sep=", ")


if __name__ == "__main__":
    main()
