"""Loads hivemind late and undoes what importing it changes in this process. Used by `daemon`.

The import takes 2 s of a thread. It sets torch's sharing strategy, renames the log level WARNING, and
installs a log handler of its own; nothing of that stays.
"""

from __future__ import annotations

import asyncio
import logging
import os
import warnings
from types import ModuleType


async def load_hivemind() -> ModuleType:
    """The module `guarded_p2p`, and with it hivemind. Best called early, before this peer serves anybody."""
    return await asyncio.to_thread(_import_contained)


def _import_contained() -> ModuleType:
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "ERROR")  # also what p2pd writes
    import torch.multiprocessing

    strategy = torch.multiprocessing.get_sharing_strategy()  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside hivemind
        from shoal.dht import guarded_p2p
    torch.multiprocessing.set_sharing_strategy(strategy)  # type: ignore[no-untyped-call]

    from hivemind.utils.logging import use_hivemind_log_handler

    use_hivemind_log_handler("nowhere")
    logging.addLevelName(logging.WARNING, "WARNING")
    hivemind_logger = logging.getLogger("hivemind")
    hivemind_logger.setLevel(logging.WARNING)
    if not any(isinstance(handler, logging.NullHandler) for handler in hivemind_logger.handlers):
        hivemind_logger.addHandler(logging.NullHandler())  # else warnings reach the terminal unasked
    return guarded_p2p
