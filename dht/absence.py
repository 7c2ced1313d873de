"""Absence: since when nobody has met a copy of a stage, neither a replica nor a guardian; part of `Members`.

A stage of which no copy is left may be built anew only after a while (`training.recovery.lost_stage`), and
whoever waits for it may stay for less. So that the while does not begin anew with each newcomer, every peer
says in its beats how long ago it met a copy last, and one that never did counts from what most of those say
that it hears. Each token has one vote, since ids cost nothing; peers under the own one are this volunteer's,
and have one each. One alone is not believed, unless it is the owner's: who decides on the run can be trusted
to tell of it, and in a small swarm its peer may be the only one that stays.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence

from shoal.dht.beats import ABSENCES, Absence
from shoal.dht.liveness import Liveness
from shoal.dht.view import Member
from shoal.protocol.identity import PeerId, Role

WITNESSES = 2  # or the owner


class Absences:
    """See the module. Times are the loop's."""

    def __init__(self, token_id: str) -> None:
        """`token_id`: the own one."""
        self.since_s: Mapping[int, float] = {}  # stages that are not here
        self._token_id = token_id
        self._begun_s = 0.0
        self._met_s: dict[int, float] = {}  # when a copy was here last
        self._joining_s: dict[int, float] = {}  # when this peer began to join it
        self._claimed: Collection[int] = ()  # stages that somebody says are not here

    def begin(self, now_s: float) -> None:
        """From now on somebody is looked for."""
        self._begun_s = now_s

    def look(self, others: Sequence[Member], joining: Collection[int], now_s: float, sampled: bool) -> None:
        """`joining`: stages that this peer waits for. Of a swarm that is known in part (`sampled`) a peer can
        miss only those: it looks for their replicas."""
        alive = [member for member in others if member.liveness is Liveness.ALIVE]
        here = {stage for member in alive for stage in _copies(member)}
        votes = [(m, m.beat.absences) for m in alive if m.beat is not None and m.beat.absences]
        self._joining_s = {stage: self._joining_s.get(stage, now_s) for stage in joining}
        self._met_s = {} if sampled else self._met_s | dict.fromkeys(here, now_s)
        self._claimed = {absence.stage for _, absences in votes for absence in absences}
        unmet = {*self._joining_s, *self._met_s} | (set() if sampled else {*self._claimed})
        self.since_s = {stage: self._since_s(stage, votes, now_s, sampled) for stage in unmet - here}

    def told(self, now_s: float) -> tuple[Absence, ...]:
        """For the own beat: what is not here, and what others miss that is."""
        known = {*self._joining_s, *self._met_s}
        missed = {*self.since_s, *(known & {*self._claimed})}
        stages = sorted(missed, key=lambda stage: (stage not in known, stage))
        return tuple(
            Absence(stage, max(0.0, now_s - self.since_s.get(stage, now_s))) for stage in stages[:ABSENCES]
        )

    def excuse(self, pause_s: float) -> None:
        """This process stood still: it would have met nobody."""
        self._begun_s += pause_s
        for times in (self._met_s, self._joining_s):
            times.update({stage: at_s + pause_s for stage, at_s in times.items()})

    def _voter(self, member: Member) -> PeerId | str:
        return member.peer if member.token_id == self._token_id else member.token_id

    def _since_s(
        self, stage: int, votes: Iterable[tuple[Member, tuple[Absence, ...]]], now_s: float, sampled: bool
    ) -> float:
        """As this peer knows; of what it never met as most say, the more careful half of an even number."""
        if stage in self._met_s:
            return self._met_s[stage]
        own_s = self._joining_s[stage] if sampled else self._begun_s
        said: dict[str, float] = {}  # a token's most careful word
        by_owner = False
        for member, absences in votes:
            for absence in absences:
                if absence.stage == stage:
                    voter = self._voter(member)
                    said[voter] = max(said.get(voter, 0.0), now_s - absence.for_s)
                    by_owner = by_owner or Role.OWNER in member.roles
        enough = by_owner or len(said) >= WITNESSES
        return min(own_s, statistics.median_high(said.values())) if enough else own_s


def _copies(member: Member) -> set[int]:
    held = {stage for stage in member.stages if member.state_at(stage) in ("online", "draining")}
    return held | {guarded.stage for guarded in (member.beat.guards if member.beat is not None else ())}
