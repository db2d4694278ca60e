"""The memory that a process of ours may take while it reads what others made."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def limit_memory(more: int) -> None:
    """Let this process take so many bytes more than it has; beyond them, memory has run out for it.

    On Linux: elsewhere such a limit is not kept, or there is none.
    """
    if sys.platform == "linux":
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
