"""How many files a process may have open. Called when the daemon and the page of its owner begin."""

from __future__ import annotations

import resource

OPEN_FILES = 8192


def raise_file_limit() -> None:
    """Sockets are files: 1024 of them, a common limit, are few where somebody means ill."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, OPEN_FILES), hard))
