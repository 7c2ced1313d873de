"""A worker of the fault tests as its parent sees it, and the process that all workers are forked from."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable

from fault_nursery import __file__ as program
from fault_orders import JsonObject, Order, key_of

from shoal.protocol.identity import PeerId
from shoal.training.outer.entry import entry_hash

COMMAND_S = 60.0


class Nursery:
    """The process that forks workers: starting one takes a fraction of a second. Use as a context."""

    def __enter__(self) -> Nursery:
        self._process = subprocess.Popen(
            [sys.executable, program],
            stdin=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def fork(self, order: Order) -> None:
        """Start a worker; it connects to the order's socket."""
        if self._process.stdin is None:
            raise RuntimeError("the nursery has no standard input")
        self._process.stdin.write(order.encode())
        self._process.stdin.flush()


class Replica:
    """One worker as the test sees it."""

    def __init__(self, number: int, incarnation: int, seed: int) -> None:
        self.number = number
        self.incarnation = incarnation
        self.peer: PeerId = key_of(seed, number).peer
        self.pid = 0
        self.height = 0
        self.reached_s: dict[int, float] = {}  # height -> when first, on the clock that all processes share
        self.had_s: dict[bytes, float] = {}  # head -> when first
        self.entries: dict[bytes, bytes] = {}  # all that it ever applied, by hash
        self.head = b""
        self.blows: dict[str, float] = {}  # what was armed here and struck -> when
        self.events: list[JsonObject] = []
        self.steps = 0  # inner steps made
        self.crash = ""  # of a task that should not end
        self.stalls: list[float] = []  # seconds each, in which the machine did not let it run
        self.frozen = False
        self.ended = False
        self._answers: dict[int, asyncio.Future[JsonObject]] = {}
        self._numbers = itertools.count()
        self._writer: asyncio.StreamWriter | None = None

    def __str__(self) -> str:
        return f"w{self.number}/{self.incarnation}"

    async def ask(self, do: str, *, limit_s: float = COMMAND_S, **arguments: object) -> JsonObject:
        """Have a command done. Raises ConnectionError when the process ended over it."""
        if self._writer is None or self.ended:
            raise ConnectionError(f"{self} has ended")
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._writer.write(json.dumps({"id": number, "do": do, "with": arguments}).encode() + b"\n")
        async with asyncio.timeout(limit_s):
            found: JsonObject = await answer
        if "error" in found:
            raise RuntimeError(f"{self}: {do}: {found['error']}")
        return found

    def signal(self, number: signal.Signals) -> None:
        """SIGKILL, SIGSTOP or SIGCONT."""
        self.frozen = number == signal.SIGSTOP or (self.frozen and number != signal.SIGCONT)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def heard(self, line: JsonObject) -> None:
        """Take in what the worker says."""
        if "id" in line:
            answer = self._answers.pop(line["id"])
            if not answer.done():  # its asker may have given up
                answer.set_result(line)
            return
        match line["event"]:
            case "hello":
                self.pid = line["pid"]
            case "height":
                self.height, self.head = line["height"], bytes.fromhex(line["head"])
                self.reached_s.setdefault(self.height, line["at_s"])
                self.had_s.setdefault(self.head, line["at_s"])
            case "round":
                entry = bytes.fromhex(line["entry"])
                self.entries[entry_hash(entry)] = entry
            case "crashed":
                self.crash = line["error"]
            case "stalled":
                self.stalls.append(line["seconds"])
            case "struck":
                self.blows[line["arming"]] = line["at_s"]
                self.frozen |= " freeze" in line["arming"]
        self.events.append(line)

    async def listen(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, told: Callable[[], None]
    ) -> None:
        """Until the process ends."""
        self._writer = writer
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                self.heard(json.loads(line))
                told()
        self.ended = True
        for answer in [answer for answer in self._answers.values() if not answer.done()]:
            answer.set_exception(ConnectionError(f"{self} ended"))
            answer.exception()  # nobody may be waiting any more
        told()
