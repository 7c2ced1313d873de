"""One-time login links, kept by the owner's daemon: it prints them, the page's process asks it back.

So the secret stands in no argument list, no environment and no file. A link is good once and for a while.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable

LINK_S = 3600.0
MOST_LINKS = 16
CODE_BYTES = 24


class LoginCodes:
    """The codes that were given out and not used yet; the oldest go first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: seconds that only grow."""
        self._clock = clock
        self._until: dict[str, float] = {}

    def issue(self) -> str:
        """A new code."""
        while len(self._until) >= MOST_LINKS:
            self._until.pop(next(iter(self._until)))
        code = secrets.token_urlsafe(CODE_BYTES)
        self._until[code] = self._clock() + LINK_S
        return code

    def redeem(self, code: object) -> bool:
        """Whether this one was given out, is in time, and was not used before; it is used now."""
        if not isinstance(code, str) or not code.isascii():
            return False
        found = [known for known in self._until if hmac.compare_digest(known, code)]
        return bool(found) and self._until.pop(found[0]) > self._clock()
