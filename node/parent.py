"""Ends this process with the one that started it: for children of the demo, so that none outlives it.

`SHOAL_PARENT_PID` names the parent. On Linux the kernel sends the signal; there is a moment between start
and request, so the parent is checked again afterwards.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

ENVIRONMENT_KEY = "SHOAL_PARENT_PID"
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Honour the environment's wish, if there is one. Call first thing in the process."""
    parent = os.environ.get(ENVIRONMENT_KEY)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != int(parent):
        sys.exit(1)
