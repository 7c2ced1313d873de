"""The control socket: how `shoal status` and `shoal leave` talk to a daemon on the same machine.

A Unix socket (0600, inside a 0700 folder) that takes one JSON object a line and answers with one:

    {"do": "status"}   ->   {"ok": true, "result": {...}}
    {"do": "dance"}    ->   {"ok": false, "exit_code": 2, "text": "..."}
    {"do": "actions"}  ->   {"ok": true, "result": ["leave", "status", ...]}

The daemon passes its actions in; nothing here knows what they do. Requests, connections and waiting
are bounded, so a confused local process cannot grow the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from shoal.protocol import limits
from shoal.protocol.errors import PeerUnreachable, ShoalError, UsageError

Action = Callable[[Mapping[str, Any]], Awaitable[object]]

REQUEST_BYTES = 64 * limits.KIB
REPLY_BYTES = 16 * limits.MIB  # a status with a thousand peers takes under 1 MiB
CONNECTIONS = 16  # answered at once
WAITING = 112  # more besides are turned away at once
REQUEST_TIMEOUT_S = 10.0
SOCKET_PATH_BYTES = 100  # sockaddr_un holds 108
log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def serve_control(path: Path, actions: Mapping[str, Action]) -> AsyncIterator[None]:
    """Answer `actions` on the socket at `path` while the context lasts."""
    slots, here = asyncio.Semaphore(CONNECTIONS), 0

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal here
        here += 1
        try:
            if here > CONNECTIONS + WAITING:
                return
            async with slots, asyncio.timeout(REQUEST_TIMEOUT_S):
                writer.write(await _answer(await reader.readline(), actions))
                await writer.drain()
        except (TimeoutError, OSError, ValueError):
            pass  # a caller that stalls, goes away or sends an endless line gets no answer
        finally:
            here -= 1
            writer.close()

    with _socket_path(path) as address:
        server = await asyncio.start_unix_server(connected, address, limit=REQUEST_BYTES)
        address.chmod(0o600)
        try:
            yield
        finally:
            server.close()


async def ask(path: Path, do: str, **arguments: object) -> Any:
    """The result of one action of the daemon behind `path`.

    Raises PeerUnreachable when no daemon listens, and a ShoalError with the daemon's text and exit code.
    """
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            short = await asyncio.to_thread(os.path.realpath, path)
            reader, writer = await asyncio.open_unix_connection(short, limit=REPLY_BYTES)
            with contextlib.closing(writer):
                writer.write(_line({"do": do, **arguments}))
                await writer.drain()
                reply = json.loads(await reader.readline())
    except (OSError, TimeoutError, ValueError) as error:
        raise PeerUnreachable(
            f"no daemon answers on {path} ({type(error).__name__})\nstart one with: shoal join"
        ) from error
    if not reply["ok"]:
        refusal = ShoalError(reply["text"])
        refusal.exit_code = reply["exit_code"]
        raise refusal
    return reply["result"]


async def _answer(line: bytes, actions: Mapping[str, Action]) -> bytes:
    """The reply. A bug in an action is told as one: whoever got none would take the daemon for dead."""
    try:
        result = await _perform(line, actions)
        return await asyncio.to_thread(_line, {"ok": True, "result": result})  # of many peers a megabyte
    except ShoalError as error:
        return _line({"ok": False, "exit_code": error.exit_code, "text": str(error)})
    except Exception as error:
        log.exception("an action of the control socket")
        text = f"a bug in the daemon: {type(error).__name__}\nits log has the story; please report it"
        return _line({"ok": False, "exit_code": ShoalError.exit_code, "text": text})


async def _perform(line: bytes, actions: Mapping[str, Action]) -> object:
    try:
        request = json.loads(line)
        if request["do"] == "actions":  # so that a page has no button for what this daemon cannot do
            return sorted(actions)
        action = actions[request["do"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(f"the control socket knows {', '.join(sorted(actions))}") from error
    return await action(request)


def _line(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


@contextlib.contextmanager
def _socket_path(path: Path) -> Any:
    """A path short enough to bind; where `path` is too long it becomes a link to a short one."""
    path.unlink(missing_ok=True)  # left by a daemon that was killed; the peer folder's lock is ours
    if len(bytes(path)) <= SOCKET_PATH_BYTES:
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        short = Path(folder) / "control.sock"
        path.symlink_to(short)
        try:
            yield short
        finally:
            path.unlink(missing_ok=True)
            short.unlink(missing_ok=True)
