"""The command line, `shoal`: one file per family of commands. `main` is the entry point of the package.

Nothing here imports torch, hivemind or grpc before a command needs them, so that `shoal --help`,
`init`, `token` and every refusal answer at once.
"""

from __future__ import annotations

from shoal.node.cli.app import main

__all__ = ["main"]
