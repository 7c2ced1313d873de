"""Keep freed memory in the process: called once at the start of the daemon and of benchmarks.

glibc gives freed blocks of a megabyte back to the kernel at once and gets fresh pages for the next frame;
in a virtual machine those page faults cost more than encryption and hashing (0.7 ms of 1 ms per MiB
measured). With higher thresholds frames reuse the same pages. The heaps it gives to threads are unmapped
whenever they are empty, whatever the thresholds, so all threads share the main one.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of mallopt, from malloc.h
_KEPT_BYTES = 256 << 20  # free memory at the heap's top that is not given back
_LARGEST_BYTES = 32 << 20  # the most that glibc allows; larger blocks still come and go by themselves


def keep_freed_memory() -> bool:
    """Raise glibc's thresholds; False where the C library is another one."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_THRESHOLD, _LARGEST_BYTES), (_TRIM_THRESHOLD, _KEPT_BYTES), (_ARENA_MAX, 1))
    return all([bool(mallopt(name, value)) for name, value in settings])
