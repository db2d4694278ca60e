"""Ray, started on this machine for one search, or a cluster of it that runs already."""

from __future__ import annotations

import logging
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from excise.errors import ClusterError, ConfigError, first_line

_STORE = 2**27  # bytes of the object store, beside what is sent to the workers
_LOOPBACK = "127.0.0.1"
_KNOCK = 10.0  # seconds


def import_ray() -> Any:
    """Return the module.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "--workers and --ray need Ray, which is not installed: pip install 'excise[cluster]'"
        ) from None
    return ray


@contextmanager
def started(workers: int, sent: int) -> Iterator[Any]:
    """Have Ray on this machine alone: loopback, no dashboard, nothing left behind.

    Args:
        workers: actors that will run.
        sent: bytes that each of them is sent; they are in memory once.

    Raises:
        ClusterError: it cannot be started.
    """
    ray = import_ray()
    folder = tempfile.mkdtemp(prefix="excise-ray-")  # its sockets' paths must be short
    try:
        with _named("Ray cannot be started here"), _own_signals():
            ray.init(
                address="local",
                num_cpus=workers,
                num_gpus=0,  # GPUs are given out by us: this process has the first
                object_store_memory=_STORE + 2 * sent,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address=_LOOPBACK,
                _temp_dir=folder,
            )
        yield ray
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def joined(address: str) -> Iterator[Any]:
    """Join the cluster at `address` ("auto", or host:port) for a while.

    Raises:
        ClusterError: nothing answers there.
    """
    ray = import_ray()
    with (
        _named(f"no Ray cluster answers at {address} (`ray start --head` starts one)"),
        _own_signals(),
    ):
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield ray
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Ask whether anything answers: Ray itself would try for minutes, and then end the process.

    Raises:
        OSError: nothing does.
        ValueError: it is no address.
    """
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK):
        pass


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep what this process does when it is told to end: Ray puts its own in place."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _named(fault: str) -> Iterator[None]:
    """Say of Ray's errors what they mean here."""
    try:
        yield
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ClusterError(f"{fault}: {first_line(error)}") from error
