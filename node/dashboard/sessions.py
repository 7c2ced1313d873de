"""Sessions as signed cookies: the server remembers only the key, and which sessions were signed out.

The key lies beside the control socket, for its owner's eyes alone, so that a restart of page or daemon
logs nobody out. Called by the guard.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import struct
from collections.abc import Callable
from pathlib import Path

from shoal.protocol.errors import StorageError
from shoal.protocol.private_files import create_private, read_private

SESSION_S = 12 * 3600.0
KEY_BYTES = 32
_ID_BYTES = 16
_MOST_ENDED = 1024  # sign-outs remembered; beyond that the oldest, which ends by time, is forgotten
_BODY = struct.Struct(f">Q{_ID_BYTES}s")
_COOKIE_CHARACTERS = 256


def session_key(path: Path) -> bytes:
    """The key at `path`, made if there is none. Raises StorageError."""
    create_private(path, secrets.token_bytes(KEY_BYTES))
    key = read_private(path, KEY_BYTES)
    if key is None or len(key) != KEY_BYTES:
        raise StorageError(f"{path} is no key of ours; remove it, and everybody signs in again")
    return key


class Sessions:
    """Makes and checks cookies. `clock`: Unix seconds."""

    def __init__(self, key: bytes, clock: Callable[[], float]) -> None:
        self._key, self._clock = key, clock
        self._ended: dict[bytes, None] = {}

    def begin(self) -> str:
        """A new session's cookie."""
        body = _BODY.pack(int(self._clock() + SESSION_S), secrets.token_bytes(_ID_BYTES))
        return base64.urlsafe_b64encode(body + self._seal(body)).decode()

    def check(self, cookie: str) -> bytes | None:
        """The session's id, None for one that is forged, over or ended."""
        if len(cookie) > _COOKIE_CHARACTERS:
            return None
        try:
            raw = base64.b64decode(cookie.encode("ascii"), b"-_", validate=True)
        except ValueError:
            return None
        body, seal = raw[: _BODY.size], raw[_BODY.size :]
        if not hmac.compare_digest(seal, self._seal(body)):
            return None
        until_s, session = _BODY.unpack(body)
        return None if until_s <= self._clock() or session in self._ended else bytes(session)

    def end(self, session: bytes) -> None:
        """Signed out: its cookie is worth nothing from now on."""
        while len(self._ended) >= _MOST_ENDED:
            self._ended.pop(next(iter(self._ended)))
        self._ended[session] = None

    def _seal(self, body: bytes) -> bytes:
        return hmac.digest(self._key, b"shoal dashboard session" + body, hashlib.sha256)
