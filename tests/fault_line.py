"""What every worker of the fault tests has: its membership, its fault points, and the line to the test.

A worker connects to its order's Unix socket, answers commands line by line, and tells without being asked
what happens to it. It ends when that socket closes. `fault_worker` and `pipeline_worker` say what it does.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import Any

from fault_orders import JsonObject, Order, key_of
from fault_watch import tell_stalls, waits_at

from shoal.dht.beats import Beat
from shoal.dht.directory import PeerRecord, SignedRecord
from shoal.dht.liveness import Liveness
from shoal.dht.members import Members
from shoal.dht.memory_directory import MemoryDirectoryHub
from shoal.dht.records import RecordBook
from shoal.dht.view import Member, SwarmView
from shoal.protocol.admission import JoinToken, Membership
from shoal.protocol.contacts import ContactBook
from shoal.protocol.errors import NetworkError, ShoalError
from shoal.protocol.faults import Arming, Faults
from shoal.protocol.faulty_transport import FaultyTransport
from shoal.protocol.grpc_transport import GrpcTransport
from shoal.protocol.identity import PeerId
from shoal.protocol.wire import decode, encode
from shoal.training.lane import ThreadLane

MEET_S = 30.0


class LineWorker(ABC):
    """A process with real sockets and a real membership table; each `do_<name>` is a command."""

    def __init__(self, order: Order, writer: asyncio.StreamWriter) -> None:
        self.order = order
        self._writer = writer
        membership = Membership(JoinToken.parse(order.token), key_of(order.seed, order.number), time.time)
        contacts = ContactBook()
        self._bare = GrpcTransport(membership, contacts, "127.0.0.1", 0, order.upload_bytes_per_s)
        self._rng = random.Random(f"{order.seed}/{order.number}/{order.incarnation}")
        self.faults = self._make_faults()
        self.transport = FaultyTransport(self._bare, self.faults)
        self.lane = self._make_lane()
        self.stages: tuple[int, ...] = (order.stage or 0,)
        self.states: tuple[str, ...] = ()  # at each of them, where they differ
        self.incarnation = order.incarnation
        self._state = "joining"
        self._claims: dict[Arming, str] = {}  # the file that one has to be first to make
        self._tasks: set[asyncio.Task[None]] = set()
        self.membership = membership
        hub = MemoryDirectoryHub(membership, time.time, self._rng)  # nobody shares it
        self.members = Members(
            transport=self.transport,
            directory=hub.directory(self.transport.me, membership),
            membership=membership,
            contacts=contacts,
            record_book=RecordBook(membership),
            make_record=self._record,
            make_beat=self.beat,
            clock=time.time,
            rng=self._rng,
        )

    # -- what a worker is

    def _make_faults(self) -> Faults:
        return Faults(permit=self._permit, tell=self.struck, seed=self.order.seed)

    def _make_lane(self) -> ThreadLane:
        return ThreadLane()

    @abstractmethod
    def beat(self) -> Beat:
        """What neighbours hear of it."""

    @abstractmethod
    def serve(self) -> None:
        """Register what is served before the transport starts."""

    @abstractmethod
    async def take_part(self) -> None:
        """Take up what the others have, then go on by itself (`start`); after all have met."""

    def is_here(self, member: Member) -> bool:
        """Whether it takes part already."""
        return member.progress(0) is not None

    # -- life

    async def live(self, reader: asyncio.StreamReader) -> None:
        """Obey until the line closes."""
        self.serve()
        await self.transport.start()
        async with self.members:
            self.say(event="hello", pid=os.getpid())
            self.start(tell_stalls(lambda seconds: self.say(event="stalled", seconds=seconds)))
            try:
                while line := await reader.readline():
                    self.start(self._obey(json.loads(line)))
            finally:
                for task in (tasks := list(self._tasks)):
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        await self.transport.close()
        await self.lane.close()

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Something of its own; the test hears if it fails."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            traceback.print_exception(error)  # to the file of errors, which a story shows
            self.say(event="crashed", error=repr(error))

    async def _obey(self, command: JsonObject) -> None:
        try:
            answer = await getattr(self, f"do_{command['do']}")(**command.get("with", {}))
        except (ShoalError, OSError, TimeoutError) as error:
            answer = {"error": repr(error)}
        self.say(id=command["id"], **(answer or {}))

    def say(self, **said: object) -> None:
        """To the test."""
        self._writer.write(json.dumps(said).encode() + b"\n")

    # -- commands

    async def do_join(self, records: list[str]) -> None:
        """Meet the others and take up what they have, then take part; returns once in it."""
        known = tuple(decode(SignedRecord, bytes.fromhex(record)) for record in records)
        await self.members.learn(known, "the test")
        await self._meet([decode(PeerRecord, signed.record).peer for signed in known])
        await self.take_part()

    async def do_record(self) -> JsonObject:
        """Its own record, as of now."""
        return {"record": encode(self.members.own_record()[0]).hex()}

    async def do_meet(self, peers: list[PeerId]) -> None:
        """Return when all of these are alive here, and nobody else is."""
        await self._meet(peers)

    async def do_arm(self, arming: str, once: str) -> None:
        """Arm a fault point; of the processes armed `once` with the same file the first is struck."""
        armed = Arming.parse(arming)
        self._claims[armed] = once
        self.faults.arm(armed)

    async def do_disarm(self) -> None:
        """Nothing strikes any more."""
        self.faults.disarm()

    async def do_tasks(self) -> JsonObject:
        """Where every task waits, for a failed test."""
        return {"tasks": [f"    {task.get_name()}: {waits_at(task)}" for task in asyncio.all_tasks()]}

    # -- fault points

    def _permit(self, arming: Arming) -> bool:
        try:
            os.close(os.open(self._claims.pop(arming), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def struck(self, arming: Arming, _: PeerId) -> None:
        """Just before it happens."""
        self.say(event="struck", arming=str(arming), at_s=asyncio.get_running_loop().time())

    # -- membership

    async def _meet(self, peers: list[PeerId]) -> None:
        wanted = {*peers, self.transport.me}

        def met(view: SwarmView) -> bool:
            alive = [m for m in view.members if m.liveness is Liveness.ALIVE]
            here = [m for m in alive if m.peer == view.me or self.is_here(m)]
            return {member.peer for member in here} == wanted

        try:
            await self.members.wait_for(met, MEET_S)
        except NetworkError as error:
            view = self.members.view()
            seen = {m.name: (m.liveness.value, m.state, m.reason, m.beat is not None) for m in view.members}
            missing = wanted - {member.peer for member in view.members}
            raise NetworkError(f"{error}; seen: {seen}; never met: {sorted(missing)}") from error

    def announce(self, state: str) -> None:
        """Tell everybody what this peer does from now on."""
        self._state = state
        self.members.changed_now()

    def _record(self) -> PeerRecord:
        return PeerRecord(
            peer=self.transport.me,
            incarnation=self.incarnation,
            sequence=0,
            issued_unix_s=0.0,
            ttl_s=60.0,
            state=self._state,
            stages=self.stages,
            states=self.states,
            name=f"w{self.order.number}",
            addresses=(f"127.0.0.1:{self._bare.port}",),
            chain=self.membership.chain,
            device="cpu",
            tokens_per_s=0.0,
            version="0",
        )
