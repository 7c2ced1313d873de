"""The trainer's windows on the membership table: replicas for the pipeline, group members for the rounds."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

from shoal.dht.beats import StageBeat
from shoal.dht.directory import SignedRecord
from shoal.dht.liveness import Liveness
from shoal.dht.members import Members
from shoal.dht.view import Member, SwarmView
from shoal.protocol import limits
from shoal.protocol.identity import PeerId
from shoal.training.outer.entry import Seat
from shoal.training.outer.policy import SILENT_S, GroupMember
from shoal.training.pipeline.replicas import Replica
from shoal.training.uplinks import UNKNOWN, group_uplinks

LOOKUPS = 2  # of the directory: one that meets a peer that was just killed may show a part
MEET_S = 30.0
_LOOK_S = 0.05
_UNMEASURED_RTT_S = 0.05


async def met(members: Members, stage: int) -> None:
    """Returns when it is known who has the state of a stage: all were heard, or somebody tells of it.

    A replica that recovers before takes a run that it has not heard of yet for one that has not begun. Who
    never answers is gone after a while; so MEET_S is for a directory that does not.
    """
    loop = asyncio.get_running_loop()
    until_s = loop.time() + MEET_S
    while not _is_met(members, stage):
        if loop.time() >= until_s:
            return
        await asyncio.sleep(_LOOK_S)


def _is_met(members: Members, stage: int) -> bool:
    others = [member for member in members.view().members if member.peer != members.me]
    told = (member.progress(stage) for member in others if member.liveness is Liveness.ALIVE)
    if any(progress is not None and progress.height for progress in told):
        return True
    unheard = {member.liveness for member in others if member.heard_s is None} - {Liveness.GONE}
    if members.view().sizes or len(others) > members.neighbour_limit:  # most are known by their records only
        return Liveness.SUSPECT not in unheard and any(member.heard_s is not None for member in others)
    return members.lookups >= LOOKUPS and not unheard


class MemberReplicas:
    """Implements `pipeline.replicas.Replicas` on `dht.members`."""

    def __init__(self, members: Members) -> None:
        self._members = members

    def of_stage(self, stage: int) -> Sequence[Replica]:
        view = self._members.view()
        return [
            Replica(
                peer=m.peer,
                rtt_s=m.rtt_s if m.rtt_s is not None else _UNMEASURED_RTT_S,
                backlog_s=m.backlog_s,
                service_s=progress.service_s if (progress := m.progress(stage)) else 0.0,
                heard_s=m.heard_s if m.heard_s is not None else -math.inf,
                step_s=progress.step_s if progress else 0.0,
            )
            for m in view.online(stage)
        ]

    def suspect(self, peer: PeerId, reason: str) -> None:
        self._members.suspect(peer, reason)

    def is_gone(self, peer: PeerId) -> bool:
        return self._members.view().is_gone(peer)

    def has_departed(self, peer: PeerId, incarnation: int | None = None) -> bool:
        view = self._members.view()
        if (member := view.get(peer)) is None:
            return not view.sizes  # of a swarm known in part, others may know it
        if member.departed:
            return True
        return incarnation is not None and incarnation < member.incarnation_at(0)

    async def meet(self, peer: PeerId, chain: Sequence[PeerId]) -> None:
        await self._members.meet(peer, chain)

    def record_of(self, peer: PeerId) -> SignedRecord | None:
        return self._members.record_of(peer)

    async def changed(self) -> None:
        await self._members.changed()


def group_members(
    view: SwarmView, incarnation: int, own: StageBeat, last: Sequence[Seat] = ()
) -> list[GroupMember]:
    """The replicas of a stage, this peer among them: the others by their last beat, itself as it is.

    Of a large group a peer hears only its neighbours. Whom it knows by a record alone belongs to the group as
    well, and where the swarm is known in part so does a stranger who took part in the last round (`last`):
    else each would lead a group of its own. So it does for a newcomer to any swarm, which may have come to
    one side of a cut, while others are here who were in that round: they know who departed.
    Whoever fell silent without a goodbye or a closed connection stays, marked, for SILENT_S: it may be
    frozen, or on the other side of a cut, and half a group must not go on as if it were the whole.
    Who leaves belongs to it until it is gone: it has a last round to make, and two that leave at once, each
    without the other, would make two logs. Uplinks are what the beats claim, as far as the group believes
    it (`uplinks`).
    """
    stage = own.stage
    found = {view.me: _group_member(view.me, incarnation, own)} | _living(view, stage)
    seats = {seat.peer: seat for seat in last if seat.peer not in found}
    found |= _silent(view, stage, found.keys(), seats.keys())
    if view.sampled or _is_newcomer(view.me, incarnation, last, found):
        strangers = [seat for seat in seats.values() if view.get(seat.peer) is None]
        found |= {seat.peer: _stranger(seat.peer, seat.incarnation, seat.uplink) for seat in strangers}
    group = sorted(found.values(), key=lambda member: member.peer)
    uplinks = group_uplinks([member.uplink for member in group])
    return [
        member if member.uplink == uplink else dataclasses.replace(member, uplink=uplink)
        for member, uplink in zip(group, uplinks, strict=True)
    ]


def _is_newcomer(
    me: PeerId, incarnation: int, last: Sequence[Seat], here: Mapping[PeerId, GroupMember]
) -> bool:
    """Whether this process was not in the last round, and others were that are here."""
    if any((seat.peer, seat.incarnation) == (me, incarnation) for seat in last):
        return False
    return any(seat.peer != me and seat.peer in here and here[seat.peer].heard for seat in last)


def _living(view: SwarmView, stage: int) -> dict[PeerId, GroupMember]:
    """The others, those that leave among them."""
    leaving = [member for member in view.group(stage, "draining") if member.liveness is Liveness.ALIVE]
    others = [member for member in (*view.online(stage), *leaving) if member.peer != view.me]
    known = {member.peer: _as_known(member, stage, view.now_s) for member in others}
    return {peer: member for peer, member in known.items() if member is not None}


def _silent(
    view: SwarmView, stage: int, living: Collection[PeerId], took_part: Collection[PeerId]
) -> dict[PeerId, GroupMember]:
    """Others of whom nothing is heard for less than SILENT_S, and whose beat or last round tells of them."""
    found = {}
    for member in view.members:
        if stage not in member.stages or member.peer in living or member.departed:
            continue
        if member.progress(stage) is None and member.peer not in took_part:
            continue
        silent = view.now_s - silent_since_s(member, view.now_s) < SILENT_S
        if member.state_at(stage) in ("online", "draining") and silent:
            known = _as_known(member, stage, view.now_s)
            if known is not None:
                found[member.peer] = dataclasses.replace(known, silent=True)
    return found


def silent_since_s(member: Member, now_s: float) -> float:
    """Since when nothing is known of the life of one that is suspect or gone: its last beat, or just before
    it counted as gone. Of an old neighbour the last beat may be old, and no sign of anything."""
    gone_s = member.gone_s if member.gone_s is not None else now_s
    return max(member.heard_s or 0.0, gone_s - limits.ABORT_AFTER_S)


def _as_known(member: Member, stage: int, now_s: float) -> GroupMember | None:
    """By its beat, which says if it is at the stage; of who is no neighbour (any more) nothing told holds."""
    heard = member.heard_s is not None and now_s - member.heard_s < limits.ABORT_AFTER_S
    incarnation, progress = member.incarnation_at(stage), member.progress(stage)
    if progress is not None and heard:
        return _group_member(member.peer, incarnation, progress)
    uplink = progress.uplink_bytes_per_s if progress is not None else UNKNOWN
    return None if heard else _stranger(member.peer, incarnation, uplink)


def _stranger(peer: PeerId, incarnation: int, uplink: float) -> GroupMember:
    return GroupMember(peer=peer, incarnation=incarnation, uplink=uplink, heard=False)


def may_hold(view: SwarmView, stage: int, peer: PeerId) -> bool:
    """Whether a peer may be a replica of a stage: of a swarm known in part a stranger may."""
    member = view.get(peer)
    if member is None:
        return view.sampled
    return stage in member.stages or member.progress(stage) is not None


def stage_members(members: Members, stage: int) -> list[GroupMember]:
    """The living replicas of any stage, those that are leaving too, without this peer."""
    if not members.running:
        return []
    view = members.view()
    found = [(m, m.progress(stage)) for m in view.group(stage, "online", "draining") if m.peer != view.me]
    return [
        _group_member(member.peer, member.incarnation_at(stage), progress)
        for member, progress in found
        if progress is not None and member.liveness is Liveness.ALIVE
    ]


def stage_guardians(members: Members, stage: int) -> list[GroupMember]:
    """The living guardians of a stage, with the copy that each one tells, without this peer."""
    if not members.running:
        return []
    view = members.view()
    return [
        _group_member(member.peer, member.incarnation, kept)
        for member in view.here()
        if member.peer != view.me and member.beat is not None and member.liveness is Liveness.ALIVE
        for kept in member.beat.guards
        if kept.stage == stage
    ]


def _group_member(peer: PeerId, incarnation: int, beat: StageBeat) -> GroupMember:
    return GroupMember(
        peer=peer,
        incarnation=incarnation,
        height=beat.height,
        head=beat.head,
        state_root=beat.state_root,
        steps_since_round=beat.steps_since_round,
        tokens_since_round=beat.tokens_since_round,
        log_tokens=beat.log_tokens,
        uplink=beat.uplink_bytes_per_s,
        reentering=beat.reentering,
    )
