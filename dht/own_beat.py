"""What this peer says of itself: the beat that its links send, and its row in the view; part of `Members`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from shoal.dht.beats import Absence, Beat
from shoal.dht.directory import PeerRecord
from shoal.dht.view import Member
from shoal.protocol.admission import Membership
from shoal.protocol.wire import changed

BEAT_KEPT_S = 0.05  # a beat that was put together serves all links for so long
ANNOUNCE_S = 0.2  # at least, between two rounds of beats for news


class OwnBeat:
    """See the module. `record()` is the own one as it was signed last, `make_beat()` the trainer's part."""

    def __init__(
        self,
        membership: Membership,
        record: Callable[[], PeerRecord],
        make_beat: Callable[[], Beat],
        announce: Callable[[], None],
        absences: Callable[[float], tuple[Absence, ...]],
    ) -> None:
        self.leaving = False
        self._membership = membership
        self._record = record
        self._make_beat = make_beat
        self._announce = announce
        self._absences = absences
        self._beat: Beat | None = None
        self._beaten_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._announced_s = -ANNOUNCE_S

    def now(self) -> Beat:
        """The same for all links that ask within a moment, unless something changed."""
        now = asyncio.get_running_loop().time()
        if self._beat is None or now - self._beaten_s > BEAT_KEPT_S:
            self._beat, self._beaten_s = self._fresh(), now
        return self._beat

    def forget(self) -> None:
        """What was put together is out of date."""
        self._beat = None

    def announce_soon(self) -> None:
        """Have all links send a beat at once, or as soon as the last time is not too near."""
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(max(loop.time(), self._announced_s + ANNOUNCE_S), self._now_due)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def member(self) -> Member:
        """This peer as others see it."""
        record, beat, me = self._record(), self._fresh(), self._membership.me
        return Member(
            peer=me.peer,
            roles=me.roles,
            token_id=me.token_id,
            state="draining" if beat.draining else record.state,
            stages=record.stages,
            states=() if beat.draining else record.states,
            name=record.name,
            device=record.device,
            incarnation=record.incarnation,
            tokens_per_s=beat.tokens_per_s or record.tokens_per_s,
            service_s=beat.service_s,
            reason="this peer",
            heard_s=asyncio.get_running_loop().time(),
            rtt_s=0.0,
            beat=beat,
        )

    def joining(self) -> list[int]:
        """Stages that it waits for."""
        member = self.member()
        return [stage for stage in member.stages if member.state_at(stage) == "joining"]

    def _fresh(self) -> Beat:
        record, beat = self._record(), self._make_beat()
        return changed(
            beat,
            incarnation=record.incarnation,
            record_sequence=record.sequence,
            revocation_version=self._membership.revocations.version,
            amendment_version=self._membership.amendments.version,
            draining=beat.draining or self.leaving,
            absences=self._absences(asyncio.get_running_loop().time()),
        )

    def _now_due(self) -> None:
        self._beat, self._timer = None, None
        self._announced_s = asyncio.get_running_loop().time()
        self._announce()
