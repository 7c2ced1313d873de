"""Peers as real processes: started by the command line, watched through their JSON events and sockets.

Every peer has its own data folder and its own process group, so that a kill takes its p2pd along as
a pulled plug would. Whatever they print is kept in the demo's folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol

from shoal.node import parent
from shoal.node.control import ask
from shoal.node.paths import control_sockets
from shoal.protocol.errors import NetworkError, PeerUnreachable, ShoalError

STOP_S = 15.0
_LINE_BYTES = 1 << 20
_TAIL_CHARACTERS = 1500

JsonObject = dict[str, Any]
Heard = Callable[["PeerProcess", JsonObject], None]


class Launched(Protocol):
    """A process that runs `shoal`: asyncio's, or what tests put in its place."""

    @property
    def pid(self) -> int: ...

    @property
    def stdout(self) -> asyncio.StreamReader | None: ...

    @property
    def returncode(self) -> int | None: ...

    def terminate(self) -> None: ...

    async def wait(self) -> int: ...


class PeerProcess:
    """One `shoal up` or `shoal join`. `heard` gets every event it prints, from the loop."""

    def __init__(self, name: str, folder: Path, heard: Heard, threads: int = 1) -> None:
        self.name = name
        self.folder = folder
        self.peer_id = ""
        self.stage: int | None = None
        self.started_unix_s = 0.0
        self._heard = heard
        self._threads = threads
        self._running: tuple[Launched, asyncio.Task[None]] | None = None
        self._seen: dict[str, asyncio.Event] = {}

    async def start(self, *arguments: str) -> None:
        """Run `shoal ARGUMENTS --json` with this peer's data folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.started_unix_s = time.time()
        command = (
            *arguments,
            "--json",
            "--data-dir",
            str(self.folder / "data"),
            "--threads",
            str(self._threads),
        )
        with (self.folder / "errors.log").open("wb") as errors:
            # What a killed peer leaves in the folder for temporary files goes with the demo's own folder.
            process = await self._launch(
                *command, "--name", self.name, errors=errors, TMPDIR=str(self.folder.parent)
            )
        if process.stdout is not None:
            reading = asyncio.create_task(self._read(process.stdout), name=f"events of {self.name}")
            self._running = process, reading

    @property
    def alive(self) -> bool:
        return self._running is not None and self._running[0].returncode is None

    @property
    def process_id(self) -> int | None:
        return self._running[0].pid if self._running is not None else None

    @property
    def exit_code(self) -> int | None:
        return self._running[0].returncode if self._running is not None else None

    async def event(self, kind: str, timeout_s: float) -> None:
        """Returns once it printed an event of this kind. Raises NetworkError with its last words."""
        if self._running is None:
            raise NetworkError(f"{self.name} was not started")
        seen = asyncio.create_task(self._flag(kind).wait())
        either = {seen, self._running[1]}
        try:
            await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            seen.cancel()
        if not self._flag(kind).is_set():
            state = "stopped" if not self.alive else f"did not get there within {timeout_s:g} s"
            raise NetworkError(f"{self.name} {state} (waiting for: {kind})\n{self.last_words()}")

    async def status(self) -> JsonObject | None:
        """What its control socket says; None while it does not answer."""
        for path in control_sockets(self.folder / "data"):
            with contextlib.suppress(PeerUnreachable):
                found: JsonObject = await ask(path, "status")
                return found
        return None

    def kill(self) -> float:
        """SIGKILL to its whole group, without warning; the Unix time of it."""
        now = time.time()
        if self._running is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._running[0].pid, signal.SIGKILL)
        return now

    async def stop(self) -> None:
        """Ask it to leave; kill what does not."""
        if self._running is None:
            return
        process, reading = self._running
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            pass
        finally:
            self.kill()
        await process.wait()
        await reading

    def last_words(self) -> str:
        text = (self.folder / "errors.log").read_text(errors="replace").strip()
        return text[-_TAIL_CHARACTERS:] or "it printed no error"

    async def _launch(self, *arguments: str, errors: IO[bytes], **variables: str) -> Launched:
        return await start_shoal(*arguments, errors=errors, **variables)

    def _flag(self, kind: str) -> asyncio.Event:
        return self._seen.setdefault(kind, asyncio.Event())

    async def _read(self, lines: asyncio.StreamReader) -> None:
        with (self.folder / "events.jsonl").open("wb") as log:
            async for line in lines:
                log.write(line)
                log.flush()
                with contextlib.suppress(ValueError):
                    self._take(json.loads(line))

    def _take(self, event: JsonObject) -> None:
        kind = str(event.get("event"))
        if kind == "plan":
            self.peer_id, self.stage = str(event["peer"]), int(event["stage"])
        self._heard(self, event)
        self._flag(kind).set()


async def start_shoal(*arguments: str, errors: Any = None, **variables: str) -> asyncio.subprocess.Process:
    """This installation's `shoal` in a process group of its own that dies with us."""
    environment = {
        **os.environ,
        parent.ENVIRONMENT_KEY: str(os.getpid()),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "shoal.node.cli",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=errors,
        env=environment,
        limit=_LINE_BYTES,
        start_new_session=True,
    )


async def run_shoal(*arguments: str, timeout_s: float) -> JsonObject:
    """The JSON object that a short command prints last. Raises ShoalError with what it said."""
    process = await start_shoal(*arguments, errors=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(timeout_s):
            out, errors = await process.communicate()
    except TimeoutError as error:
        raise NetworkError(f"shoal {arguments[0]} did not finish within {timeout_s:g} s") from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise ShoalError(f"shoal {arguments[0]} failed ({process.returncode})\n{errors.decode().strip()}")
    result: JsonObject = json.loads(out.splitlines()[-1])
    return result
