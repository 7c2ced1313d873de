"""What neighbours tell one another stays the same in a swarm of any size, and everybody finds its own."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Collection
from dataclasses import replace

import pytest
from gossip_world import Crowd, Peer

from shoal.dht import roster
from shoal.dht.circle import FEW, Circle
from shoal.dht.directory import PeerRecord, SignedRecord
from shoal.dht.interest import KNOWN, Known, interest, of_interest, pair_weight
from shoal.dht.memory_directory import MemoryDirectory
from shoal.dht.table import MemberTable
from shoal.protocol.identity import PeerId, Role, VerifiedPeer
from shoal.protocol.virtual_time import run
from shoal.protocol.wire import decode, encode

FEW_KNOWN = Known(near=4, anybody=12, everybody=16)
STAGES = 4


def crowd(count: int, ttl_s: float = 30.0) -> Crowd:
    return Crowd(count, STAGES, session_s=600.0, limit=4, known=FEW_KNOWN, heartbeat_s=2.0, ttl_s=ttl_s)


def known(peer: Peer, *stages: int) -> int:
    members = peer.members.view().here()
    return sum(member.peer != peer.name and bool({*member.stages} & {*stages}) for member in members)


def test_twice_as_many_peers_tell_each_other_no_more() -> None:
    """Each peer's heartbeat bytes; while everybody heard of everybody they doubled."""

    async def rate(count: int) -> float:
        async with crowd(count) as swarm:
            rates = await swarm.measured(4.0, 12.0)
            assert swarm.false_alarms <= count / 20, "a record that lapses is no death"
            return sum(rates.values())

    few, many = run(rate(34)), run(rate(68))
    assert many < 1.3 * few


def test_newcomers_meet_their_group_and_owners_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "LARGE_SWARM_TTL_S", 10.0)  # what is not renewed lapses soon
    looks: list[tuple[PeerId, bool]] = []
    look = MemoryDirectory.lookup

    async def noted(
        self: MemoryDirectory, stages: Collection[int] = (), *, widely: bool = False
    ) -> tuple[SignedRecord, ...]:
        looks.append((self._peer, widely))
        return await look(self, stages, widely=widely)

    monkeypatch.setattr(MemoryDirectory, "lookup", noted)

    async def story() -> None:
        async with crowd(40, ttl_s=10.0) as swarm:
            owner = await swarm.add(place=40, number=20_000, owner=True)
            await asyncio.sleep(11.0)
            before = {peer.name for peer in swarm.peers.values()}
            newcomer = await swarm.add(place=41, number=10_000)  # of stage 1
            await asyncio.sleep(4.0)
            others = [peer for peer in swarm.peers.values() if peer is not newcomer]
            for stage in (0, 1, 2):
                assert known(newcomer, stage) >= FEW_KNOWN.near
                knowing = [peer for peer in others if peer.members.view().get(newcomer.name) is not None]
                assert any(peer.stage == stage for peer in knowing)
            heard = [member for member in newcomer.members.view().here() if member.beat is not None]
            assert {stage for member in heard for stage in member.stages} >= {1, 2}
            views = [peer.members.view() for peer in others]
            assert sum(view.sampled for view in views) > 36, "all but those who just came"
            stayed = before & {peer.name for peer in swarm.peers.values()}
            assert len(stayed) > 36
            assert stayed <= {member.peer for member in owner.members.view().here()}
            assert owner.members.view().part() == 1.0
            knowing = [peer for peer in others if peer.members.view().get(owner.name) is not None]
            assert len(knowing) == len(others), "all push figures to owners"
            asked = Counter(widely for me, widely in looks if me == owner.name)
            assert asked[False] == 0, "it reads all stages every time"
            assert asked[True] > roster.NEWCOMERS_LOOKS

    run(story())


def test_a_small_swarm_is_known_whole_whatever_the_directory_estimates() -> None:
    async def story() -> None:
        async with Crowd(36, STAGES, session_s=600.0, limit=4, heartbeat_s=2.0) as swarm:
            await asyncio.sleep(10.0)
            views = [peer.members.view() for peer in swarm.peers.values()]
            assert all(view.sizes for view in views), "the directory shows a part of it"
            assert not any(view.sampled for view in views)
            assert {len(view.here()) for view in views} == {36}

    run(story())


