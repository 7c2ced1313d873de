"""Loads hivemind late, off the event loop. Used by `daemon` and `hivemind_directory`."""

from __future__ import annotations

import asyncio
import importlib
from types import ModuleType


async def load_hivemind() -> ModuleType:
    """The module `kademlia.guarded_p2p`, and with it hivemind: 2 s of a thread, the first time.

    Best called early, before this peer serves anybody.
    """
    return await asyncio.to_thread(importlib.import_module, "shoal.dht.kademlia.guarded_p2p")
