"""Entry: the committed result of a round, one link of a stage's log. Canonical bytes and their hash.

A *draft* is an entry before its parts are known: what GO fixes. A *re-entry* brings back one entry of a chain
that lost a fork: nobody contributes, its parts are those of the lost entry, by the same digests. Entries
outgrow message headers, so they travel as payloads of at most ENTRY_BYTES.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from blake3 import blake3

from shoal.dht.directory import PeerIdText, StageIndex
from shoal.protocol import limits, wire
from shoal.protocol.errors import MessageInvalid
from shoal.protocol.wire import COUNT_MOST, Bounds, Count, Digest, Identifier, Items, Length, wire_message

# 4096 parts × (32 + 128) bytes, 1024 seats and as many contributors of about 80 bytes each: under 1 MiB; a
# re-entry carries such an entry within itself.
LOST_BYTES = 1 * limits.MIB
ENTRY_BYTES = 2 * limits.MIB
SKIP = bytes(32)  # the digest of a part that stays as it is
SeatIndex = Annotated[int, Bounds(0, limits.ROSTER - 1)]
CodecTag = Annotated[str, Length(0, 32)]
Norm = Annotated[float, Bounds(0.0, 1e18)]  # sums of a roster's deltas stay far inside fp32


@wire_message
@dataclass(frozen=True, slots=True)
class Seat:
    """One place in a roster."""

    peer: PeerIdText
    incarnation: Identifier
    uplink: Annotated[float, Bounds(0.0, 1e15)]  # bytes a second, 1 where nobody's is known
    present: bool = False  # answered PREPARE: may own parts and gets what is published


@wire_message
@dataclass(frozen=True, slots=True)
class StreamPosition:
    """How far a data stream was read when its driver's contribution was taken."""

    stream: Identifier
    samples: Count


@wire_message
@dataclass(frozen=True, slots=True)
class Contributor:
    """One peer's steps from_step < step ≤ to_step in one fragment, counted since its process started."""

    seat: SeatIndex
    from_step: Count
    to_step: Count
    tokens: Count  # of those steps
    norm: Norm  # of its delta, as it said
    clip: Annotated[float, Bounds(0.0, 1.0)]  # factor on its delta
    positions: Annotated[tuple[StreamPosition, ...], Items(8)] = ()


