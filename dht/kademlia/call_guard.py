"""CallGuard: what a DHT call or answer may say, once its envelope is open. Used by `guarded_p2p`.

Node ids derive from peer ids (hivemind takes any, so that eclipsing a key would be free), only records that
pass the `RecordGate` are stored or found, each in its own buckets, as many as `RecordStorage` has room for,
and plain values cannot overwrite one.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from typing import Any

from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2

from shoal.dht.addresses import AddressBook
from shoal.dht.buckets import Spot
from shoal.dht.envelope import BODY_BYTES, NEIGHBOURS, CallHeader, Envelope, Neighbour
from shoal.dht.gate import RecordGate
from shoal.dht.kademlia.record_storage import RecordStorage
from shoal.dht.kademlia.values import WHOLE_DICTIONARY, Entry, pack, peer_of_subkey, sealed_in, unpack
from shoal.protocol.errors import AccessError, FrameInvalid, RecordInvalid
from shoal.protocol.identity import PeerId

logger = logging.getLogger(__name__)

_KEY_BYTES = 20
_KEYS_PER_CALL = 64
_VALUES_PER_SLICE = 16  # verified between two looks at the loop: about 10 ms
_NEIGHBOUR_ROUTES = 4


class CallGuard:
    """The rules for DHT calls of one peer; outlives restarts of p2pd."""

    def __init__(
        self,
        me: PeerId,
        run_id: bytes,
        envelope: Envelope,
        book: AddressBook,
        gate: RecordGate,
        rng: random.Random,
    ) -> None:
        self.me = me
        self.envelope = envelope
        self.book = book
        self.my_routes: tuple[str, ...] = ()
        self.calls_refused = 0
        self.storage = RecordStorage(gate, run_id)
        self._run_id = run_id
        self._gate = gate
        self._rng = rng

    def node_id(self, peer: PeerId) -> bytes:
        """The only place in the DHT that a peer may take."""
        return hashlib.blake2b(self._run_id + peer.encode(), digest_size=_KEY_BYTES).digest()

    def check_sender(self, info: Any, peer: PeerId) -> None:
        """Raises FrameInvalid for a NodeInfo that claims another place."""
        if info.node_id not in (b"", self.node_id(peer)):
            raise FrameInvalid(f"{peer} claims a node id that is not its own")

    async def allows(self, request: Any) -> bool:
        """Check a request in place; False: answer "not stored". Raises FrameInvalid."""
        if isinstance(request, dht_pb2.FindRequest):
            _check_keys(request.keys)
        if not isinstance(request, dht_pb2.StoreRequest):
            return True
        _check_keys(request.keys)
        columns = (request.subkeys, request.values, request.expiration_time, request.in_cache)
        if any(len(column) != len(request.keys) for column in columns):
            raise FrameInvalid("a store request with columns of different lengths")
        if any(request.in_cache):
            return False
        for index, (key, subkey, value) in enumerate(
            zip(request.keys, request.subkeys, request.values, strict=True)
        ):
            if subkey == WHOLE_DICTIONARY:
                found = await self._believed(value, key)
                good = sorted(found, key=self._rank)  # hivemind stores until one is refused
                request.values[index] = pack(good)
                if not good:
                    return False
                continue
            entry = peer_of_subkey(subkey), sealed_in(value), request.expiration_time[index]
            if not self._believes(entry, key):
                return False
        return True

    async def clean(self, response: Any) -> None:
        """Remove from a find response what is not to be believed. Raises FrameInvalid."""
        if not isinstance(response, dht_pb2.FindResponse):
            return
        for result in response.results:
            nearest = zip(result.nearest_node_ids, result.nearest_peer_ids, strict=False)
            kept = [(node, raw) for node, raw in nearest if node == self.node_id(peer_of(raw))][:NEIGHBOURS]
            del result.nearest_node_ids[:], result.nearest_peer_ids[:]
            result.nearest_node_ids.extend(node for node, _ in kept)
            result.nearest_peer_ids.extend(raw for _, raw in kept)
            found = result.type == dht_pb2.FOUND_DICTIONARY
            entries = await self._believed(result.value) if found else []
            if entries:
                result.value = pack(entries)
                result.expiration_time = max(expires_unix_s for _, _, expires_unix_s in entries)
            else:
                result.type, result.value, result.expiration_time = dht_pb2.NOT_FOUND, b"", 0.0

    def fit(self, response: Any) -> None:
        """Make a find response as small as a call may be, by a random choice of the records.

        A request for many full buckets of long records comes here.
        """
        size = response.ByteSize()
        if size <= BODY_BYTES or not isinstance(response, dht_pb2.FindResponse):
            return
        for result in response.results:
            if result.type == dht_pb2.FOUND_DICTIONARY:
                entries = unpack(result.value)
                result.value = pack(self._rng.sample(entries, int(len(entries) * 0.9 * BODY_BYTES / size)))

    def header(self, message: Any) -> CallHeader:
        """Our routes; with a find response, those of the peers that it names."""
        named: dict[PeerId, tuple[str, ...]] = {}
        if isinstance(message, dht_pb2.FindResponse):
            for result in message.results:
                for peer in map(peer_of, result.nearest_peer_ids):
                    named[peer] = self.book.routes(peer)[:_NEIGHBOUR_ROUTES]
        told = [Neighbour(peer, routes) for peer, routes in named.items() if routes]
        return CallHeader(self.my_routes, tuple(told[:NEIGHBOURS]))

    def learn(self, peer: PeerId, header: CallHeader) -> None:
        """Take routes from the header of a peer's message into the book."""
        self.book.learn(peer, header.multiaddrs, by_itself=True)
        for neighbour in header.neighbours:
            if neighbour.peer != self.me:
                self.book.learn(neighbour.peer, neighbour.multiaddrs, by_itself=False)

    async def _believed(self, packed: bytes, key: bytes | None = None) -> list[Entry]:
        """The entries of a dictionary that pass the gate."""
        kept: list[Entry] = []
        unseen = 0
        for entry in unpack(packed):
            unseen += not self._gate.knows(entry[0], entry[1])
            if self._believes(entry, key):
                kept.append(entry)
            if unseen >= _VALUES_PER_SLICE:
                unseen = 0
                await asyncio.sleep(0)
        return kept

    def _believes(self, entry: Entry, key: bytes | None) -> bool:
        try:
            self._gate.open(*entry, key)
        except (RecordInvalid, AccessError) as error:
            logger.debug("left out of the directory: %s", error)
            return False
        return True

    def _rank(self, entry: Entry) -> int:
        return Spot.of(entry[0], self._run_id).rank


def peer_of(raw: bytes) -> PeerId:
    """The peer id in libp2p's bytes."""
    return PeerId(PeerID(raw).to_base58())


def _check_keys(keys: Any) -> None:
    if len(keys) > _KEYS_PER_CALL or any(len(key) != _KEY_BYTES for key in keys):
        raise FrameInvalid(f"a DHT call with {len(keys)} keys, or keys that are not {_KEY_BYTES} bytes")
