"""Circle: the peers of a large swarm whose records this one keeps, as `interest` draws it; part of `Members`.

Neighbours offer a record only to whom it concerns (`link`), and what the directory shows is taken in by the
same rule (`roster`), so what is held, offered and passed on stays the same however many there are. Owners'
peers keep everybody's record, for people steer by what they show, and theirs everybody keeps, for all push
figures to them. However many ids somebody makes that lie near this peer's: a circle has CROWD times its
measure at most, and then the token with the most peers gives up one of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping

from shoal.dht.directory import PeerRecord, SignedRecord
from shoal.dht.interest import Known, of_interest
from shoal.dht.records import decoded
from shoal.dht.table import Entry, MemberTable
from shoal.protocol import limits
from shoal.protocol.errors import ProtocolViolation
from shoal.protocol.identity import PeerId, Role, VerifiedPeer

FEW = 4  # of each stage that the directory shows are known even if no hash says so: sizes may be told wrong
CROWD = 4  # sizes are estimates, and stages unequal
_NEAR_STAGES = 3


class Circle:
    """See the module. Without sizes everybody is in it."""

    def __init__(self, me: VerifiedPeer, known: Known, table: MemberTable) -> None:
        self.sizes: Mapping[int, float] = {}  # of stages, about, if not everybody is to be known
        self.crowded_out = 0  # records that were given up or not taken, since one token had too many
        self._me = me.peer
        self._known = known
        self._table = table
        self._all = Role.OWNER in me.roles

    @property
    def keeps_all(self) -> bool:
        """Whether this peer is to know everybody: of a swarm of any size an owner's, of a small one each."""
        return self._all or not self.sizes

    def take_sizes(self, sizes: Mapping[int, float]) -> None:
        """What the directory told of late; nothing, where it shows all."""
        self.sizes = sizes if sum(sizes.values()) > self._known.everybody else {}
        self._table.sampled = bool(self.sizes)

    def wants(self, peer: PeerId, entry: Entry) -> bool:
        """Whether a neighbour keeps such a record."""
        held = self._table.get(peer) if self.sizes else None
        if held is None or Role.OWNER in held.owner.roles | entry.owner.roles:
            return True
        theirs, others = held.record.stages, entry.record.stages
        return of_interest(peer, theirs, entry.record.peer, others, self.sizes, self._known)

    def of(self, found: Iterable[SignedRecord], mine: Collection[int]) -> Iterator[SignedRecord]:
        """Those to take in, for a peer at stages `mine`: of interest, held already, or of a stage of which
        hardly anybody is known."""
        entries = (self._table.get(peer) for peer in self._table)
        here = (entry for entry in entries if entry is not None and entry.gone_s is None)
        known = Counter(stage for entry in here for stage in entry.record.stages)
        for signed in found:
            try:
                record = decoded(signed)
            except ProtocolViolation:
                continue  # the directory's own gate lets none through
            if self._table.get(record.peer) is not None or self._concerns(record, mine):
                yield signed
            elif any(known[stage] < FEW for stage in record.stages):
                known.update(record.stages)
                yield signed

    def has_room(self, owner: VerifiedPeer) -> bool:
        """Whether a newcomer of this token may come in; one of the token with the most peers goes for it."""
        if len(self._table) < self.most:
            return True
        self.crowded_out += 1
        entries = [(peer, entry) for peer in self._table if (entry := self._table.get(peer)) is not None]
        peers = Counter(entry.owner.token_id for _, entry in entries)
        token, count = max(peers.items(), key=lambda item: (item[1], item[0]))
        if peers[owner.token_id] + 1 >= count:
            return False
        unheard = [peer for peer, entry in entries if entry.owner.token_id == token and entry.streams == 0]
        if unheard:
            self._table.forget(unheard[-1])
        return bool(unheard)

    @property
    def most(self) -> int:
        """Records that are held at most; of a small swarm, too: a token makes as many peers as it likes."""
        near = _NEAR_STAGES * self._known.near + self._known.anybody
        measure = sum(self.sizes.values()) if self.keeps_all else near
        return min(int(CROWD * max(measure, self._known.everybody)), limits.RECORDS_HELD)

    def _concerns(self, record: PeerRecord, mine: Collection[int]) -> bool:
        return self.keeps_all or of_interest(
            self._me, mine, record.peer, record.stages, self.sizes, self._known
        )
