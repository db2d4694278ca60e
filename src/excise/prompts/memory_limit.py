"""Limit the memory of a worker process that reads what others made."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def limit_memory(more: int) -> None:
    """Limit this process to so many bytes more than it has; beyond them, allocations fail.

    On Linux only: elsewhere such a limit is not kept, or there is none.
    """
    if sys.platform == "linux":
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
