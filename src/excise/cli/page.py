"""`excise ui`: the page is served, and its address printed."""

from __future__ import annotations

import argparse
from pathlib import Path

from excise.cli import terminal
from excise.errors import ConfigError

DOES = "show runs in the browser: watch, talk, export, start"


def fill(sub: argparse.ArgumentParser) -> None:
    """Add the flags that no other command has."""
    text = "run folders, or folders of runs: all that the page may see (default: runs)"
    sub.add_argument("folders", type=Path, nargs="*", metavar="DIR", help=text)
    text = "port on this machine's loopback (default: a free one)"
    sub.add_argument("--port", type=int, default=0, metavar="P", help=text)
    text = "print the address, and open no browser"
    sub.add_argument("--no-browser", action="store_true", help=text)


def show(arguments: argparse.Namespace) -> None:
    """Serve the page until it is interrupted.

    Raises:
        ConfigError: the extra `ui` is not installed, or the port is taken.
        RunStateError: a folder is none.
    """
    try:
        from excise.page.server import serve
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the page needs {error.name}, which is not installed: pip install 'excise[ui]'"
        ) from None

    import webbrowser

    def ready(address: str) -> None:
        terminal.say(address)
        if not arguments.no_browser:
            webbrowser.open(address)

    folders = arguments.folders or [Path("runs")]
    serve(folders, arguments.port, ready, trust_run=arguments.trust_run)
