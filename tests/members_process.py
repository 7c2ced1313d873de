"""Members on real sockets, on loopback; as a program a peer to be killed: members_process.py TOKEN RECORD."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import MappingProxyType

from shoal.dht.beats import Beat
from shoal.dht.directory import PeerRecord, SignedRecord
from shoal.dht.interest import KNOWN, Known
from shoal.dht.members import Members
from shoal.dht.memory_directory import MemoryDirectory, MemoryDirectoryHub
from shoal.dht.records import RecordBook
from shoal.protocol.admission import JoinToken, Membership
from shoal.protocol.contacts import ContactBook
from shoal.protocol.grpc_transport import GrpcTransport
from shoal.protocol.identity import PeerKey
from shoal.protocol.wire import decode


class Census(MemoryDirectory):
    """A directory that tells of a large swarm and shows nobody of it."""

    def __init__(self, hub: MemoryDirectoryHub, membership: Membership, sizes: Mapping[int, float]) -> None:
        super().__init__(hub, membership.key.peer, membership)
        self._told = dict(sizes)

    def sizes(self) -> dict[int, float]:
        return self._told


@asynccontextmanager
async def peer(
    token: JoinToken, stage: int = 0, sizes: Mapping[int, float] = MappingProxyType({}), known: Known = KNOWN
) -> AsyncIterator[Members]:
    """One peer whose directory nobody shares: it meets only whom it is told of.

    `sizes`: of the stages of a swarm, as its directory tells.
    """
    membership = Membership(token, PeerKey.generate(), time.time)
    contacts = ContactBook()
    transport = GrpcTransport(membership, contacts, "127.0.0.1", 0)
    started = time.time_ns()

    def record() -> PeerRecord:
        return PeerRecord(
            peer=membership.key.peer,
            incarnation=started,
            sequence=0,
            issued_unix_s=0.0,
            ttl_s=30.0,
            state="online",
            stages=(stage,),
            name="",
            addresses=(f"127.0.0.1:{transport.port}",),
            chain=membership.chain,
            device="cpu",
            tokens_per_s=0.0,
            version="0",
        )

    rng = random.Random(started)
    hub = MemoryDirectoryHub(membership, time.time, rng)
    members = Members(
        transport=transport,
        directory=Census(hub, membership, sizes),
        membership=membership,
        contacts=contacts,
        record_book=RecordBook(membership),
        make_record=record,
        make_beat=Beat,
        clock=time.time,
        rng=rng,
        known=known,
    )
    await transport.start()
    try:
        async with members:
            yield members
    finally:
        await transport.close()


async def live(token: JoinToken, known: SignedRecord) -> None:
    async with peer(token) as members:
        await members.learn((known,), "the command line")
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(live(JoinToken.parse(sys.argv[1]), decode(SignedRecord, bytes.fromhex(sys.argv[2]))))
