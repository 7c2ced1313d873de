"""A peer that holds several stages, in a whole swarm in virtual time: a run with fewer peers than stages."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trainer_world import Replica, TrainerWorld, round_spec

from shoal.dht.directory import PeerRecord
from shoal.dht.view import Member, SwarmView
from shoal.protocol import wire
from shoal.protocol.errors import MessageInvalid, StageEmpty
from shoal.protocol.identity import PeerId
from shoal.protocol.virtual_time import run
from shoal.training.outer.service import Outer
from shoal.training.pipeline.ledger import Ledger
from shoal.training.rebalance import Placed
from shoal.training.spec import RunSpec
from shoal.training.spread import Take, give_back, take


def spread_spec(stages: int) -> RunSpec:
    spec = round_spec(stages, outer={"snapshot_every": 1})
    section = {**spec.stages.model_dump(), "rebalance_window_s": 4.0}
    return RunSpec.model_validate({**spec.model_dump(), "stages": section})


async def holding(world: TrainerWorld, wanted: dict[int, set[int]], limit_s: float = 120.0) -> None:
    """Until each peer (by number) is online at these stages, as everybody sees it."""
    peers = {world.replicas[number].peer: stages for number, stages in wanted.items()}

    def holds(view: SwarmView) -> bool:
        return all(
            {s for s in range(8) for m in view.online(s) if m.peer == p} == w for p, w in peers.items()
        )

    async with asyncio.timeout(limit_s):
        for replica in world.replicas.values():
            await replica.members.wait_for(holds, limit_s)
        while any({*world.replicas[number].trainers} != stages for number, stages in wanted.items()):
            await asyncio.sleep(0.1)


async def grown(world: TrainerWorld, rounds: int, limit_s: float = 120.0) -> None:
    """Until each replica of each peer has so many rounds more."""
    trainers = [trainer for replica in world.replicas.values() for trainer in replica.trainers.values()]
    goals = [(trainer.outer, trainer.outer.height + rounds) for trainer in trainers]

    async def reach(outer: Outer, height: int) -> None:
        await outer.wait_until(lambda: outer.height >= height)

    async with asyncio.timeout(limit_s):
        for outer, height in goals:
            await reach(outer, height)


def ledgers(replicas: list[Replica], stage: int) -> list[Ledger]:
    """Of all replicas of a stage that ever were at these peers."""
    found = [ledger for replica in replicas for at, ledger in replica.past if at == stage]
    return found + [r.trainers[stage].decisions for r in replicas if stage in r.trainers]


def require_tiled(replicas: list[Replica], stages: int) -> None:
    """P2: what the drivers decided is applied once at each stage, by whoever was in the chain."""
    decided = sum(len(ledger) for ledger in ledgers(replicas, 0))
    for stage in range(1, stages):
        found = ledgers(replicas, stage)
        names = [name for ledger in found for name in numbered(ledger)]
        assert len(names) == len(set(names)), "twice"
        assert abs(decided - len(names)) <= 8 * len(replicas), (stage, decided, len(names))
    for replica in replicas:
        for trainer in replica.trainers.values():
            assert trainer.status()["dropped"] == 0
            assert trainer.status().get("lost", 0) == 0


def numbered(ledger: Ledger) -> list[tuple[str, int]]:
    applied = ledger.applied().items()
    return [(driver, n) for driver, spans in applied for first, end in spans for n in range(first, end)]


def test_one_peer_trains_all_stages_and_gives_them_back_as_others_come(tmp_path: Path) -> None:
    async def main() -> None:
        stages = 3
        async with TrainerWorld(spread_spec(stages), disk=tmp_path, slower=10.0) as world:
            alone = await world.add(0, 0, moves=True, most=stages)
            await holding(world, {0: set(range(stages))})
            busy_s, begun_s = alone.trainer.status()["lane_busy_s"], asyncio.get_running_loop().time()
            await grown(world, 2)
            worked_s = float(str(alone.trainer.status()["lane_busy_s"])) - float(str(busy_s))
            assert worked_s >= 0.9 * (asyncio.get_running_loop().time() - begun_s), (
                "no stage waits for itself"
            )
            everybody = [alone]
            for number in range(1, stages):
                heights = {stage: t.outer.height for stage, t in alone.trainers.items()}
                everybody.append(await world.add(number, number, moves=True))
                await holding(world, {0: {0, *range(number + 1, stages)}, number: {number}})
                heir = everybody[-1].trainer.outer
                assert heir.height >= heights[number], "it goes on, it does not begin anew"
                await grown(world, 2)
            require_tiled(everybody, stages)
            kinds = [kind for _, kind, _ in alone.events]
            assert kinds.count("taking") == kinds.count("returning") == stages - 1

    run(main)


@pytest.mark.parametrize("gave_back", [False, True])
def test_when_the_peer_that_held_the_other_stage_dies_the_survivor_holds_both(
    tmp_path: Path, gave_back: bool
) -> None:
    async def main() -> None:
        spec = spread_spec(2)
        async with TrainerWorld(spec, disk=tmp_path, slower=10.0, spare_bytes=1 << 30) as world:
            one = await world.add(0, 1, moves=True, most=2)
            await holding(world, {0: {0, 1}})
            await grown(world, 2)
            other = await world.add(1, 0, moves=True, most=2)
            if gave_back:
                await holding(world, {0: {1}, 1: {0}})
            async with asyncio.timeout(60.0):
                while not other.trainer.heartbeat().guards:  # a copy of stage 1
                    await asyncio.sleep(0.1)
            kept = other.trainer.heartbeat().guards[0].height
            await world.kill(0)
            await holding(world, {1: {0, 1}})
            assert other.trainers[1].outer.height >= kept > 0, "from its own copy"
            await grown(world, 3)
            for stage in (0, 1):
                names = [name for ledger in ledgers([one, other], stage) for name in numbered(ledger)]
                assert len(names) == len(set(names))
            third = await world.add(2, 1, moves=True)
            await holding(world, {1: {0}, 2: {1}})
            assert third.trainer.outer.height > kept

    run(main)


def test_a_stage_that_the_named_peer_has_no_memory_for_is_taken_by_the_next_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with TrainerWorld(spread_spec(3), disk=tmp_path, slower=10.0) as world:
            small = await world.add(0, 1, moves=True, most=2)
            tenure = small.tenure
            assert tenure is not None
            tenure._fits = lambda stages: 0 not in stages  # it says that it has room: for stage 2
            await world.add(1, 2, moves=True, most=2)
            await holding(world, {0: {1}, 1: {0, 2}})

    run(main)


def test_a_stage_that_cannot_be_taken_after_all_leaves_nothing_behind_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its recovery had begun to write: nobody else would ever end that."""
    restore, refused = Outer._restore_residuals, list[Outer]()

    async def fails(outer: Outer) -> None:
        if outer.context.stage == 1 and not refused:
            refused.append(outer)
            outer._snapshots.write(lambda: None)  # as for each entry that it caught up with
            raise StageEmpty("nobody hands it over")
        await restore(outer)

    monkeypatch.setattr(Outer, "_restore_residuals", fails)

    async def main() -> None:
        async with TrainerWorld(spread_spec(2), disk=tmp_path, slower=10.0) as world:
            alone = await world.add(0, 0, moves=True, most=2)
            await holding(world, {0: {0, 1}})
            await grown(world, 2)
            assert [kind for _, kind, _ in alone.events].count("take-cut") == 1
            writer = refused.pop()._snapshots._writer
            assert writer is not None
            assert writer.done()

    run(main)


