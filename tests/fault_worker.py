"""One replica as a process of its own, for the fault tests: real rounds, real sockets, weights made by hand.

`fault_nursery` forks it. It connects to its order's Unix socket, says `hello`, answers commands line by line,
and tells without being asked what happens to it. It ends when that socket closes. Everything it does to its
weights follows from the order's seed, so that `fault_ledger` can count after it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
import traceback
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from fault_orders import JsonObject, Order, key_of, start_of, step_of, tokens_of
from fault_watch import tell_stalls, waits_at
from fault_weights import Course, LaneWeights

from shoal.compression.codec import bytes_of
from shoal.dht.beats import Beat, StageBeat
from shoal.dht.directory import PeerRecord, SignedRecord
from shoal.dht.liveness import Liveness
from shoal.dht.members import Members
from shoal.dht.memory_directory import MemoryDirectoryHub
from shoal.dht.records import RecordBook
from shoal.dht.view import SwarmView
from shoal.protocol.admission import JoinToken, Membership
from shoal.protocol.contacts import ContactBook
from shoal.protocol.errors import ShoalError
from shoal.protocol.faults import Arming, Faults
from shoal.protocol.faulty_transport import FaultyTransport
from shoal.protocol.grpc_transport import GrpcTransport
from shoal.protocol.identity import PeerId
from shoal.protocol.wire import decode, encode
from shoal.training.lane import ThreadLane
from shoal.training.neighbours import group_members
from shoal.training.outer.service import Outer
from shoal.training.spec import RunSpec

MEET_S = 30.0


class Worker:
    """The replica, its membership, and the line to the test."""

    def __init__(self, order: Order, writer: asyncio.StreamWriter) -> None:
        self.order = order
        self._writer = writer
        self._genesis, self._pattern = start_of(order.seed, order.size)
        membership = Membership(JoinToken.parse(order.token), key_of(order.seed, order.number), time.time)
        contacts = ContactBook()
        self._bare = GrpcTransport(membership, contacts, "127.0.0.1", 0, order.upload_bytes_per_s)
        self._rng = random.Random(f"{order.seed}/{order.number}/{order.incarnation}")
        self.faults = Faults(permit=self._permit, tell=self._struck, seed=order.seed)
        self.transport = FaultyTransport(self._bare, self.faults)
        self._lane = ThreadLane()
        self.weights = LaneWeights(self._genesis, self._lane, self._change_of)
        self._state = "joining"
        self._told = b""  # the head
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
            self._start(tell_stalls(lambda seconds: self._say(event="stalled", seconds=seconds)))
            try:
                while line := await reader.readline():
                    self._start(self._obey(json.loads(line)))
            finally:
                for task in (tasks := list(self._tasks)):
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        await self.transport.close()
        await self._lane.close()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            traceback.print_exception(error)  # to the file of errors, which a story shows
            self._say(event="crashed", error=repr(error))

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
        for _ in range(count):
            await self.weights.work()
            self._stepped()
        return {"inner_steps": self.weights.inner_steps}

    async def do_spoil(self) -> None:
        """A value of the outer momentum changes, as in broken memory."""
        self.outer.momentum[0] += 1.0

    async def do_train(self, **course: Any) -> JsonObject:
        """Make the inner steps of a `Course` and tell what it measured."""
        found = await Course(**course).run(self.weights, self._stepped, self._height_and_bytes)
        return {"inner_steps": self.weights.inner_steps, **found}

    async def do_hand_in(self) -> None:
        """Return when the log holds all steps made until now."""
        await self.outer.final_round()

    def _stepped(self) -> None:
        self.outer.stepped()
        self.members.changed_now()

    def _height_and_bytes(self) -> tuple[int, int]:
        return self.outer.height, sum(of_rounds(self._bare.counters().bytes_out).values())

    def _change_of(self, step: int) -> tuple[torch.Tensor, int]:
        order = self.order
        scale = step_of(order.seed, order.number, order.incarnation, step)
        return self._pattern * scale, tokens_of(order.number)

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
            "bytes_out": of_rounds(counters.bytes_out),
            "bytes_in": of_rounds(counters.bytes_in),
            "outer": self.outer.status(),
            "members": {m.peer: [m.liveness.value, m.reason] for m in self.members.view().members},
        }

    async def do_dump(self, path: str) -> None:
        """Write anchor and weights, [2, size] fp32."""
        await asyncio.to_thread(torch.save, torch.stack([self.outer.anchor, self.weights.weights]), path)

    async def do_tasks(self) -> JsonObject:
        """Where every task waits, for a failed test."""
        return {"tasks": [f"    {task.get_name()}: {waits_at(task)}" for task in asyncio.all_tasks()]}

    # -- what it tells

    def _say(self, **said: object) -> None:
        self._writer.write(json.dumps(said).encode() + b"\n")

    def _standing(self) -> JsonObject:
        outer = self.outer
        return {"height": outer.height, "head": outer.head.hex(), "state_root": outer.state_root.hex()}

    async def _tell_heights(self) -> None:
        while True:
            self._told = self.outer.head
            self._say(event="height", **self._standing(), at_s=asyncio.get_running_loop().time())
            await self.outer.wait_until(lambda: self.outer.head != self._told)

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


def of_rounds(counted: Mapping[str, int]) -> dict[str, int]:
    """Bytes by method, of rounds and recovery."""
    return {method: count for method, count in counted.items() if method.startswith("outer.")}
