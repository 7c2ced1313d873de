"""A stage with more replicas than anybody has neighbours is one group: one leader, one log, nobody left out.

What was: a leader's roster were those whose beats it heard, so a large group met in overlapping parts, each
of which went on as if the others were gone.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import ClassVar

import pytest
from outer_faults import Faults
from outer_world import World, round_spec
from partition_world import PartitionWorld

from shoal.dht.beats import Beat, StageBeat
from shoal.dht.liveness import Liveness
from shoal.dht.view import Member, SwarmView
from shoal.node.simulate.options import Options
from shoal.node.simulate.run import simulate_run
from shoal.protocol.errors import PeerUnreachable
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.transport import Channel, Stream, Transport
from shoal.protocol.virtual_time import run
from shoal.training.neighbours import group_members, may_hold
from shoal.training.outer.context import Meet
from shoal.training.outer.entry import Seat
from shoal.training.outer.log import Log, genesis_state
from shoal.training.outer.messages import Commit, ContributedPart, PublishedPart, Tick, method
from shoal.training.outer.parts import cut
from shoal.training.outer.policy import GroupMember, should_open
from shoal.training.spec import RunSpec
from shoal.training.templates import TEMPLATES

SIZE = 6 * 256
NOW_S = 1000.0
ME, HEARD, KNOWN_BY_RECORD, STRANGER = (
    PeerId(f"{name:>046}") for name in ("me", "heard", "record", "stranger")
)
OWN = StageBeat(0, height=4, steps_since_round=3, uplink_bytes_per_s=2.0**20)


def one_stage() -> RunSpec:
    values = TEMPLATES["small"].model_dump()
    values["stages"] |= {"count": 1}
    values["inner"] |= {"in_flight": 4, "optimizer": "sgd", "inner_tokens": 2048}
    values["outer"] |= {"inner_steps": 4}
    return RunSpec.model_validate(values)


@pytest.mark.parametrize(("seed", "session_s"), [(1, 1e6), (2, 60.0)])
def test_peers_with_few_neighbours_keep_one_log(seed: int, session_s: float) -> None:
    """Fifteen replicas, of whom each has streams with five or so; calm, and under churn."""
    options = Options(
        peers=15,
        duration_s=30.0,
        warmup_s=15.0,
        seed=seed,
        session_s=session_s,
        micro_batch_s=2.0,
        neighbour_limit=4,
    )
    outcome = simulate_run(one_stage(), options)
    print("seed", seed, outcome.to_json())
    assert outcome.forks == 0
    assert outcome.joins or outcome.adopted_streams == 0, "nobody is gone, so nobody's data is an orphan"
    assert outcome.broken == []
    assert outcome.rounds[0] >= 3


def group(*members: Member, last: tuple[Seat, ...] = (), sampled: bool = False) -> Mapping[str, GroupMember]:
    sizes = {0: 300.0} if sampled else {}
    view = SwarmView(ME, NOW_S, tuple(sorted(members, key=lambda m: m.peer)), sizes, sampled)
    return {member.peer: member for member in group_members(view, 7, OWN, last)}


def heard(peer: PeerId, at_s: float, steps: int = 2) -> Member:
    told = StageBeat(0, height=4, steps_since_round=steps, uplink_bytes_per_s=2.0**22)
    beat = Beat(incarnation=5, number=1, stages=(told,))
    return Member(peer=peer, stages=(0,), incarnation=5, heard_s=at_s, beat=beat)


def known(peer: PeerId) -> Member:
    return Member(peer=peer, stages=(0,), incarnation=5)


def test_who_is_known_by_a_record_alone_belongs_to_the_group() -> None:
    found = group(heard(HEARD, NOW_S - 1.0), known(KNOWN_BY_RECORD))
    assert found.keys() == {ME, HEARD, KNOWN_BY_RECORD}
    assert [found[peer].heard for peer in (ME, HEARD, KNOWN_BY_RECORD)] == [True, True, False]
    assert found[KNOWN_BY_RECORD].incarnation == 5
    assert found[KNOWN_BY_RECORD].uplink in (2.0**20, 2.0**22)  # as much as others, for a start


def test_what_a_neighbour_told_long_ago_says_nothing_about_the_round_to_come() -> None:
    found = group(heard(HEARD, NOW_S - 60.0, steps=0))
    assert not found[HEARD].heard
    assert should_open(3, found[ME], list(found.values())).yes  # the own three steps, of one who is heard
    lazy = group(heard(HEARD, NOW_S - 1.0, steps=0))
    assert not should_open(3, lazy[ME], list(lazy.values())).yes


def test_who_may_lead_is_who_may_hold_the_stage() -> None:
    elsewhere = dataclasses.replace(known(KNOWN_BY_RECORD), stages=(1,))
    for sampled in (False, True):
        view = SwarmView(ME, NOW_S, tuple(sorted((heard(HEARD, NOW_S), elsewhere), key=lambda m: m.peer)))
        view = dataclasses.replace(view, sampled=sampled)
        assert may_hold(view, 0, HEARD)
        assert not may_hold(view, 0, KNOWN_BY_RECORD)
        assert may_hold(view, 0, STRANGER) is sampled


def test_who_is_on_the_way_to_the_stage_does_not_belong_to_it_yet() -> None:
    joining = dataclasses.replace(known(KNOWN_BY_RECORD), state="joining")
    silent_on_it = dataclasses.replace(heard(HEARD, NOW_S - 1.0), beat=Beat(incarnation=5, number=1))
    assert group(joining, silent_on_it).keys() == {ME}


def test_who_leaves_belongs_to_the_group_until_it_is_gone() -> None:
    """What was: two that left at once, while a newcomer stayed, each took the other for departed, and both
    committed the round to come."""
    leaving = dataclasses.replace(heard(HEARD, NOW_S - 1.0), state="draining")
    assert group(leaving, heard(STRANGER, NOW_S - 1.0)).keys() == {ME, HEARD, STRANGER}
    silent = dataclasses.replace(leaving, liveness=Liveness.SUSPECT)
    assert group(silent, heard(STRANGER, NOW_S - 1.0))[HEARD].silent
    assert HEARD not in group(dataclasses.replace(silent, departed=True), heard(STRANGER, NOW_S - 1.0))


def test_a_stranger_of_the_last_round_belongs_to_a_swarm_known_in_part() -> None:
    last = (Seat(STRANGER, 9, 2.0**21, present=True), Seat(HEARD, 5, 2.0**22, present=True))
    found = group(heard(HEARD, NOW_S - 1.0), last=last, sampled=True)
    assert found[STRANGER] == GroupMember(peer=STRANGER, incarnation=9, uplink=2.0**21, heard=False)
    assert found[HEARD].heard
    mine = Seat(ME, 7, 2.0**20, present=True)  # where everybody is known, and was met there, it is gone
    assert STRANGER not in group(heard(HEARD, NOW_S - 1.0), last=(*last, mine))


def test_a_newcomer_leaves_it_to_those_it_meets_who_of_the_last_round_departed() -> None:
    last = (Seat(STRANGER, 9, 2.0**21, present=True), Seat(HEARD, 5, 2.0**22, present=True))
    before = Seat(ME, 6, 2.0**20, present=True)  # an earlier process
    assert STRANGER in group(heard(HEARD, NOW_S - 1.0), last=last)
    assert STRANGER in group(heard(HEARD, NOW_S - 1.0), last=(*last, before))
    assert STRANGER not in group(last=(*last, before))  # nobody is here who could tell


def test_who_took_part_and_cannot_be_reached_counts_for_the_quorum_for_a_while() -> None:
    last = (Seat(KNOWN_BY_RECORD, 5, 2.0**21, present=True),)
    failing = dataclasses.replace(known(KNOWN_BY_RECORD), liveness=Liveness.SUSPECT)
    assert group(failing, last=last)[KNOWN_BY_RECORD].silent
    assert KNOWN_BY_RECORD not in group(failing)
    for gone_s, counts in ((NOW_S - 100.0, True), (NOW_S - 130.0, False)):
        lapsed = dataclasses.replace(failing, liveness=Liveness.GONE, gone_s=gone_s)
        assert (KNOWN_BY_RECORD in group(lapsed, last=last)) is counts
    assert KNOWN_BY_RECORD not in group(dataclasses.replace(failing, departed=True), last=last)


def test_the_silence_of_an_old_neighbour_does_not_begin_with_its_last_beat() -> None:
    """What was: whoever had been a neighbour before departed with the first call to it that failed, so that
    a part of a cut group went on at once."""
    before = heard(HEARD, NOW_S - 500.0)
    last = (Seat(HEARD, 5, 2.0**21, present=True),)
    for liveness, gone_s in ((Liveness.SUSPECT, None), (Liveness.GONE, NOW_S - 100.0)):
        failing = dataclasses.replace(before, liveness=liveness, gone_s=gone_s)
        assert group(failing, last=last)[HEARD].silent
    failing = dataclasses.replace(before, liveness=Liveness.GONE, gone_s=NOW_S - 130.0)
    assert HEARD not in group(failing, last=last)


def test_who_comes_by_a_snapshot_knows_the_last_round() -> None:
    """What was: all of it whom a newcomer to a large swarm did not know counted as departed."""
    quorum = tuple(sorted((STRANGER, HEARD)))
    log = Log(dataclasses.replace(genesis_state(bytes(32), 0), height=8, quorum=quorum), cut(256, 1024, 1))
    found = group(heard(HEARD, NOW_S - 1.0), last=log.seats, sampled=True)
    assert found.keys() == {ME, HEARD, STRANGER}
    assert found[HEARD].incarnation == 5
    assert not found[STRANGER].heard


class KnownInPart(PartitionWorld):
    """Of the group each hears those that it can reach; the others of its last round are strangers to it."""

    def group(self, seen_by: PeerId) -> Sequence[GroupMember]:
        heard = [member for member in super().group(seen_by) if not member.silent]
        strangers = {PeerId(seat.peer) for seat in self.processes[seen_by, 1].outer.last_seats}
        strangers -= {member.peer for member in heard}
        return [*heard, *(GroupMember(peer=peer, incarnation=1, heard=False) for peer in sorted(strangers))]


def test_strangers_that_cannot_be_reached_hold_a_group_up_for_a_while_only() -> None:
    """What was: no record of theirs lapsed and nobody heard them, so where more than half of a large group
    died at once the others never opened a round again."""

    async def main() -> None:
        async with KnownInPart(
            5, round_spec(outer={"inner_steps": 10, "part_bytes": 1024}), size=SIZE
        ) as world:
            await world.train(25)
            for node in world.nodes[2:]:
                world.kill(node)
            await world.train(5)  # what was under way comes to its end
            before = max(node.outer.height for node in world.live.values())
            await world.train(100)
            assert {node.outer.height for node in world.live.values()} <= {before - 1, before}
            await world.train(60)
            assert min(node.outer.height for node in world.live.values()) > before
            await world.settle()
            world.prove()

    run(main)


def test_who_does_not_answer_and_is_not_heard_is_looked_into() -> None:
    """What was: a peer that takes the stream and says nothing was waited for in every round anew."""

    class Ghost(World):
        def group(self, seen_by: PeerId) -> Sequence[GroupMember]:
            return [*super().group(seen_by), GroupMember(peer=STRANGER, incarnation=1, heard=False)]

    async def stay(stream: Stream) -> None:
        while True:
            await stream.send(Tick())
            await asyncio.sleep(0.25)

    async def main() -> None:
        async with Ghost(3, size=SIZE) as world:
            transport = world.network.transport(STRANGER, frozenset({Role.TRAINER}))
            transport.serve(method(0, "round"), stay, frozenset(Role))
            await transport.start()
            await world.rounds(2)
            assert STRANGER in {peer for node in world.nodes for peer, _ in node.suspected}
            await transport.close()

    run(main)


def test_who_is_here_introduces_where_the_last_leader_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was: only the last round's leader was asked, and a group that had lost it waited for 120 s."""

    class Ring(World):
        """Once `open` is False each hears the one before it and the one after it."""

        open = True
        met: ClassVar[set[tuple[PeerId, PeerId]]] = set()

        def group(self, seen_by: PeerId) -> Sequence[GroupMember]:
            others = super().group(seen_by)
            if self.open:
                return others
            here = [m for m in others if m.peer == seen_by or self.beside(seen_by, m.peer)]
            strangers = {PeerId(seat.peer) for seat in self.processes[seen_by, 1].outer.last_seats}
            strangers -= {m.peer for m in here}
            return [*here, *(GroupMember(peer=peer, incarnation=1, heard=False) for peer in strangers)]

        def beside(self, one: PeerId, other: PeerId) -> bool:
            apart = abs(int(one[9:11]) - int(other[9:11]))
            return apart in (1, len(self.nodes) - 1)

        def knows(self, one: PeerId, other: PeerId) -> bool:
            return self.open or self.beside(one, other) or (one, other) in self.met

    def meet_for(me: PeerId) -> Meet:
        async def meet(stranger: PeerId, chain: Sequence[PeerId]) -> None:
            _, introducer, _ = chain
            if introducer in world.live and world.knows(me, introducer) and world.knows(introducer, stranger):
                world.met.add((me, stranger))

        return meet

    def wrap(inner: Transport) -> Transport:
        dial = inner.open

        def dial_known(
            stranger: PeerId, method: str, channel: Channel = Channel.CONTROL
        ) -> AbstractAsyncContextManager[Stream]:
            if not world.knows(inner.me, stranger):
                raise PeerUnreachable(f"{inner.me} does not know {stranger}")
            return dial(stranger, method, channel)

        monkeypatch.setattr(inner, "open", dial_known)
        return inner

    world: Ring

    async def main() -> None:
        nonlocal world
        world = Ring(7, size=SIZE, wrap=wrap, meet_for=meet_for)
        async with world:
            await world.rounds(1)
            first = world.nodes[0].outer.entry(1)
            assert first is not None
            world.kill(next(node for node in world.nodes if node.name == first.leader))
            world.open = False
            world.met.clear()
            await world.rounds(1)

    run(main)


