"""The directory's memory twin: the same promises within one process, for the simulator and for tests.

All directories of a swarm share one `MemoryDirectoryHub`, which stores sealed values as peers of a DHT would,
behind delay and loss, and which can cut a peer off or vanish altogether.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection

from shoal.dht.buckets import FULL, Bucket, Spot, Survey
from shoal.dht.directory import Directory, SignedRecord
from shoal.dht.gate import Opened, RecordGate, RunSecret
from shoal.dht.records import LOWEST_PORT, SEALED_BYTES, seal
from shoal.protocol.errors import (
    AccessError,
    BootstrapFailed,
    MessageTooLarge,
    PeerSilent,
    RecordInvalid,
    TransportLost,
)
from shoal.protocol.identity import PeerId


class MemoryDirectoryHub:
    """What the peers of a simulated DHT store between them. `clock` gives Unix time in seconds."""

    def __init__(
        self,
        membership: RunSecret,
        clock: Callable[[], float],
        rng: random.Random,
        *,
        delay_s: float = 0.01,
        loss: float = 0.0,
        call_deadline_s: float = 2.0,
        lowest_port: int = LOWEST_PORT,
    ) -> None:
        self.clock = clock
        self.rng = rng
        self.delay_s = delay_s
        self.loss = loss  # share of the calls that get no answer
        self.call_deadline_s = call_deadline_s  # what a call without an answer costs
        self.bytes = 0  # of values, published and found
        self.gate = RecordGate(membership, clock, lowest_port)
        self._membership = membership
        self._buckets: dict[Bucket, dict[PeerId, tuple[bytes, float]]] = {}
        self._cut: set[PeerId] = set()
        self._all_cut = False

    def directory(self, peer: PeerId, membership: RunSecret) -> MemoryDirectory:
        """A peer's directory; `membership` is its own, and decides whether its calls are taken."""
        return MemoryDirectory(self, peer, membership)

    def cut(self, peer: PeerId | None = None) -> None:
        """Cut a peer off from the directory; without an argument, everybody."""
        if peer is None:
            self._all_cut = True
        else:
            self._cut.add(peer)

    def heal(self) -> None:
        self._cut.clear()
        self._all_cut = False

    async def call(self, peer: PeerId, membership: RunSecret) -> None:
        """What a call of `peer` goes through. Raises TransportLost, PeerSilent or AccessError."""
        await asyncio.sleep(self.delay_s * self.rng.uniform(0.5, 1.5))
        if self._all_cut or peer in self._cut:
            await asyncio.sleep(self.call_deadline_s)
            raise TransportLost("the directory is cut off")
        if self.rng.random() < self.loss:
            await asyncio.sleep(self.call_deadline_s)
            raise PeerSilent("no peer of the directory answered")
        if (membership.run_id, membership.sealing_key) != (
            self._membership.run_id,
            self._membership.sealing_key,
        ):
            raise AccessError("refused: DHT calls need a token of this run")

    def store(self, bucket: Bucket, peer: PeerId, value: bytes, expires_unix_s: float) -> bool:
        """As a replica would: only what passes the gate and expires later than what is there; False: full."""
        self.gate.open(peer, value, expires_unix_s, self._key(bucket))
        held = self._buckets.setdefault(bucket, {})
        if expires_unix_s <= held.get(peer, (b"", 0.0))[1]:
            raise RecordInvalid(f"a record of {peer} that expires later is stored already")
        if peer not in held and len(self.values(bucket)) >= FULL:
            highest = max(held, key=self.rank)
            if self.rank(peer) > self.rank(highest):
                return False
            del held[highest]
        held[peer] = value, expires_unix_s
        self.bytes += len(value)
        return True

    def values(self, bucket: Bucket) -> dict[PeerId, tuple[bytes, float]]:
        """The values that have not expired, with their expiry."""
        now, held = self.clock(), self._buckets.get(bucket, {})
        for peer in [peer for peer, (_, until_s) in held.items() if until_s <= now]:
            del held[peer]
        return dict(held)

    def show(self, bucket: Bucket) -> dict[PeerId, Opened]:
        """As replicas answer."""
        found = sorted(self.values(bucket).items())
        self.bytes += sum(len(value) for _, (value, _) in found)
        return {peer: self.gate.open(peer, *held, self._key(bucket)) for peer, held in found}

    def rank(self, peer: PeerId) -> int:
        return Spot.of(peer, self._membership.run_id).rank

    def _key(self, bucket: Bucket) -> bytes:
        return bucket.key(self._membership.run_id)


class MemoryDirectory(Directory):
    """One peer's access to the hub."""

    def __init__(self, hub: MemoryDirectoryHub, peer: PeerId, membership: RunSecret) -> None:
        self._hub = hub
        self._peer = peer
        self._membership = membership
        self._survey = Survey(Spot.of(peer, membership.run_id), hub.rng)
        self._last_expiry_unix_s = 0.0
        self._closed = False

    async def start(self) -> None:
        try:
            await self._hub.call(self._peer, self._membership)
        except (TransportLost, PeerSilent, AccessError) as error:
            raise BootstrapFailed(f"none of 1 bootstrap addresses answered:\n  memory: {error}") from error

    async def publish(self, record: SignedRecord, expires_unix_s: float) -> None:
        if self._closed:
            raise TransportLost("the directory is closed")
        membership, hub = self._membership, self._hub
        value = seal(record, membership.run_id, membership.sealing_key, hub.rng.randbytes)
        if len(value) > SEALED_BYTES:
            raise MessageTooLarge(f"a sealed record of {len(value)} bytes, {SEALED_BYTES} allowed")
        await hub.call(self._peer, membership)
        expires_unix_s = max(expires_unix_s, self._last_expiry_unix_s + 1e-3)
        opened = hub.gate.open(self._peer, value, expires_unix_s)
        tried: dict[Bucket, bool] = {}
        while new := [bucket for bucket in self._survey.filed(opened.stages) if bucket not in tried]:
            tried.update((bucket, hub.store(bucket, self._peer, value, expires_unix_s)) for bucket in new)
            if tried[new[-1]]:
                break
            self._read(new[-1:])
        self._last_expiry_unix_s = expires_unix_s

    async def lookup(self, stages: Collection[int] = (), *, widely: bool = False) -> tuple[SignedRecord, ...]:
        if self._closed:
            raise TransportLost("the directory is closed")
        await self._hub.call(self._peer, self._membership)
        return self._read(self._survey.look(stages, widely=widely))

    def _read(self, buckets: list[Bucket]) -> tuple[SignedRecord, ...]:
        """What they show."""
        found: dict[PeerId, Opened] = {}
        for bucket in buckets:
            shown = self._hub.show(bucket)
            stages = {stage for opened in shown.values() for stage in opened.stages}
            self._survey.saw(bucket, [self._hub.rank(peer) for peer in shown], stages)
            for peer, opened in shown.items():  # of two records the newer one
                if peer not in found or opened.last_unix_s > found[peer].last_unix_s:
                    found[peer] = opened
        return tuple(opened.signed for opened in found.values())

    def sizes(self) -> dict[int, float]:
        return self._survey.sizes()

    def bootstrap_addresses(self) -> tuple[str, ...]:
        return (f"/memory/{self._peer}",)

    def met_addresses(self, most: int) -> tuple[str, ...]:
        return ()

    async def close(self) -> None:
        self._closed = True
