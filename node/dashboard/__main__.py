"""`python -m shoal.node.dashboard CONTROL.SOCK [CERT KEY]`: the page's process, a child of the daemon.

Standard input is the listening socket. Ends with its parent.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from pathlib import Path

from shoal.node.dashboard.server import serve
from shoal.node.parent import die_with_parent


def main() -> None:
    """Serve until told to stop."""
    die_with_parent()
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s"
    )
    control, *tls = map(Path, sys.argv[1:])
    pair = (tls[0], tls[1]) if tls else None
    asyncio.run(serve(socket.socket(fileno=sys.stdin.fileno()), control, pair))


if __name__ == "__main__":
    main()
