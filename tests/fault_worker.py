"""One replica as a process of its own, for the fault tests: real rounds, real sockets, weights made by hand.

`python tests/fault_worker.py` is a nursery: it imports everything once, then forks a worker for each order, a
line of JSON on its standard input. The worker connects to the order's Unix socket, says `hello`, answers
commands line by line, and tells without being asked what happens to it. It ends when that socket closes.
Everything it does to its weights follows from the order's seed, so that `fault_group` can count after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from shoal.compression.codec import bytes_of
from shoal.dht.beats import Beat, StageBeat
from shoal.dht.directory import PeerRecord, SignedRecord
from shoal.dht.liveness import Liveness
from shoal.dht.members import Members
from shoal.dht.memory_directory import MemoryDirectoryHub
from shoal.dht.records import RecordBook
from shoal.dht.view import SwarmView
from shoal.protocol.admission import JoinToken, Membership
from shoal.protocol.allocator import keep_freed_memory
from shoal.protocol.contacts import ContactBook
from shoal.protocol.errors import ShoalError
from shoal.protocol.faults import Arming, Faults
from shoal.protocol.faulty_transport import FaultyTransport
from shoal.protocol.grpc_transport import GrpcTransport
from shoal.protocol.identity import PeerId, PeerKey
from shoal.protocol.wire import decode, encode
from shoal.training.neighbours import group_members
from shoal.training.outer.local import MemoryWeights
from shoal.training.outer.service import Outer
from shoal.training.spec import RunSpec

MEET_S = 30.0
LINE_BYTES = 16 << 20
STEP_SIZE = 0.01
JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Order:
    """What makes a worker."""

    socket: str
    errors: str  # a file for its standard error
    number: int
    incarnation: int
    seed: int
    token: str
    spec: JsonObject
    size: int
    directory: str | None = None  # of snapshots and journal

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


def key_of(seed: int, number: int) -> PeerKey:
    """A worker's identity is the same in each of its lives."""
    return PeerKey.from_seed(blake3(f"worker {seed}/{number}".encode()).digest())


def tokens_of(number: int) -> int:
    """Of each inner step of a worker."""
    return 100 + 10 * number


