"""A swarm of `Members` on memory links and a memory directory, under a virtual clock; used by test_members.

Keys, tokens and leaves are made once a test process; their signatures are the only randomness without a seed.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
import random
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from shoal.dht.beats import Beat, StageBeat
from shoal.dht.directory import PeerRecord
from shoal.dht.liveness import Liveness
from shoal.dht.members import Members
from shoal.dht.memory_directory import MemoryDirectoryHub
from shoal.dht.records import RecordBook
from shoal.dht.table import Event
from shoal.dht.view import SwarmView
from shoal.protocol.admission import Membership, OwnerKey
from shoal.protocol.amendments import AmendmentBook
from shoal.protocol.contacts import ContactBook
from shoal.protocol.errors import NetworkError
from shoal.protocol.identity import PeerId, PeerKey, Role
from shoal.protocol.memory_transport import Link, MemoryNetwork
from shoal.protocol.revocation import RevocationBook, RevocationList, sign_revocations

RUN = bytes(range(32))
EPOCH = 1_800_000_000.0
# No bandwidth limit: certificates differ in length from process to process, and then nobody notices.
NEAR = Link(latency_s=0.02, bytes_per_s=math.inf)
FAR = Link(latency_s=0.5, bytes_per_s=math.inf, loss=0.05)


def wall() -> float:
    """Unix seconds of the world, moving with the virtual clock."""
    try:
        return EPOCH + asyncio.get_running_loop().time()
    except RuntimeError:
        return EPOCH


@functools.cache
def owner() -> OwnerKey:
    with tempfile.TemporaryDirectory() as directory:
        return OwnerKey.create(Path(directory) / "owner", RUN, "test", EPOCH)


@functools.cache
def membership(number: int) -> Membership:
    with tempfile.TemporaryDirectory() as directory:
        owner().directory = Path(directory)
        token = owner().issue_token([Role.TRAINER], 7 * 86_400.0, ["a"], "volunteer", EPOCH)
    made = Membership(token, PeerKey.from_seed(number.to_bytes(32, "big")), wall)
    if number:  # in one process, one look at each certificate chain is enough
        made._known = membership(0)._known
    return made


class Swarm:
    """Peers by number. Peer n holds stage n modulo `stages`. `trace` has every event as everybody saw it."""

    def __init__(self, seed: int, *, limit: int = 32, stages: int = 2, link: Link = NEAR) -> None:
        print("seed", seed)
        self.seed, self.limit, self.stages = seed, limit, stages
        self.network = MemoryNetwork(seed, link)
        self.hub = MemoryDirectoryHub(membership(0), wall, random.Random(seed + 1))
        self.peers: dict[int, Members] = {}
        self.state: dict[int, str] = {}
        self.trace: list[tuple[float, int, str, int, str]] = []
        self.uplinks: dict[int, float] = {}  # bytes a second, as they claim
        self._numbers: dict[PeerId, int] = {}
        self._starts: dict[int, int] = {}  # incarnations

    async def add(self, *numbers: int) -> None:
        """Start these peers."""
        for number in numbers:
            member = membership(number)
            member.revocations = RevocationBook(RUN, member.token.root_der)
            member.amendments = AmendmentBook(RUN, member.token.root_der)
            member.renewed.clear()
            transport = self.network.transport(member.key.peer, member.me.roles)
            self.state[number] = "online"
            self._starts[number] = self._starts.get(number, 0) + 1
            self._numbers[member.key.peer] = number
            members = Members(
                transport=transport,
                directory=self.hub.directory(member.key.peer, member),
                membership=member,
                contacts=ContactBook(),
                record_book=RecordBook(member),
                make_record=functools.partial(self._record, number),
                make_beat=functools.partial(self._beat, number),
                clock=wall,
                rng=random.Random(self.seed * 1000 + number),
                neighbour_limit=self.limit,
            )
            members.on_event(functools.partial(self._note, number))
            self.peers[number] = members
            await transport.start()
            await members.start()

    async def close(self) -> None:
        for number, members in self.peers.items():
            await members.close()
            self.network.kill(self.peer(number))

    async def kill(self, number: int) -> None:
        """SIGKILL: connections close, nothing is said."""
        self.network.kill(self.peer(number))
        await self.peers.pop(number).close()

    async def freeze(self, number: int, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after that many seconds."""
        self.network.freeze(self.peer(number))
        await asyncio.sleep(seconds)
        self.network.thaw(self.peer(number))

    def part(self, ones: set[int], others: set[int]) -> None:
        """Nothing passes between these two sets any more."""
        for one, other in itertools.product(sorted(ones), sorted(others)):
            self.network.cut(self.peer(one), self.peer(other))

    def heal(self) -> None:
        """Undo all of `part`."""
        for one, other in itertools.combinations(sorted(self.peers), 2):
            self.network.heal(self.peer(one), self.peer(other))

    def peer(self, number: int) -> PeerId:
        return membership(number).key.peer

    def sees(self, number: int, liveness: Liveness) -> set[int]:
        """Whom peer `number` sees in this standing, itself left out."""
        members = self.peers[number].view().members
        standing = (m.peer for m in members if m.liveness is liveness and m.peer != self.peer(number))
        return {self._numbers[peer] for peer in standing}

    async def meet(self, numbers: Iterable[int], timeout_s: float = 15.0) -> None:
        """Until each of these peers sees exactly these alive."""
        everybody = frozenset(numbers)
        peers = frozenset(self.peer(number) for number in everybody)

        def met(view: SwarmView) -> bool:
            return {m.peer for m in view.members if m.liveness is Liveness.ALIVE} == peers

        await self.all(everybody, met, timeout_s)

    async def lose(self, number: int, timeout_s: float) -> None:
        """Until all others see this peer gone."""
        rest = [other for other in self.peers if other != number]
        await self.all(rest, lambda view: view.is_gone(self.peer(number)), timeout_s)
        await asyncio.sleep(0.001)  # events come just after the view

    async def all(
        self, numbers: Iterable[int], predicate: Callable[[SwarmView], bool], timeout_s: float = 15.0
    ) -> None:
        """Until the views of all these peers satisfy `predicate`."""
        async with asyncio.TaskGroup() as tasks:
            for number in numbers:
                tasks.create_task(self._waited(number, predicate, timeout_s))

    def events(self, observer: int, subject: int, since_s: float = 0.0) -> list[str]:
        """What `observer` was told of `subject`."""
        seen = [event for event in self.trace if event[0] >= round(since_s, 6)]
        return [kind for _, by, kind, of, _ in seen if (by, of) == (observer, subject)]

    def revoke(self, at: int, *numbers: int) -> None:
        """The owner hands peer `at` a list that shuts these out."""
        listed = RevocationList().extended([], [self.peer(number) for number in numbers])
        self.peers[at].revocations.adopt(sign_revocations(listed, RUN, owner().sign))

    async def _waited(self, number: int, predicate: Callable[[SwarmView], bool], timeout_s: float) -> None:
        try:
            await self.peers[number].wait_for(predicate, timeout_s)
        except NetworkError as error:
            seen = {liveness.value: self.sees(number, liveness) for liveness in Liveness}
            raise AssertionError(f"peer {number}: {error}; sees {seen}") from error

    def _note(self, number: int, event: Event) -> None:
        now = round(asyncio.get_running_loop().time(), 6)
        self.trace.append((now, number, event.kind, self._numbers[event.peer], event.reason))

    def _record(self, number: int) -> PeerRecord:
        member = membership(number)
        return PeerRecord(
            peer=member.key.peer,
            incarnation=self._starts[number],
            sequence=0,
            issued_unix_s=0.0,
            ttl_s=30.0,
            state=self.state[number],
            stages=(number % self.stages,),
            name=f"p{number}",
            addresses=("127.0.0.1:5000",),
            chain=member.chain,
            device="cpu",
            tokens_per_s=0.0,
            version="0",
        )

    def _beat(self, number: int) -> Beat:
        uplink = self.uplinks.get(number, 0.0)
        return Beat(stages=(StageBeat(number % self.stages, uplink_bytes_per_s=uplink),))
