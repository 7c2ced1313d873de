"""The directory's memory twin: the same promises within one process, for the simulator and for tests.

All directories of a swarm share one `MemoryDirectoryHub`, which stores sealed values as peers of a DHT would,
behind delay and loss, and which can cut a peer off or vanish altogether.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import Callable

from shoal.dht.directory import Directory, SignedRecord
from shoal.dht.gate import RecordGate, RunSecret
from shoal.dht.records import LOWEST_PORT, SEALED_BYTES, seal
from shoal.protocol import limits
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
        self._values: OrderedDict[PeerId, tuple[bytes, float]] = OrderedDict()
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

    def store(self, peer: PeerId, value: bytes, expires_unix_s: float) -> None:
        """As a replica would: only what passes the gate, and only what expires later than what is there."""
        self.gate.open(peer, value, expires_unix_s)
        _, held_until = self._values.get(peer, (b"", 0.0))
        if expires_unix_s <= held_until:
            raise RecordInvalid(f"a record of {peer} that expires later is stored already")
        self._values[peer] = value, expires_unix_s
        self._values.move_to_end(peer)
        if len(self._values) > limits.RECORDS_HELD:
            self._values.popitem(last=False)

    def values(self) -> dict[PeerId, tuple[bytes, float]]:
        """The values that have not expired, with their expiry."""
        now = self.clock()
        return {peer: held for peer, held in self._values.items() if held[1] > now}


class MemoryDirectory(Directory):
    """One peer's access to the hub."""

    def __init__(self, hub: MemoryDirectoryHub, peer: PeerId, membership: RunSecret) -> None:
        self._hub = hub
        self._peer = peer
        self._membership = membership
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
        hub.store(self._peer, value, expires_unix_s)
        hub.bytes += len(value)
        self._last_expiry_unix_s = expires_unix_s

    async def lookup(self) -> tuple[SignedRecord, ...]:
        if self._closed:
            raise TransportLost("the directory is closed")
        await self._hub.call(self._peer, self._membership)
        gate, found = self._hub.gate, sorted(self._hub.values().items())
        self._hub.bytes += sum(len(value) for _, (value, _) in found)
        return tuple(gate.open(peer, *held) for peer, held in found)

    def bootstrap_addresses(self) -> tuple[str, ...]:
        return (f"/memory/{self._peer}",)

    def met_addresses(self, most: int) -> tuple[str, ...]:
        return ()

    async def close(self) -> None:
        self._closed = True
