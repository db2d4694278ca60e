"""What the page of a run with many trials takes: time to draw, and memory of the browser and the server.

    PYTHONPATH=tests python bench/page.py [--trials 3000] [--shots DIR]

A made-up record is served and opened in the Chromium of the system.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil


def opened(address: str, trials: int, shots: Path | None) -> list[tuple[str, str]]:
    """Open the run in a browser; return figures by their names."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(180_000)
        page.goto(address)
        page.get_by_role("link", name="run", exact=True).wait_for()
        paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        found = [("first paint, ms", f"{page.evaluate(paint):.0f}")]
        page.get_by_role("link", name="run", exact=True).click()
        page.get_by_text(f"finished: {trials} trials").wait_for()
        page.get_by_role("heading", name="Trial").wait_for()
        session: Any = page.context.new_cdp_session(page)
        session.send("HeapProfiler.collectGarbage")
        heap = page.evaluate("performance.memory.usedJSHeapSize")
        found.append((f"script memory with {trials} trials, MB", f"{heap / 1e6:.0f}"))
        begun = time.monotonic()
        page.get_by_label("Any trial").fill("7")
        page.get_by_role("heading", name="Trial 7:").wait_for()
        found.append(
            (
                "from a number typed to its point shown, ms",
                f"{1000 * (time.monotonic() - begun):.0f}",
            )
        )
        if shots is not None:
            page.screenshot(path=shots / "page-many.png")
            page.emulate_media(color_scheme="dark")
            page.wait_for_timeout(1000)
            page.screenshot(path=shots / "page-dark.png")
        browser.close()
    return found


def main() -> None:
    """Print a table."""
    from records import make_record  # type: ignore[import-not-found]

    from excise.report.stored_record import write_record

    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=3000)
    parser.add_argument("--shots", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        run.mkdir()
        write_record(run, make_record(trials=arguments.trials))
        command = [sys.executable, "-m", "excise.cli", "ui", folder, "--no-browser"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        try:
            found = opened(address, arguments.trials, arguments.shots)
            used = psutil.Process(server.pid).memory_info().rss / 1e6
        finally:
            server.terminate()
            server.wait()
    for name, figure in [*found, ("memory of the server, MB", f"{used:.0f}")]:
        print(f"| {name} | {figure} |")


if __name__ == "__main__":
    main()
