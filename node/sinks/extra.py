"""Libraries that only some need: what is missing is named with the command that installs it."""

from __future__ import annotations

from importlib.util import find_spec

from shoal.protocol.errors import UsageError


def require_extra(package: str, option: str) -> None:
    """Raises UsageError where `package`, an extra of the same name, is not installed."""
    if find_spec(package) is None:
        raise UsageError(
            f"{option} needs the package {package}, which is not installed here\n"
            f"install it with: pip install 'shoal[{package}]'"
        )