@pytest.mark.parametrize("kind", [ContributedPart, PublishedPart, Commit], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("count", [1, 3])
def test_a_cut_amid_a_round_of_strangers_leaves_each_step_in_once(kind: type, count: int) -> None:
    """What was: whoever vanished without having been heard was taken for dead, and so for one that had
    decided nothing."""
    faults = Faults()

    async def main() -> None:
        spec = round_spec(outer={"inner_steps": 4, "part_bytes": 1024, "fragments": 2})
        async with KnownInPart(4, spec, size=SIZE, wrap=faults.wrap) as world:
            await world.part_amid_a_round(faults, kind, count, world.nodes[:2], world.nodes[2:])

    run(main)


@pytest.mark.parametrize("sizes", [(3, 2), (4, 1)], ids=str)
def test_a_connection_that_dies_of_silence_is_no_departure(sizes: tuple[int, int]) -> None:
    """What was: the streams on which a leader waited for strangers ended when the connection was given up,
    after some seconds of silence, and they counted as departed: the smaller side went on at once."""

    async def main() -> None:
        spec = round_spec(outer={"inner_steps": 10, "part_bytes": 1024})
        async with KnownInPart(sum(sizes), spec, size=SIZE) as world:
            await world.train(25)
            sides = world.nodes[: sizes[0]], world.nodes[sizes[0] :]
            world.cut(*sides)
            await world.train(4)  # what was under way comes to its end
            before = [max(node.outer.height for node in side) for side in sides]
            await world.train(56)
            after = [max(node.outer.height for node in side) for side in sides]
            assert after[0] > before[0]
            assert after[1] == before[1]
            world.heal()
            await world.settle()
            world.prove()

    run(main)
