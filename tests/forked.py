"""`shoal` processes for tests, forked from a nursery (`shoal_nursery`): one for each process of the tests."""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
from typing import IO

from shoal_nursery import __file__ as program

_LINE_BYTES = 1 << 20


class Forked:
    """As much of asyncio's process as `PeerProcess` uses."""

    def __init__(self, pid: int, stdout: asyncio.StreamReader, told: asyncio.StreamReader) -> None:
        self.pid = pid
        self.stdout = stdout
        self.returncode: int | None = None
        self._ending = asyncio.create_task(self._follow(told), name=f"exit code of {pid}")

    def terminate(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGTERM)

    async def wait(self) -> int:
        return await asyncio.shield(self._ending)

    async def _follow(self, told: asyncio.StreamReader) -> int:
        self.returncode = int(await told.readline() or -signal.SIGKILL)  # the nursery itself was killed
        await told.read()
        return self.returncode


async def fork_shoal(*arguments: str, errors: IO[bytes], **variables: str) -> Forked:
    """`shoal ARGUMENTS` in a session of its own, as `start_shoal` starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    order = {"arguments": arguments, "environment": environment, "folder": os.getcwd()}
    stdout, told = os.pipe(), os.pipe()
    try:
        fds = [stdout[1], errors.fileno(), told[1]]
        socket.send_fds(_nursery(), [json.dumps(order).encode()], fds)
    finally:
        os.close(stdout[1])
        os.close(told[1])
    reader, pipe = await _reader(told[0]), await _reader(stdout[0])
    return Forked(int(await reader.readline()), pipe, reader)


async def _reader(fd: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=_LINE_BYTES)
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, os.fdopen(fd, "rb", buffering=0))
    return reader


@functools.cache
def _nursery() -> socket.socket:
    """Begun when it is first needed."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, program, str(theirs.fileno())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        command,
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=environment,
    )
    theirs.close()

    def end() -> None:
        mine.close()
        running.wait()

    atexit.register(end)
    return mine
