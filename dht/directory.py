"""Directory: who is where. The interface, and the record every peer publishes about itself.

Implementations: `hivemind_directory` (the DHT) and `memory_directory` (the simulator); both file and sample
records as `buckets` says. Records are hints:
signed by their peer, sequenced by (incarnation, sequence), short-lived. Direct streams are the truth.
`records` signs, seals and verifies them; `members` merges them with what streams tell.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

from shoal.protocol import limits
from shoal.protocol.identity import Contact, PeerId
from shoal.protocol.wire import (
    Bounds,
    Count,
    Identifier,
    Items,
    Length,
    OneOf,
    Seconds,
    Text,
    wire_message,
)

PEER_STATES = frozenset({"joining", "online", "draining", "observing"})
STAGES_HELD = 8  # most of one peer
PeerState = Annotated[str, OneOf(PEER_STATES)]
StageIndex = Annotated[int, Bounds(0, limits.STAGES - 1)]
Address = Annotated[str, Length(3, 128)]
UnixSeconds = Annotated[float, Bounds(0.0, 1e11)]
PeerIdText = Annotated[PeerId, Length(46, 64)]


@wire_message
@dataclass(frozen=True, slots=True)
class PeerRecord:
    """What a peer says of itself. Rates claimed here only seed routing."""

    peer: PeerIdText
    incarnation: Identifier  # start of the process in ns since 1970; a higher one supersedes
    sequence: Count  # within the incarnation
    issued_unix_s: UnixSeconds
    ttl_s: Annotated[float, Bounds(1.0, limits.RECORD_TTL_MAX_S)]
    state: PeerState
    stages: Annotated[tuple[StageIndex, ...], Items(STAGES_HELD)]  # held, or being joined
    name: Annotated[str, Length(0, limits.NAME_CHARACTERS)]
    addresses: Annotated[tuple[Address, ...], Items(limits.ADDRESSES_PER_PEER)]  # "host:port"
    chain: Annotated[
        tuple[Annotated[bytes, Length(1, limits.CERTIFICATE_BYTES)], ...],
        Items(limits.CHAIN_LENGTH),
    ]
    device: Text
    tokens_per_s: Annotated[float, Bounds(0.0, 1e12)]
    version: Text
    service_s: Seconds = 0.0  # lane time of a micro-batch at its stage; 0: unknown. For placement
    states: Annotated[tuple[PeerState, ...], Items(STAGES_HELD)] = ()  # at each stage, where they differ

    def contact(self) -> Contact:
        return Contact(self.peer, self.addresses, self.chain)


@wire_message
@dataclass(frozen=True, slots=True)
class SignedRecord:
    """An encoded PeerRecord and its peer's Ed25519 signature over a label, the run and the bytes."""

    record: Annotated[bytes, Length(1, limits.RECORD_BYTES)]
    signature: Annotated[bytes, Length(64, 64)]


class Directory(ABC):
    """Spreads signed records. Soft state: anything may be missing or old."""

    @abstractmethod
    async def start(self) -> None:
        """Begin to take part. Raises BootstrapFailed (one reason for each address) or TransportLost.

        After BootstrapFailed it goes on trying by itself; `close` ends that.
        """

    @abstractmethod
    async def publish(self, record: SignedRecord, expires_unix_s: float) -> None:
        """Spread this peer's own record. Failure is an error of the tree, never silence."""

    @abstractmethod
    async def lookup(self, stages: Collection[int] = (), *, widely: bool = False) -> tuple[SignedRecord, ...]:
        """The records found now, unverified, one a peer: all of a small swarm, a sample of a large one.

        `stages`: those that this peer holds; replicas of theirs and of their neighbours come first.
        `widely`: some of every stage.
        """

    @abstractmethod
    def sizes(self) -> dict[int, float]:
        """About how many peers hold each stage, if lookups show samples; empty if they show everybody."""

    @abstractmethod
    def bootstrap_addresses(self) -> tuple[str, ...]:
        """Addresses that a token may carry so that others can start from this peer."""

    @abstractmethod
    def met_addresses(self, most: int) -> tuple[str, ...]:
        """The like of other peers met lately: with them in it, a token outlives the peer that made it."""

    @abstractmethod
    async def close(self) -> None:
        """Leave."""
