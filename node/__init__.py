"""One peer as people meet it: the daemon, the command line and its status, and the client for programs.

from shoal.node import AsyncClient, Client, Options
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.node.inference.blocking import Client
    from shoal.node.inference.client import AsyncClient, Options, Turn

__all__ = ["AsyncClient", "Client", "Options", "Turn"]


def __getattr__(name: str) -> object:
    """Imported when they are first asked for: commands that do not write text start without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from shoal.node.inference import blocking

    return getattr(blocking, name)
