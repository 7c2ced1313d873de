"""Whether the compiled kernels are there. `warm` builds them; until then, and without numba, torch serves.

Codecs look at `active` in each call. Both ways give the same bits, so peers need not agree on it.
"""

from __future__ import annotations

import logging
from types import ModuleType

log = logging.getLogger(__name__)

active: ModuleType | None = None  # shoal.compression.numba_kernels, once it is compiled


def warm() -> bool:
    """Compile the kernels, or load them from numba's cache; says whether they are there.

    Called once, off the loop: it takes seconds without a cache. Who encodes meanwhile uses torch.
    """
    global active
    try:
        from shoal.compression import numba_kernels
    except Exception as error:  # numba is absent, too old for this Python, or its compiler fails: only slower
        log.warning(
            "codecs stay on their portable path: no compiled kernels (%s: %s)", type(error).__name__, error
        )
        return False
    active = numba_kernels
    return True
