"""`python -m shoal.node.cli`: the same as `shoal`."""

from __future__ import annotations

from shoal.node.cli.app import main

if __name__ == "__main__":
    main()
