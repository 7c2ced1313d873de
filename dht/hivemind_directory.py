"""The directory on hivemind's DHT: the implementation for real networks. The node makes one; tests too.

hivemind's `DHTNode` runs in this process on our loop, over a supervised p2pd (`daemon`), with every call in
an envelope (`guarded_p2p`). Records are filed in `buckets` under the id of their peer, sealed. Routing is
Kademlia's; we store on all nearest nodes at once ourselves, so that a frozen one costs one timeout and not
one after another, and so that we know how many took it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.dht.addresses import AddressBook
from shoal.dht.bootstrap import ADDRESS_DEADLINE_S
from shoal.dht.buckets import Bucket, Spot, Survey
from shoal.dht.daemon import Daemon, DaemonSettings, DaemonState
from shoal.dht.directory import Directory, SignedRecord
from shoal.dht.envelope import Envelope
from shoal.dht.gate import Opened, RecordGate, RunSecret
from shoal.dht.hivemind_loading import load_hivemind
from shoal.dht.records import LOWEST_PORT, SEALED_BYTES, seal
from shoal.protocol import limits
from shoal.protocol.errors import (
    AccessError,
    MessageTooLarge,
    PeerSilent,
    RecordInvalid,
    TransportLost,
)
from shoal.protocol.identity import PeerKey

if TYPE_CHECKING:
    from shoal.dht.kademlia.call_guard import CallGuard
    from shoal.dht.kademlia.guarded_p2p import GuardedP2P
    from shoal.dht.kademlia.joining import Joiner

logger = logging.getLogger(__name__)

PUBLISH_S = 10.0
LOOKUP_S = 10.0
LOOKUP_PATIENCE_S = 2.0  # then a lookup answers with what the last one found, while it goes on
REPLICAS = 5


@dataclass(frozen=True, slots=True)
class DirectorySettings:
    """Where and how the directory listens. `port` 0: any free one, kept in `state_dir` for the next start."""

    state_dir: Path
    host: str = "127.0.0.1"
    port: int = 0
    announce: tuple[str, ...] = ()  # multiaddrs to tell others instead of those listened on
    nat_port_map: bool = False
    bootstrap: tuple[str, ...] = ()  # multiaddrs with /p2p/ID
    lowest_port: int = LOWEST_PORT  # of addresses in records
    call_deadline_s: float = 2.0  # of one DHT call; a peer that missed it is skipped for a while
    bootstrap_deadline_s: float = ADDRESS_DEADLINE_S  # of one address


@dataclass(frozen=True, slots=True)
class DirectoryStatus:
    """For status and dashboard."""

    daemon: DaemonState
    restarts: int
    last_fault: str
    peers_known: int  # in the routing table
    bootstrap_failures: dict[str, str] = field(default_factory=dict)  # address -> reason
    calls_refused: int = 0  # strangers', or malformed
    records_refused: int = 0  # wrong seal, signature, chain, or times


class HivemindDirectory(Directory):
    """Publishes and finds records in the swarm's DHT."""

    def __init__(
        self,
        key: PeerKey,
        membership: RunSecret,
        settings: DirectorySettings,
        *,
        clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self._key = key
        self._membership = membership
        self._settings = settings
        self._rng = rng or random.Random(int.from_bytes(os.urandom(8), "big"))
        self._survey = Survey(Spot.of(key.peer, membership.run_id), self._rng)
        self._gate = RecordGate(membership, clock, settings.lowest_port)
        self._guard: CallGuard | None = None
        self._daemon: Daemon | None = None
        self._joiner: Joiner | None = None
        self._node: Any = None  # hivemind's DHTNode, a new one for each p2pd
        self._keep_joined: asyncio.Task[None] | None = None
        self._last_expiry_unix_s = 0.0
        self._found: tuple[SignedRecord, ...] | None = None
        self._lookup: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start p2pd and join.

        Raises TransportLost when p2pd does not start, BootstrapFailed when no bootstrap address answers; in
        the latter case the directory works alone and goes on trying until `close`.
        """
        await load_hivemind()
        from shoal.dht.kademlia.call_guard import CallGuard
        from shoal.dht.kademlia.joining import Joiner

        settings, membership, me = self._settings, self._membership, self._key.peer
        envelope = Envelope(membership.run_id, membership.sealing_key)
        book = AddressBook()
        self._guard = CallGuard(me, membership.run_id, envelope, book, self._gate, self._rng)
        daemon_settings = DaemonSettings(
            settings.state_dir,
            self._key.libp2p_identity(),
            settings.host,
            settings.port,
            settings.announce,
            settings.nat_port_map,
        )
        self._daemon = Daemon(daemon_settings, self._guard, self._attach, self._rng)
        self._joiner = Joiner(
            me,
            settings.bootstrap,
            settings.bootstrap_deadline_s,
            self._daemon,
            lambda: self._node,
            book,
            settings.state_dir,
            self._rng,
        )
        await self._daemon.start()
        self._joiner.restarted.clear()
        try:
            await self._joiner.join()
        finally:
            self._keep_joined = asyncio.create_task(self._joiner.keep(), name="directory joining")

    async def publish(self, record: SignedRecord, expires_unix_s: float) -> None:
        """Store our record on the nearest peers of the DHT, and on this one.

        Raises MessageTooLarge and RecordInvalid before anything is sent, TransportLost, and PeerSilent when
        other peers are known but none took it.
        """
        value = seal(record, self._membership.run_id, self._membership.sealing_key, os.urandom)
        if len(value) > SEALED_BYTES:
            raise MessageTooLarge(f"a sealed record of {len(value)} bytes, {SEALED_BYTES} allowed")
        # Equal expiries lose against what is stored; the growth stays below the gate's slack.
        expires_unix_s = max(expires_unix_s, self._last_expiry_unix_s + 1e-3)
        stages = self._gate.open(self._key.peer, value, expires_unix_s).stages  # or others would refuse it
        await self._supervisor.call(lambda p2p: self._file(stages, value, expires_unix_s), PUBLISH_S)
        self._last_expiry_unix_s = expires_unix_s

    async def lookup(self, stages: Collection[int] = (), *, widely: bool = False) -> tuple[SignedRecord, ...]:
        """The records of a look, each signed by the peer it is filed under, its chain verified here.

        While a frozen peer delays a lookup by more than LOOKUP_PATIENCE_S, answers with what was found last.
        Raises TransportLost or PeerSilent.
        """
        self._supervisor.check()
        if self._lookup is None or self._lookup.done():
            buckets = self._survey.look(stages, widely=widely)
            self._lookup = asyncio.create_task(self._find(buckets), name="directory lookup")
            self._lookup.add_done_callback(_look_at)
        current = self._lookup
        patience_s = None if self._found is None else LOOKUP_PATIENCE_S
        await asyncio.wait({current}, timeout=patience_s)
        if current.done():
            current.result()
        return self._found or ()

    def sizes(self) -> dict[int, float]:
        return self._survey.sizes()

    def bootstrap_addresses(self) -> tuple[str, ...]:
        """Multiaddrs of this peer, public ones first. Empty before `start`."""
        routes = self._guard.my_routes if self._guard is not None else ()
        return tuple(f"{route}/p2p/{self._key.peer}" for route in routes[: limits.BOOTSTRAP_ADDRESSES])

    def met_addresses(self, most: int) -> tuple[str, ...]:
        if self._guard is None:
            return ()
        book = self._guard.book
        routes = ((peer, book.routes(peer)) for peer in book.recent(most))
        return tuple(f"{known[0]}/p2p/{peer}" for peer, known in routes if known)

    def status(self) -> DirectoryStatus:
        """The picture of the moment; cheap."""
        daemon, joiner = self._daemon, self._joiner
        return DirectoryStatus(
            daemon.state if daemon else DaemonState.DOWN,
            daemon.restarts if daemon else 0,
            daemon.last_fault if daemon else "",
            len(self._node.protocol.routing_table.peer_id_to_uid) if self._node else 0,
            dict(joiner.bootstrap.failures) if joiner else {},
            self._guard.calls_refused if self._guard else 0,
            self._gate.refused,
        )

    async def close(self) -> None:
        tasks = {task for task in (self._keep_joined, self._lookup) if task is not None}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._joiner is not None:
            await self._joiner.close()
        if self._daemon is not None:
            await self._daemon.close()

    @property
    def _supervisor(self) -> Daemon:
        if self._daemon is None:
            raise TransportLost("the directory was not started")
        return self._daemon

    async def _attach(self, p2p: GuardedP2P) -> None:
        """A DHT node on a new p2pd, with what the last one stored."""
        from hivemind.dht.node import DHTID, DHTNode

        guard, joiner = self._guard, self._joiner
        if guard is None or joiner is None:
            raise TransportLost("the directory was not started")
        node = await DHTNode.create(
            p2p=p2p,
            node_id=DHTID.from_bytes(guard.node_id(self._key.peer)),
            num_replicas=REPLICAS,
            wait_timeout=self._settings.call_deadline_s,
            cache_locally=False,  # caches would answer with old records, and tell others to keep them
            cache_nearest=0,
            cache_on_store=False,
            cache_refresh_before_expiry=0,
            reuse_get_requests=False,
        )
        node.protocol.storage = guard.storage
        self._node = node
        joiner.restarted.set()

    async def _file(self, stages: tuple[int, ...], value: bytes, expires_unix_s: float) -> None:
        """Into this peer's buckets, deeper where they turn out to be full."""
        tried: dict[Bucket, list[bool | None]] = {}
        while new := [bucket for bucket in self._survey.filed(stages) if bucket not in tried]:
            answers = await asyncio.gather(*(self._store(bucket, value, expires_unix_s) for bucket in new))
            tried.update(zip(new, answers, strict=True))
            if any(answers[-1]) or False not in answers[-1]:
                break
            await self._read(new[-1:])
        said = [one for answers in tried.values() for one in answers]
        if said and not any(said):
            silent = said.count(None)
            raise PeerSilent(
                f"no directory peer took our record: {silent} silent, {len(said) - silent} refused it; "
                "if all refuse, compare this machine's clock"
            )

    async def _store(self, bucket: Bucket, value: bytes, expires_unix_s: float) -> list[bool | None]:
        """On this node and, at the same time, on the nearest others; what they say, None for silence."""
        from hivemind.dht.node import DHTID
        from hivemind.utils import MSGPackSerializer

        node, me = self._node, self._key.peer
        key = DHTID.from_bytes(bucket.key(self._membership.run_id))
        packed = MSGPackSerializer.dumps(value)
        node.protocol.storage.store(key, packed, expires_unix_s, subkey=str(me))
        nearest = await node.find_nearest_nodes([key], k_nearest=REPLICAS, exclude_self=True)
        answers = await asyncio.gather(
            *(
                node.protocol.call_store(peer, [key], [packed], [expires_unix_s], subkeys=[str(me)])
                for peer in nearest[key].values()
            )
        )
        return [bool(answer[0]) if answer else None for answer in answers]

    async def _find(self, buckets: list[Bucket]) -> None:
        """One pass over the DHT; its result is kept in `_found`."""
        self._found = await self._supervisor.call(lambda p2p: self._read(buckets), LOOKUP_S)

    async def _read(self, buckets: list[Bucket]) -> tuple[SignedRecord, ...]:
        """What they show."""
        from hivemind.dht.node import DHTID

        run_id = self._membership.run_id
        keys = {DHTID.from_bytes(bucket.key(run_id)): bucket for bucket in buckets}
        results = await self._node.get_many_by_id(list(keys), sufficient_expiration_time=float("inf"))
        found: dict[str, Opened] = {}
        for key, bucket in keys.items():
            result, ranks, stages = results[key], [], set[int]()
            for peer, (value, expires_unix_s) in result.value.items() if result is not None else ():
                try:
                    opened = self._gate.open(peer, value, expires_unix_s, bucket.key(run_id))
                except (RecordInvalid, AccessError) as error:
                    logger.debug("left out of the lookup: %s", error)
                    continue
                if peer not in found or opened.last_unix_s > found[peer].last_unix_s:
                    found[peer] = opened  # of two records the newer one
                ranks.append(Spot.of(peer, run_id).rank)
                stages.update(opened.stages)
            self._survey.saw(bucket, ranks, stages)
        return tuple(opened.signed for opened in found.values())


def _look_at(task: asyncio.Task[None]) -> None:
    """Take note of a lookup's error even if nobody waits for it any more; the next lookup meets it itself."""
    if not task.cancelled() and task.exception() is not None:
        logger.debug("lookup failed: %s", task.exception())