def start_of(seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(genesis, pattern), both [size] fp32: every inner step adds a multiple of the pattern."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator), torch.randn(size, generator=generator)


def step_of(seed: int, number: int, incarnation: int, step: int) -> float:
    """How much of the pattern an inner step adds, steps counted from 0."""
    return STEP_SIZE * random.Random(f"{seed}/{number}/{incarnation}/{step}").uniform(0.5, 1.5)


class Worker:
    """The replica, its membership, and the line to the test."""

    def __init__(self, order: Order, writer: asyncio.StreamWriter) -> None:
        self.order = order
        self._writer = writer
        self._genesis, self._pattern = start_of(order.seed, order.size)
        membership = Membership(JoinToken.parse(order.token), key_of(order.seed, order.number), time.time)
        contacts = ContactBook()
        self._bare = GrpcTransport(membership, contacts, "127.0.0.1", 0)
        self._rng = random.Random(f"{order.seed}/{order.number}/{order.incarnation}")
        self.faults = Faults(permit=self._permit, tell=self._struck, seed=order.seed)
        self.transport = FaultyTransport(self._bare, self.faults)
        self.weights = MemoryWeights(self._genesis)
        self._state = "joining"
        self._claims: dict[Arming, str] = {}  # the file that one has to be first to make
        self._tasks: set[asyncio.Task[None]] = set()
        self._membership = membership
        hub = MemoryDirectoryHub(membership, time.time, self._rng)  # nobody shares it
        self.members = Members(
            transport=self.transport,
            directory=hub.directory(self.transport.me, membership),
            membership=membership,
            contacts=contacts,
            record_book=RecordBook(membership),
            make_record=self._record,
            make_beat=lambda: Beat(stages=(self._beat(),)),
            clock=time.time,
            rng=self._rng,
        )
        self.outer = Outer(
            RunSpec.model_validate(order.spec),
            0,
            me=self.transport.me,
            incarnation=order.incarnation,
            transport=self.transport,
            weights=self.weights,
            genesis=self._genesis,
            peers=lambda: group_members(self.members, order.incarnation, self._beat()),
            suspect=self.members.suspect,
            offload=asyncio.to_thread,
            rng=self._rng,
            event=self._event,
            directory=Path(order.directory) if order.directory else None,
        )

    async def live(self, reader: asyncio.StreamReader) -> None:
        """Obey until the line closes."""
        self.outer.serve()
        await self.transport.start()
        async with self.members:
            self._say(event="hello", pid=os.getpid())
            try:
                while line := await reader.readline():
                    self._start(self._obey(json.loads(line)))
            finally:
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.transport.close()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(asyncio.create_task(work))

    # -- commands

    async def _obey(self, command: JsonObject) -> None:
        try:
            answer = await getattr(self, f"do_{command['do']}")(**command.get("with", {}))
        except (ShoalError, OSError, TimeoutError) as error:
            answer = {"error": repr(error)}
        self._say(id=command["id"], **(answer or {}))

    async def do_join(self, records: list[str]) -> None:
        """Meet the others and take up what they have, then take part; returns once in it."""
        known = tuple(decode(SignedRecord, bytes.fromhex(record)) for record in records)
        await self.members.learn(known, "the test")
        await self._meet([decode(PeerRecord, signed.record).peer for signed in known])
        await self.outer.recover()
        self._state = "online"
        self.members.changed_now()
        self._start(self.outer.run())
        self._start(self._tell_heights())

    async def do_record(self) -> JsonObject:
        """Its own record, as of now."""
        return {"record": encode(self.members.own_record()[0]).hex()}

    async def do_meet(self, peers: list[PeerId]) -> None:
        """Return when all of these are alive here, and nobody else is."""
        await self._meet(peers)

    async def do_step(self, count: int) -> JsonObject:
        """Make inner steps."""
        order = self.order
        for _ in range(count):
            scale = step_of(order.seed, order.number, order.incarnation, self.weights.inner_steps)
            self.weights.step(self._pattern * scale, tokens_of(order.number))
            self.outer.stepped()
        self.members.changed_now()
        return {"inner_steps": self.weights.inner_steps}

    async def do_arm(self, arming: str, once: str) -> None:
        """Arm a fault point; of the processes armed `once` with the same file the first is struck."""
        armed = Arming.parse(arming)
        self._claims[armed] = once
        self.faults.arm(armed)

    async def do_disarm(self) -> None:
        """Nothing strikes any more."""
        self.faults.disarm()

    async def do_status(self) -> JsonObject:
        """Where it stands; tensors by their digests."""
        counters = self._bare.counters()
        return {
            **self._standing(),
            "inner_steps": self.weights.inner_steps,
            "anchor": blake3(bytes_of(self.outer.anchor)).hexdigest(),
            "momentum": blake3(bytes_of(self.outer.momentum)).hexdigest(),
            "bytes_out": {m: count for m, count in counters.bytes_out.items() if m.startswith("outer.")},
            "bytes_in": {m: count for m, count in counters.bytes_in.items() if m.startswith("outer.")},
            "outer": self.outer.status(),
            "members": {m.peer: [m.liveness.value, m.reason] for m in self.members.view().members},
        }

    async def do_dump(self, path: str) -> None:
        """Write anchor and weights, [2, size] fp32."""
        await asyncio.to_thread(torch.save, torch.stack([self.outer.anchor, self.weights.weights]), path)

    # -- what it tells

    def _say(self, **said: object) -> None:
        self._writer.write(json.dumps(said).encode() + b"\n")

    def _standing(self) -> JsonObject:
        outer = self.outer
        return {"height": outer.height, "head": outer.head.hex(), "state_root": outer.state_root.hex()}

    async def _tell_heights(self) -> None:
        while True:
            self._say(event="height", **self._standing(), at_s=asyncio.get_running_loop().time())
            await self.outer.wait_for_height(self.outer.height + 1)

    def _event(self, kind: str, data: dict[str, object]) -> None:
        said: JsonObject = {"event": kind, "data": data, "at_s": asyncio.get_running_loop().time()}
        if kind == "round":
            self.members.changed_now()
            entry = self.outer.entry(self.outer.height)
            said["entry"] = entry.encode().hex() if entry is not None else ""
        self._say(**said)

    def _permit(self, arming: Arming) -> bool:
        try:
            os.close(os.open(self._claims.pop(arming), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def _struck(self, arming: Arming, _: PeerId) -> None:
        self._say(event="struck", arming=str(arming), at_s=asyncio.get_running_loop().time())

    # -- membership

    async def _meet(self, peers: list[PeerId]) -> None:
        wanted = {*peers, self.transport.me}

        def met(view: SwarmView) -> bool:
            alive = [m for m in view.members if m.liveness is Liveness.ALIVE]
            here = [m for m in alive if m.peer == view.me or m.progress(0) is not None]
            return {member.peer for member in here} == wanted

        await self.members.wait_for(met, MEET_S)

    def _record(self) -> PeerRecord:
        return PeerRecord(
            peer=self.transport.me,
            incarnation=self.order.incarnation,
            sequence=0,
            issued_unix_s=0.0,
            ttl_s=60.0,
            state=self._state,
            stages=(0,),
            name=f"w{self.order.number}",
            addresses=(f"127.0.0.1:{self._bare.port}",),
            chain=self._membership.chain,
            device="cpu",
            tokens_per_s=0.0,
            version="0",
        )

    def _beat(self) -> StageBeat:
        outer = self.outer
        return StageBeat(
            0,
            height=outer.height,
            head=outer.head,
            state_root=outer.state_root,
            log_tokens=outer.tokens,
            inner_steps=self.weights.inner_steps,
            tokens=self.weights.tokens,
            steps_since_round=outer.steps_since_round,
            tokens_since_round=outer.tokens_since_round,
        )


async def work(order: Order) -> None:
    """A worker's life."""
    reader, writer = await asyncio.open_unix_connection(order.socket, limit=LINE_BYTES)
    writer.write(json.dumps({"number": order.number, "incarnation": order.incarnation}).encode() + b"\n")
    await Worker(order, writer).live(reader)
    writer.close()


def child(order: Order, main: Callable[[Order], Any]) -> None:
    """What the fork does instead of the nursery's loop."""
    errors = os.open(order.errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    os.close(0)
    keep_freed_memory()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(order))


def nursery() -> None:
    """Fork a worker for each line, until standard input closes."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries them
    for line in sys.stdin:
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            child(Order(**json.loads(line)), work)
            os._exit(0)


if __name__ == "__main__":
    nursery()
