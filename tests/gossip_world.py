"""A crowd of `Members` and nothing else, coming and going in virtual time; their heartbeat bytes are counted.

Real heartbeat links and a real directory on memory, without certificates: their place in a record is kept,
their verification is not. Used by `test_gossip` and `benchmarks/gossip.py`.
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from shoal.dht.beats import METHOD, Beat, Goodbye, RosterRecords, RosterWant, StageBeat
from shoal.dht.directory import PeerRecord
from shoal.dht.interest import KNOWN, Known
from shoal.dht.members import Members
from shoal.dht.memory_directory import MemoryDirectoryHub
from shoal.dht.neighbours import SMALL_SWARM
from shoal.dht.records import RecordBook
from shoal.dht.table import Event
from shoal.node.simulate.membership import PaperMembership, simulated_key
from shoal.protocol.contacts import ContactBook
from shoal.protocol.identity import PeerId, Role, VerifiedPeer
from shoal.protocol.memory_transport import Link, MemoryNetwork, MemoryTransport

RUN = bytes(range(32))
EPOCH = 1_800_000_000.0
JOIN_S = 10.0  # in which the first ones come
NEAR = Link(latency_s=0.02, bytes_per_s=1e7)
_KINDS = [kind.__name__.encode() for kind in (Beat, RosterRecords, RosterWant, Goodbye)]
_NAME_WITHIN = 96  # bytes of a frame, in which its message is named


def wall() -> float:
    return EPOCH + asyncio.get_running_loop().time()


class CountingNetwork(MemoryNetwork):
    """Bytes on heartbeat streams by kind of message, both ways, each once."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, NEAR)
        self.bytes: Counter[str] = Counter()

    def pieces(self, sender: PeerId, receiver: PeerId, method: str, frame: bytes) -> tuple[int, ...]:
        if method == METHOD:
            start = bytes(frame[:_NAME_WITHIN])
            self.bytes[next((kind.decode() for kind in _KINDS if kind in start), "other")] += len(frame)
        return super().pieces(sender, receiver, method, frame)


class Paper(PaperMembership):
    """A member without certificates; some are of the owner's."""

    owners: frozenset[PeerId] = frozenset()

    def verify(self, chain: Sequence[bytes]) -> VerifiedPeer:
        found = super().verify(chain)
        return replace(found, roles=frozenset({Role.OWNER})) if found.peer in self.owners else found


@dataclass(slots=True)
class Peer:
    number: int
    stage: int
    transport: MemoryTransport
    members: Members
    contacts: ContactBook

    @property
    def name(self) -> PeerId:
        return self.transport.me


class Crowd:
    """`count` places; whoever goes (half by SIGKILL) is followed at once by another one of the same stage."""

    def __init__(
        self,
        count: int,
        stages: int,
        *,
        session_s: float,
        seed: int = 1,
        limit: int = SMALL_SWARM,
        known: Known = KNOWN,
        heartbeat_s: float = 1.0,
        ttl_s: float = 30.0,
    ) -> None:
        print("seed", seed)
        self.count, self.stages, self.session_s = count, stages, session_s
        self.limit, self.known, self.heartbeat_s = limit, known, heartbeat_s
        self.ttl_s = ttl_s  # of records, where swarms are small
        self.false_alarms = 0  # somebody alive was called gone
        self._seed = seed
        self.network = CountingNetwork(seed)
        self.hub = MemoryDirectoryHub(self._membership(-1), wall, random.Random(seed))
        self.peers: dict[int, Peer] = {}  # by place
        self._rng = random.Random(seed)
        self._numbers = count
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Crowd:
        for place in range(self.count):
            self._tasks.append(asyncio.create_task(self._keep(place), name=f"place {place}"))
        await asyncio.sleep(JOIN_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for peer in self.peers.values():
            await self._end(peer)

    async def measured(self, warm_s: float, seconds: float) -> dict[str, float]:
        """Bytes a second and peer that were sent on heartbeat streams, by kind."""
        await asyncio.sleep(warm_s)
        before = Counter(self.network.bytes)
        await asyncio.sleep(seconds)
        return {kind: n / seconds / self.count for kind, n in (self.network.bytes - before).items()}

    async def add(self, place: int, number: int, *, owner: bool = False) -> Peer:
        """A peer that announces its stage from the beginning; `owner`: with the owner's role."""
        member = self._membership(number)
        if owner:
            Paper.owners |= {member.key.peer}
            member.me = member.verify(member.chain)
        transport = self.network.transport(member.key.peer, member.me.roles)
        stage = place % self.stages
        contacts = ContactBook()
        members = Members(
            transport=transport,
            directory=self.hub.directory(member.key.peer, member),
            membership=member,
            contacts=contacts,
            record_book=RecordBook(member),
            make_record=functools.partial(self._record, member, number, stage, self.ttl_s),
            make_beat=functools.partial(self._beat, stage),
            clock=wall,
            rng=random.Random(f"{self._seed}/{number}"),
            neighbour_limit=self.limit,
            known=self.known,
            heartbeat_s=self.heartbeat_s,
        )
        members.on_event(self._note)
        peer = self.peers[place] = Peer(number, stage, transport, members, contacts)
        await transport.start()
        await members.start()
        return peer

    async def _keep(self, place: int) -> None:
        number = place
        await asyncio.sleep(self._rng.uniform(0.0, JOIN_S))
        while True:
            peer = await self.add(place, number)
            await asyncio.sleep(self._rng.expovariate(1.0 / self.session_s))
            del self.peers[place]
            if self._rng.random() < 0.5:
                await peer.members.leave()
            await self._end(peer)
            number, self._numbers = self._numbers, self._numbers + 1

    def _note(self, event: Event) -> None:
        alive = any(event.peer == peer.name for peer in self.peers.values())
        self.false_alarms += event.kind == "gone" and alive

    async def _end(self, peer: Peer) -> None:
        self.network.kill(peer.name)
        await peer.members.close()

    def _membership(self, number: int) -> Paper:
        return Paper(RUN, simulated_key(self._seed, number), wall)

    @staticmethod
    def _record(member: PaperMembership, number: int, stage: int, ttl_s: float) -> PeerRecord:
        return PeerRecord(
            peer=member.key.peer,
            incarnation=number + 1,
            sequence=0,
            issued_unix_s=0.0,
            ttl_s=ttl_s,
            state="online",
            stages=(stage,),
            name=f"p{number}",
            addresses=("127.0.0.1:5000",),
            chain=member.chain,
            device="cpu",
            tokens_per_s=0.0,
            version="0",
        )

    @staticmethod
    def _beat(stage: int) -> Beat:
        mine = StageBeat(stage, 9, bytes([1]) * 32, bytes([2]) * 32, 10**9, 1000, 10**7, 100, 10**6, 1e7, 1.0)
        return Beat(backlog_s=1.0, tokens_per_s=1e4, finished_work=1000, stages=(mine,), streams=(stage + 1,))
