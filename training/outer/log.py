"""Log: the chain of a stage's entries, what follows from it, and what it refuses.

Knows no tensors and no network. `Replica` keeps one beside anchors and momentum; snapshots carry a
`LogState`, from which a joiner goes on. Promise P4 is kept here: the steps that entries record for a process
tile its steps without gap or overlap, or the entry is refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

from blake3 import blake3

from shoal.dht.directory import PeerIdText, StageIndex
from shoal.protocol import limits, wire
from shoal.protocol.errors import MessageInvalid, Stale
from shoal.protocol.identity import PeerId
from shoal.protocol.wire import Count, Digest, Identifier, Items, Length, OneOf, wire_message
from shoal.training.outer.codecs import codecs_of
from shoal.training.outer.entry import (
    SKIP,
    Contributor,
    Entry,
    Seat,
    StreamPosition,
    entry_hash,
    parse,
    seats_in,
    summed,
    union,
)
from shoal.training.outer.parts import Fragment

ENDS_KEPT = 4 * limits.ROSTER  # processes whose last step is remembered, least recent contributors go first
FRAGMENTS = 32  # the spec's most
STREAMS_KEPT = 4 * limits.ROSTER
ENTRIES_BYTES = 64 * limits.MIB  # of entries kept beyond the last snapshot, payloads not counted
LEAVE_HEIGHTS = 8  # entries that a peer which was let go has to be gone after; then another may
LOG_STATE_BYTES = 2 * limits.MIB


@wire_message
@dataclass(frozen=True, slots=True)
class StepsEnd:
    """The last steps of a process that the log holds, one a fragment."""

    peer: PeerIdText
    incarnation: Identifier
    steps: Annotated[tuple[Count, ...], Items(FRAGMENTS)]
    tokens: Annotated[tuple[Count, ...], Items(FRAGMENTS)]  # of all its steps up to there


@wire_message
@dataclass(frozen=True, slots=True)
class Leaver:
    """Who was let go, and by the entry of which height. A process that comes back as a new one was not."""

    peer: PeerIdText
    height: Count
    incarnation: Identifier = 0


@wire_message
@dataclass(frozen=True, slots=True)
class Rebuilt:
    """The entry with which the log of a stage begins anew that no copy was left of. Its hash is the head.

    Its weights follow from no entry before it, so it is only ever had with a snapshot.
    """

    stage: StageIndex
    height: Count  # of this entry: above all that was
    policy: Annotated[str, OneOf(frozenset({"mean", "identity"}))]  # of the spec: `stages.when_lost`
    lost_height: Count  # of the run's highest log then: about the rounds that are lost
    peer: PeerIdText  # that did it
    sources: Annotated[tuple[Digest, ...], Items(2)]  # heads of the neighbours' logs it was made of
    weights: Digest

    def head(self, run_id: bytes) -> bytes:
        """Of the log that begins with this entry."""
        return blake3(b"shoal rebuilt\0" + run_id + wire.encode(self, LOG_STATE_BYTES)).digest()


@wire_message
@dataclass(frozen=True, slots=True)
class LogState:
    """All that the entries up to a height leave behind."""

    stage: StageIndex
    height: Count
    head: Digest
    tokens: Count  # as the last entry counts them
    quorum: Annotated[tuple[PeerIdText, ...], Items(limits.ROSTER)]  # who took part in the last round
    ends: Annotated[tuple[StepsEnd, ...], Items(ENDS_KEPT)]
    positions: Annotated[tuple[StreamPosition, ...], Items(STREAMS_KEPT)]
    leaving: Annotated[tuple[Leaver, ...], Items(LEAVE_HEIGHTS)] = ()
    revision: Count = 0  # of the spec, that the last entry named
    rebuilt: Rebuilt | None = None  # the log's first entry, where the stage was lost before
    readers: Annotated[tuple[Annotated[str, Length(0, 64)], ...], Items(STREAMS_KEPT)] = ()  # of `positions`


def check_beginning(run_id: bytes, state: LogState) -> None:
    """Raises MessageInvalid for a state whose log cannot have begun as it says."""
    first = state.rebuilt
    if first is None:
        return
    if first.stage != state.stage or first.height > state.height:
        raise MessageInvalid(f"stage {state.stage} at height {state.height}: rebuilt at {first.height}")
    if first.height == state.height and first.head(run_id) != state.head:
        raise MessageInvalid(f"stage {state.stage} was rebuilt at height {first.height} under another head")


def state_root(tensors: bytes, state: LogState) -> bytes:
    """What beats announce: the digest of anchors and momentum, and all that a joiner takes over with them."""
    return blake3(b"shoal state\0" + tensors + wire.encode(state, LOG_STATE_BYTES)).digest()


def genesis_state(run_id: bytes, stage: int) -> LogState:
    """The state of an empty log: its head names the run and the stage."""
    head = blake3(b"shoal genesis\0" + run_id + stage.to_bytes(4, "little")).digest()
    return LogState(stage, 0, head, 0, (), (), ())


class Log:
    """The chain from some snapshot on. Mutable; owned by one replica."""

    def __init__(self, state: LogState, fragments: Sequence[Fragment]) -> None:
        self.stage = state.stage
        self.height = state.height
        self.head = state.head
        self.counted_tokens = state.tokens
        self.quorum = state.quorum
        # Of the quorum, and who led it; a snapshot tells neither processes nor uplinks, and no leader.
        self.seats = tuple(Seat(peer, 0, 0.0, present=True) for peer in state.quorum)
        self.leader = PeerId("")
        self._leaving = state.leaving
        self.revision = state.revision
        self.rebuilt = state.rebuilt
        self._fragments = fragments
        self._ends = OrderedDict(((end.peer, end.incarnation), end) for end in state.ends)
        self._positions = OrderedDict((p.stream, p.samples) for p in state.positions)
        read = zip(self._positions, state.readers, strict=False)  # nobody's, where a checkpoint begins
        self._readers = {stream: PeerId(reader) for stream, reader in read if reader}
        self._entries: OrderedDict[int, bytes] = OrderedDict()
        self._entries_bytes = 0

    @property
    def tokens(self) -> int:
        """In the log since genesis, of all replicas."""
        return self.counted_tokens // len(self._fragments)

    @property
    def next_fragment(self) -> Fragment:
        """What the next entry synchronises."""
        return self.fragment_at(self.height + 1)

    def fragment_at(self, height: int) -> Fragment:
        """What the entry of a height synchronises: each in turn."""
        return self._fragments[(height - 1) % len(self._fragments)]

    def state(self) -> LogState:
        """What a snapshot at this height carries."""
        readers = tuple(self._readers.get(stream, "") for stream in self._positions)
        return LogState(
            self.stage,
            self.height,
            self.head,
            self.counted_tokens,
            self.quorum,
            tuple(self._ends.values()),
            tuple(StreamPosition(stream, samples) for stream, samples in self._positions.items()),
            self._leaving,
            self.revision,
            self.rebuilt,
            readers if self._readers else (),  # as a log began that knows none: the root goes by it
        )

    @property
    def leaving(self) -> list[PeerId]:
        """Who may leave the stage, and is still here."""
        return [PeerId(leaver.peer) for leaver in self._leaving]

    def lets_go(self, peer: PeerId, incarnation: int) -> bool:
        """Whether this replica may leave: not what had its peer's name before."""
        return any((leaver.peer, leaver.incarnation) == (peer, incarnation) for leaver in self._leaving)

    def end_of(self, peer: PeerId, incarnation: int, fragment: int = 0) -> tuple[int, int]:
        """(step, tokens) up to which the log holds the work of a process in a fragment."""
        end = self._ends.get((peer, incarnation))
        return (end.steps[fragment], end.tokens[fragment]) if end else (0, 0)

    def ends_of(self, peer: PeerId, incarnation: int) -> list[tuple[int, int]]:
        """(step, tokens) of each fragment."""
        return [self.end_of(peer, incarnation, fragment.index) for fragment in self._fragments]

    def last_of(self, peer: PeerId, fragment: int) -> tuple[int, int]:
        """(incarnation, step) up to which the log holds a peer's work in a fragment: of its newest process
        that has some there."""
        ends = ((key, end.steps[fragment]) for key, end in self._ends.items())
        return max(((key[1], step) for key, step in ends if key[0] == peer and step), default=(0, 0))

    def positions(self) -> dict[int, int]:
        """Samples read of each data stream, as far as the log holds their deltas."""
        return dict(self._positions)

    def readers(self) -> dict[int, PeerId]:
        """Who moved each data stream last; of several in one round the lowest."""
        return dict(self._readers)

    def entry(self, height: int) -> bytes | None:
        """The bytes of an entry that is still kept."""
        return self._entries.get(height)

    def head_at(self, height: int) -> bytes | None:
        """The head this chain had at a height, as far back as entries are kept."""
        if height == self.height:
            return self.head
        following = self._entries.get(height + 1)
        return parse(following).previous if following is not None else None

    @property
    def oldest_height(self) -> int:
        """The lowest height whose head is still known."""
        return next(iter(self._entries), self.height + 1) - 1

    def check(self, entry: Entry) -> None:
        """Raises Stale unless the entry continues this chain, MessageInvalid where it breaks its rules."""
        self._check_beginning(entry)
        if entry.parts != (parts := len(self._fragments[entry.fragment].parts)):
            raise MessageInvalid(f"entry {entry.height}: {entry.parts} parts of {parts}")
        if entry.lost:
            self._check_reentry(entry)
            return
        self._check_parts(entry)
        tokens = summed([self.counted_tokens, *(row.tokens for row in entry.contributors)])
        if entry.tokens != tokens:
            raise MessageInvalid(f"entry {entry.height}: {entry.tokens} tokens, {tokens} expected")

    def check_draft(self, draft: Entry) -> None:
        """The same of a draft: what breaks a rule would be gone on with by one leader after the other."""
        if draft.parts or not draft.present():
            raise MessageInvalid(
                f"a draft with {draft.parts} parts and {len(draft.present()) or 'nobody'} present"
            )
        self._check_beginning(draft)

    def _check_beginning(self, entry: Entry) -> None:
        """All but its parts."""
        if entry.height != self.height + 1 or entry.previous != self.head:
            raise Stale(
                f"entry {entry.height} after {entry.previous.hex()[:8]} does not continue "
                f"height {self.height}, head {self.head.hex()[:8]}; catch up first"
            )
        if entry.revision < self.revision:
            raise MessageInvalid(f"entry {entry.height}: revision {entry.revision} after {self.revision}")
        if entry.lost:
            self.check_source(entry)
            return
        fragment = self.next_fragment
        if (entry.stage, entry.fragment) != (self.stage, fragment.index):
            found, expected = _place(entry.stage, entry.fragment), _place(self.stage, fragment.index)
            raise MessageInvalid(f"entry {entry.height}: {found}; {expected} expected")
        codecs_of(entry, len(fragment.parts))
        self._check_contributors(entry)
        present = {entry.roster[seat].peer for seat in entry.present()}
        if entry.leaving and present & {*self.leaving}:
            raise MessageInvalid(f"entry {entry.height}: lets {entry.leaving} go before another has gone")

    def append(self, data: bytes) -> Entry:
        """Take an entry in after `check`. Returns it."""
        entry = parse(data)
        self.check(entry)
        self.height, self.head, self.counted_tokens = entry.height, entry_hash(data), entry.tokens
        self.revision = entry.revision
        self.leader, self.seats = PeerId(entry.leader), tuple(entry.roster[seat] for seat in entry.present())
        self.quorum = tuple(seat.peer for seat in self.seats)
        here: dict[str, int] = {seat.peer: seat.incarnation for seat in self.seats}
        self._leaving = tuple(
            leaver
            for leaver in self._leaving
            if here.get(leaver.peer) == leaver.incarnation and entry.height - leaver.height < LEAVE_HEIGHTS
        )
        if entry.leaving:
            self._leaving += (Leaver(PeerId(entry.leaving), entry.height, here[entry.leaving]),)
        moved: dict[int, PeerId] = {}
        for seat, row, tokens in self._news_of(entry):
            key = (seat.peer, seat.incarnation)
            ends = self.ends_of(*key)
            ends[entry.fragment] = (row.to_step, summed([ends[entry.fragment][1], tokens]))
            self._ends[key] = StepsEnd(*key, *(tuple(column) for column in zip(*ends, strict=True)))
            self._ends.move_to_end(key)
            for position in row.positions:
                before = self._positions.get(position.stream, 0) if entry.lost else 0
                self._positions[position.stream] = max(position.samples, before)
                self._positions.move_to_end(position.stream)
                moved.setdefault(position.stream, PeerId(seat.peer))
        self._readers |= moved
        for kept, most in ((self._ends, ENDS_KEPT), (self._positions, STREAMS_KEPT)):
            while len(kept) > most:
                kept.popitem(last=False)
        self._readers = {stream: peer for stream, peer in self._readers.items() if stream in self._positions}
        self._entries[entry.height] = data
        self._entries_bytes += len(data)
        return entry

    def backfill(self, entries: Iterable[bytes]) -> None:
        """Older entries of this chain, the latest first, as far as they lead up to those kept."""
        for data in entries:
            height = self.oldest_height
            if not data or (above := parse(data).height - height) < 0:
                return
            if above:
                continue
            if entry_hash(data) != self.head_at(height):
                return
            self._entries[height] = data
            self._entries.move_to_end(height, last=False)
            self._entries_bytes += len(data)

    def prune(self, below: int) -> None:
        """Forget the oldest entries below a height while they take more than ENTRIES_BYTES."""
        while self._entries_bytes > ENTRIES_BYTES and (oldest := next(iter(self._entries))) < below:
            self._entries_bytes -= len(self._entries.pop(oldest))

    def _check_reentry(self, entry: Entry) -> None:
        """Once its steps are here a lost entry can re-enter no more, so it does only once.

        They may leave a gap: steps between, of a lost entry that could not re-enter, are in the weights of
        who made them again, and come with its next contribution.
        """
        lost = entry.source()
        parts = [lost.digest(part) for part in range(lost.parts)]
        if any(entry.digest(part) not in (SKIP, digest) for part, digest in enumerate(parts)):
            raise MessageInvalid(f"entry {entry.height}: brings back other parts than the lost entry's")
        if self.holds(lost):
            raise MessageInvalid(f"entry {entry.height}: all steps that it brings back are here already")
        if entry.tokens != (tokens := self.tokens_of(entry)):
            raise MessageInvalid(f"entry {entry.height}: {entry.tokens} tokens, {tokens} expected")

    def check_source(self, draft: Entry) -> None:
        """Raises MessageInvalid for a re-entry, or its draft, of what cannot have been an entry here."""
        lost = draft.source()
        fits = (lost.stage, lost.fragment, lost.contribution, lost.published, lost.mix)
        if lost.lost or not lost.contributors or lost.fragment >= len(self._fragments):
            raise MessageInvalid(f"entry {draft.height}: brings back what is no round of this stage")
        if fits != (self.stage, draft.fragment, draft.contribution, draft.published, draft.mix):
            raise MessageInvalid(f"entry {draft.height}: stage, fragment or codecs are not the lost entry's")
        if lost.parts != len(self._fragments[lost.fragment].parts):
            raise MessageInvalid(f"entry {draft.height}: the lost entry has {lost.parts} parts")
        codecs_of(lost, lost.parts)

    def holds(self, other: Entry) -> bool:
        """Whether all steps of another chain's round are in this one by now."""
        ends = ((other.roster[row.seat], row.to_step) for row in other.contributors)
        return all(
            to_step <= self.end_of(seat.peer, seat.incarnation, other.fragment)[0] for seat, to_step in ends
        )

    def _news_of(self, entry: Entry) -> list[tuple[Seat, Contributor, int]]:
        """What an entry, or the one that it brings back, adds: rows, and the tokens of their new steps."""
        source, found = entry.source(), []
        for row in source.contributors:
            seat = source.roster[row.seat]
            end, _ = self.end_of(seat.peer, seat.incarnation, entry.fragment)
            if row.to_step > end:  # of a lost entry the first steps may be here already
                steps = row.to_step - row.from_step
                new = row.to_step - max(row.from_step, end)
                found.append((seat, row, row.tokens * new // steps))
        return found

    def tokens_of(self, draft: Entry) -> int:
        """What an entry made of this re-entry has to count."""
        return summed([self.counted_tokens, *(tokens for _, _, tokens in self._news_of(draft))])

    def _check_parts(self, entry: Entry) -> None:
        for part in range(entry.parts):
            listed = seats_in(entry.listed_in(part))
            if (entry.digest(part) == SKIP) != (not listed):
                raise MessageInvalid(f"entry {entry.height}, part {part}: listed {sorted(listed)[:8]}")
        rows = {row.seat for row in entry.contributors}
        if union(tuple(entry.listed_in(part) for part in range(entry.parts))) != rows:
            raise MessageInvalid(f"entry {entry.height}: a contributor that no part lists")

    def _check_contributors(self, entry: Entry) -> None:
        for row in entry.contributors:
            seat = entry.roster[row.seat]
            step, _ = self.end_of(seat.peer, seat.incarnation, entry.fragment)
            if row.from_step != step:
                fault = "overlap" if row.from_step < step else "leave a gap"
                raise MessageInvalid(
                    f"entry {entry.height}: steps {row.from_step}-{row.to_step} of {seat.peer} {fault}; "
                    f"the log holds its steps up to {step}"
                )
            if not seat.present:
                raise MessageInvalid(f"entry {entry.height}: {seat.peer} contributes without being present")


def _place(stage: int, fragment: int) -> str:
    return f"stage {stage}, fragment {fragment}"