@wire_message
@dataclass(frozen=True, slots=True)
class Entry:
    """What a round decided. Ballots order attempts at one height: by number, then by leader."""

    stage: StageIndex
    height: Annotated[int, Bounds(1, 2**53)]
    previous: Digest  # hash of the entry before, or the genesis head
    ballot: Count
    leader: PeerIdText
    revision: Count  # of the spec
    fragment: Annotated[int, Bounds(0, 255)]  # of the stage, in turns by height
    roster: Annotated[tuple[Seat, ...], Items(limits.ROSTER)]  # by peer id
    contributors: Annotated[tuple[Contributor, ...], Items(limits.ROSTER)]  # by seat
    first_stage_head: Annotated[bytes, Length(0, 32)]  # the head it ran under; empty: not known
    contribution: CodecTag = ""  # how contributions are encoded
    published: CodecTag = ""  # how the means are
    digests: Annotated[bytes, Length(0, 32 * limits.PARTS)] = b""  # 32 bytes a part, SKIP or of the part
    listed: Annotated[bytes, Length(0, limits.PARTS * limits.ROSTER // 8)] = b""  # a bitmap of seats a part
    tokens: Count = 0  # of all contributions since genesis; n fragments count each token n times
    lost: Annotated[bytes, Length(0, LOST_BYTES)] = b""  # of a re-entry: the entry that it brings back
    scale: Annotated[float, Bounds(0.0, 1.0)] = 0.0  # of a re-entry: on the mean
    leaving: Annotated[str, Length(0, 64)] = ""  # LEAVE: a peer that may go from here on
    mix: Annotated[bytes, Length(0, limits.PARTS)] = b""  # a code a part, where codecs go by part

    def __post_init__(self) -> None:
        peers = [seat.peer for seat in self.roster]
        if not peers or peers != sorted(set(peers)):
            raise ValueError("the roster is empty or not in order")
        if self.leader not in peers:
            raise ValueError("the leader has no seat")
        seats = [row.seat for row in self.contributors]
        if seats != sorted(set(seats)) or (seats and seats[-1] >= len(peers)):
            raise ValueError("contributors out of order or without a seat")
        for row in self.contributors:
            if row.from_step >= row.to_step or row.tokens == 0 or row.clip == 0.0:
                raise ValueError(f"seat {row.seat} contributes nothing")
        if len(self.digests) % 32 or len(self.listed) != (0 if self.lost else self.parts * self.bitmap_bytes):
            raise ValueError(f"{len(self.digests)} bytes of digests, {len(self.listed)} of bitmaps")
        if self.listed and not set(seats) >= union(tuple(map(self.listed_in, range(self.parts)))):
            raise ValueError("a part lists a seat that contributes nothing")
        if self.leaving and self.leaving not in {self.roster[seat].peer for seat in self.present()}:
            raise ValueError("who may leave is not present")
        if bool(self.lost) != (self.scale > 0.0) or (self.lost and self.contributors):
            raise ValueError("a re-entry has a scale and no contributors, and nothing else has a scale")

    @property
    def parts(self) -> int:
        return len(self.digests) // 32

    @property
    def bitmap_bytes(self) -> int:
        return -(-len(self.roster) // 8)

    def digest(self, part: int) -> bytes:
        """The part's digest, or SKIP."""
        return self.digests[32 * part : 32 * part + 32]

    def source(self) -> Entry:
        """The entry whose round made the parts: this one, or the lost one. Raises MessageInvalid."""
        return parse(self.lost) if self.lost else self

    def listed_in(self, part: int) -> bytes:
        """The bitmap of seats whose contributions are in the part's mean; empty in a re-entry."""
        return self.listed[self.bitmap_bytes * part : self.bitmap_bytes * (part + 1)]

    def lists(self, part: int, seat: int) -> bool:
        """Whether the part's mean holds the contribution of a seat."""
        return bool(self.listed_in(part)[seat // 8] >> seat % 8 & 1)

    def seat_of(self, peer: str, incarnation: int | None = None) -> int | None:
        """The seat of a peer (in that incarnation), or None."""
        for index, seat in enumerate(self.roster):
            if seat.peer == peer and incarnation in (None, seat.incarnation):
                return index
        return None

    def present(self) -> list[int]:
        """Seats that take part."""
        return [index for index, seat in enumerate(self.roster) if seat.present]

    def row_of(self, seat: int) -> Contributor | None:
        """What the seat contributes."""
        return next((row for row in self.contributors if row.seat == seat), None)

    def encode(self) -> bytes:
        """Canonical bytes."""
        return wire.encode(self, ENTRY_BYTES)

    def finish(self, results: list[tuple[bytes, bytes] | None], previous_tokens: int) -> Entry:
        """The entry that a draft becomes: (digest, bitmap) of each part, None for those skipped.

        Contributors that no part lists are left out: for the log they did not take part.
        """
        empty = (SKIP, bytes(self.bitmap_bytes))
        digests, bitmaps = zip(*(result or empty for result in results), strict=True)
        kept = union(bitmaps)
        rows = tuple(row for row in self.contributors if row.seat in kept)
        return dataclasses.replace(
            self,
            contributors=rows,
            digests=b"".join(digests),
            listed=b"".join(bitmaps),
            tokens=summed([previous_tokens, *(row.tokens for row in rows)]),
        )


def summed(tokens: Iterable[int]) -> int:
    """Tokens in all, up to what an entry can carry: one member's claim must not fail everybody's rounds."""
    return min(sum(tokens), COUNT_MOST)


@functools.lru_cache(maxsize=16)  # an entry is looked at again at every step of its way
def parse(data: bytes) -> Entry:
    """The entry in `data`. Raises MessageInvalid, also for bytes that are not the canonical ones."""
    entry = wire.decode(Entry, data, ENTRY_BYTES)
    if entry.encode() != data:
        raise MessageInvalid(f"Entry {entry.height}: not in canonical form")
    return entry


def entry_hash(data: bytes) -> bytes:
    """The head of a log that ends with these entry bytes."""
    return blake3(b"shoal entry\0" + data).digest()


def draft_id(data: bytes) -> bytes:
    """What contributions and published parts name the round by."""
    return blake3(b"shoal draft\0" + data).digest()


def part_digest(listed: bytes, encoded: bytes | bytearray | memoryview) -> bytes:
    """Names a published part: the contributors and the encoded mean."""
    hasher = blake3(b"shoal part\0" + len(listed).to_bytes(2, "little") + listed)
    return hasher.update(encoded).digest()


def bitmap(seats: set[int], size: int) -> bytes:
    """Bit i of byte i // 8 for each seat; `size` seats in all."""
    bits = sum(1 << seat for seat in seats)
    return bits.to_bytes(-(-size // 8), "little")


def seats_in(bits: bytes) -> set[int]:
    """The seats of a bitmap."""
    number = int.from_bytes(bits, "little")
    return {index for index in range(number.bit_length()) if number >> index & 1}


def union(bitmaps: tuple[bytes, ...]) -> set[int]:
    """The seats of all bitmaps."""
    number = 0
    for bits in bitmaps:
        number |= int.from_bytes(bits, "little")
    return seats_in(number.to_bytes(limits.ROSTER // 8, "little"))