@pytest.mark.parametrize("stages", [4, 24, 100])
def test_a_peer_keeps_as_many_records_of_ten_thousand_as_of_a_thousand(stages: int) -> None:
    rng = random.Random(stages)
    most = 3 * KNOWN.near + KNOWN.anybody

    def kept(count: int) -> float:
        sizes = {stage: count / stages for stage in range(stages)}
        me, mine = PeerId(f"me{rng.random()}"), (stages // 2,)
        peers = (PeerId(f"{stages}/{number}") for number in range(count))
        return sum(
            of_interest(me, mine, peer, (number % stages,), sizes, KNOWN) for number, peer in enumerate(peers)
        )

    assert kept(150) == 150
    for count in (1000, 10_000):
        assert sum(kept(count) for _ in range(4)) / 4 < 1.2 * most


def test_interest_is_mutual_and_near_stages_come_first() -> None:
    sizes = {stage: 400.0 for stage in range(24)}
    one, other = PeerId("one"), PeerId("other")
    assert pair_weight(one, other) == pair_weight(other, one)
    assert interest((3,), (4,), sizes, KNOWN) == interest((4,), (3,), sizes, KNOWN) == KNOWN.near / 400
    assert interest((3,), (9,), sizes, KNOWN) == KNOWN.anybody / 9600
    assert interest((), (9,), sizes, KNOWN) == interest((9,), (), sizes, KNOWN) == KNOWN.anybody / 9600
    assert interest((3,), (3,), {}, KNOWN) == 1.0, "a swarm that the directory shows whole"


@pytest.mark.parametrize(
    ("role", "stage_size", "most"),
    [
        (Role.TRAINER, 400.0, 4 * 24),
        (Role.TRAINER, 0.0, 4 * 16),  # a small swarm, known whole
        (Role.OWNER, 0.0, 4 * 16),
        (Role.OWNER, 60.0, 4 * 180),  # knows everybody
    ],
)
def test_who_grinds_ids_next_to_a_peer_neither_fills_its_table_nor_drives_others_out(
    role: Role, stage_size: float, most: int
) -> None:
    """All of the attacker's concern it, and it is told of them first and last."""
    table = MemberTable(lambda event: None, lambda: None)
    circle = Circle(VerifiedPeer(PeerId("victim"), frozenset({role}), "v", math.inf), FEW_KNOWN, table)
    circle.take_sizes({stage: stage_size for stage in range(3)})

    def tell(name: str, token: str) -> None:
        owner = VerifiedPeer(PeerId(name), frozenset({Role.TRAINER}), token, math.inf)
        record, signed = a_record(name), SignedRecord(name.encode(), bytes(64))
        if circle.has_room(owner):
            table.admit(record, signed, owner, age_s=0.0, watch=False, now=0.0)

    for number in range(10 * circle.most):
        tell(f"before {number}", "attacker")
    for number in range(40):
        tell(f"honest {number}", f"volunteer {number}")
    for number in range(10 * circle.most):
        tell(f"after {number}", "attacker")
    assert len(table) == circle.most == most
    assert sum(peer.startswith("honest") for peer in table) == 40
    assert circle.crowded_out > 18 * circle.most


def test_the_directory_fills_stages_of_which_hardly_anybody_is_known() -> None:
    table = MemberTable(lambda event: None, lambda: None)
    nobody = Known(near=0, anybody=0, everybody=0)
    circle = Circle(VerifiedPeer(PeerId("me"), frozenset({Role.TRAINER}), "t", math.inf), nobody, table)
    circle.take_sizes({0: 400.0, 5: 400.0})
    shown = [
        SignedRecord(encode(replace(a_record(f"p{n}".ljust(50, "p")), stages=(stage,))), bytes(64))
        for n, stage in enumerate([0] * 30 + [5] * 30)
    ]
    taken = Counter(decode(PeerRecord, signed.record).stages for signed in circle.of(shown, (0,)))
    assert taken == {(0,): FEW, (5,): FEW}


def a_record(name: str) -> PeerRecord:
    return PeerRecord(
        peer=PeerId(name),
        incarnation=1,
        sequence=1,
        issued_unix_s=0.0,
        ttl_s=60.0,
        state="online",
        stages=(0,),
        name="",
        addresses=("127.0.0.1:5000",),
        chain=(b"leaf", b"token"),
        device="cpu",
        tokens_per_s=0.0,
        version="0",
    )