def placed(*where: tuple[str, int], service_s: float = 1.0) -> list[Placed]:
    return [Placed(PeerId(peer), stage, service_s) for peer, stage in where]


def test_an_empty_stage_falls_to_whoever_has_room_and_holds_the_fewest() -> None:
    def room(**peers: int) -> dict[PeerId, int]:
        return {PeerId(peer): count for peer, count in peers.items()}

    here = placed(("a", 0), ("b", 1), ("b", 2))
    assert take(here, 3, room(a=1, b=1)) is None, "none is empty"
    assert take(here, 5, room(a=1, b=1)) == Take(PeerId("a"), 3)
    assert take(here, 5, room(b=1)) == Take(PeerId("b"), 3)
    assert take(here, 5, room()) is None
    assert take(here, 5, room(c=1)) is None, "it holds nothing yet: it is about to join some stage"
    named = [take(here, 5, room(a=1, b=1), turn) for turn in range(5)]
    assert [(one.peer, one.stage) for one in named if one] == [
        ("a", 3), ("b", 3), ("a", 4), ("b", 4), ("a", 3)
    ], "who does not come keeps no stage empty"  # fmt: skip
    fast = Placed(PeerId("c"), 0, 0.5)
    assert take([*here, fast], 5, room(a=1, c=1)) == Take(PeerId("c"), 3)


def test_a_peer_keeps_one_stage_and_what_nobody_else_holds() -> None:
    me = PeerId("me")
    here = placed(("me", 0), ("me", 1), ("me", 2), ("a", 1), ("b", 2), ("c", 2))
    assert give_back(here, me, [0, 1, 2], 1) == 2, "the one that most others hold"
    assert give_back(here, me, [2, 1, 0], 2) == 2
    assert give_back(placed(("me", 0), ("me", 1), ("a", 0), ("b", 1)), me, [1, 0], 1) == 0, "the last taken"
    assert give_back(placed(("me", 0), ("me", 1), ("a", 0), ("b", 1)), me, [1, 0], 2) is None
    assert give_back(placed(("me", 0), ("me", 1)), me, [0, 1], 1) is None
    assert give_back(placed(("me", 0), ("a", 0)), me, [0], 1) is None


def test_what_a_peer_says_of_its_stages_is_bounded_and_read_with_care() -> None:
    def record(**changes: object) -> PeerRecord:
        fields: dict[str, Any] = {
            "peer": PeerId("p" * 46), "incarnation": 1, "sequence": 1, "issued_unix_s": 1.0, "ttl_s": 30.0,
            "state": "online", "stages": (0, 1), "states": ("online", "joining"), "name": "", "addresses": (),
            "chain": (), "device": "", "tokens_per_s": 0.0, "version": "",
        }  # fmt: skip
        return PeerRecord(**{**fields, **changes})

    assert wire.decode(PeerRecord, wire.encode(record())) == record()
    for lie in ({"states": ("king",)}, {"states": ("online",) * 9}, {"stages": tuple(range(9))}):
        with pytest.raises(MessageInvalid):
            wire.encode(record(**lie))
    both = Member(peer=PeerId("p"), stages=(0, 1), states=("online", "joining"))
    view = SwarmView(PeerId("me"), 0.0, (both,))
    assert (view.online(0), view.online(1)) == ((both,), ())
    assert view.group(1, "joining") == (both,)
    fewer = replace(both, states=("joining",))
    assert [fewer.state_at(stage) for stage in (0, 1, 7)] == ["online"] * 3, "as if it had said nothing"
    assert take(placed(("p", 99)), 2, {PeerId("p"): 1}) == Take(PeerId("p"), 0)
