"""The gateway on a socket. Run by `shoal serve` until it is interrupted."""

from __future__ import annotations

import ipaddress
import socket
import stat
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from shoal.protocol.errors import TransportLost, UsageError

_HEADER_BYTES = 1 << 16
_BACKLOG = 256
_CONNECTIONS = 1024  # more are turned away before anything is read
_CLOSING_S = 5


def bind(listen: str, keys: tuple[str, ...]) -> socket.socket:
    """A listening socket on HOST:PORT.

    Raises UsageError where strangers could use it, and TransportLost where it is taken.
    """
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"--listen {listen!r} is not HOST:PORT\ntry --listen 127.0.0.1:8000")
    if not keys and not _is_loopback(host):
        raise UsageError(
            f"{host} can be reached by others, and nobody would need a key\n"
            "give --api-key-file FILE, or listen on 127.0.0.1"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, int(port)))
        bound.listen(_BACKLOG)  # from now on callers wait rather than fail
    except OSError as error:
        bound.close()
        raise TransportLost(f"cannot listen on {listen}: {error}; is the port in use?") from error
    return bound


def read_keys(path: Path | None) -> tuple[str, ...]:
    """The keys in a file, one a line; `#` begins a comment. Raises UsageError."""
    if path is None:
        return ()
    try:
        text, mode = path.read_text(), path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the keys in {path}: {error}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(f"{path} can be read by others\nrun: chmod 600 {path}")
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    keys = tuple(line for line in lines if line)
    if not keys:
        raise UsageError(f"{path} has no key\nwrite one a line, for instance: openssl rand -hex 24 > {path}")
    return keys


def server_of(app: Starlette) -> uvicorn.Server:
    """`await server.serve(sockets=[bound])` runs until a signal, or until `should_exit` is set."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            loop="none",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            limit_concurrency=_CONNECTIONS,
            h11_max_incomplete_event_size=_HEADER_BYTES,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=_CLOSING_S,
        )
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
