"""The server of the pages: NiceGUI behind the guard, on this machine's loopback alone."""

from __future__ import annotations

import secrets
import socket
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from nicegui import ui

from excise.errors import ConfigError
from excise.page.front_page import FrontPage
from excise.page.guard import Guard
from excise.page.run_page import RunPage
from excise.page.shelf import Shelf
from excise.page.styling import CSS

HOST = "127.0.0.1"


def serve(
    roots: Sequence[Path], port: int, ready: Callable[[str], None], *, trust_run: bool = False
) -> None:
    """Serve pages until the process is interrupted.

    Args:
        roots: run folders, or folders of runs: all that pages may see.
        port: of the loopback; 0 takes a free one.
        ready: told of the address, which holds the token, once it answers.
        trust_run: let code run that run folders name.

    Raises:
        RunStateError: one of the roots is no folder.
        ConfigError: the port is taken.
    """
    shelf = Shelf(roots, trust_run=trust_run)
    # To find its server NiceGUI looks at every object of the process, torch's deprecated ones among them.
    warnings.filterwarnings("ignore", category=FutureWarning, module="nicegui")
    try:
        with _listening(port) as listener:
            number, token = listener.getsockname()[1], secrets.token_urlsafe(24)
            app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
            _register(shelf)
            ui.run_with(
                app,
                title="Excise",
                dark=None,
                language="en-US",
                tailwind=False,
                show_welcome_message=False,
                gzip_middleware_factory=None,  # nothing leaves this machine
                reconnect_timeout=30.0,
            )
            guard = Guard(app, number, token)
            config = uvicorn.Config(
                guard,
                log_level="error",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=2,
            )
            ready(f"http://{HOST}:{number}/{token}/")
            uvicorn.Server(config).run(sockets=[listener])
    finally:
        shelf.close()


def _listening(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(
            f"port {port} of {HOST} cannot be used ({error}): give another --port"
        ) from None
    listener.listen()
    return listener


def _register(shelf: Shelf) -> None:
    """Make the pages known to NiceGUI."""
    ui.add_css(CSS, shared=True)

    @ui.page("/")
    def front_page() -> None:
        FrontPage(shelf).build()

    @ui.page("/compare")
    def compare(runs: str = "") -> None:
        FrontPage(shelf).build_comparison(runs)

    @ui.page("/run/{key}")
    def run_page(key: str) -> None:
        RunPage(shelf, key).build()
