"""`excise ui`: the page is served, and its address printed."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path

from excise.cli import terminal
from excise.errors import ConfigError


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

    def ready(address: str) -> None:
        terminal.say(address)
        if not arguments.no_browser:
            webbrowser.open(address)

    folders = arguments.folders or [Path("runs")]
    serve(folders, arguments.port, ready, trust_run=arguments.trust_run)
