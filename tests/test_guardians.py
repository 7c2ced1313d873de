"""Guardians: copies of stages at peers that do not train them, and a stage that comes back from one."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from trainer_world import Replica, TrainerWorld, round_spec

from shoal.protocol import virtual_time
from shoal.protocol.errors import Busy, MessageInvalid, MessageTooLarge, Stale, StorageError
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import call
from shoal.training.neighbours import stage_guardians
from shoal.training.outer.entry import ENTRY_BYTES, Seat
from shoal.training.outer.messages import Keep, Kept
from shoal.training.outer.replica import Replica as Copy
from shoal.training.plan import make_plan
from shoal.training.recovery.guard import Guard
from shoal.training.recovery.guardians import Candidate, choose_guardians, guard_bytes, may_let_go
from shoal.training.recovery.guarding import AGAIN_MOST_S, Guarding
from shoal.training.recovery.snapshots import Snapshots, clear

SPARE = 1 << 30
SLOWER = 10.0  # a round takes about two seconds
RUN = bytes(32)


def guarding(replica: Replica) -> Guarding:
    return replica.trainer._guarding


async def guarded(world: TrainerWorld, stage: int, copies: int, limit_s: float = 30.0) -> list[Replica]:
    """Until so many peers have a copy of the stage, and its replicas know; who they are."""
    async with asyncio.timeout(limit_s):
        while True:
            found = [replica for replica in world.replicas.values() if guarding(replica).holds(stage)]
            known = [stage_guardians(replica.members, stage) for replica in world.group(stage)]
            if len(found) >= copies and all(len(guardians) >= copies for guardians in known):
                return found
            await asyncio.sleep(0.1)


async def two_stages(world: TrainerWorld, first: int, second: int) -> None:
    """Replicas of stage 0 from number 0 on, of stage 1 from number 10 on."""
    for number in range(first):
        await world.add(number, 0)
    for number in range(second):
        await world.add(10 + number, 1)


@pytest.mark.parametrize("replicas", [1, 2])
def test_an_emptied_stage_goes_on_from_its_guardians_at_the_head_that_was_committed(replicas: int) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with TrainerWorld(round_spec(2), spare_bytes=SPARE, slower=SLOWER) as world:
            await two_stages(world, 2, replicas)
            await guarded(world, 1, copies=2)
            await world.heights(5)
            await asyncio.sleep(3.0)
            lost = [(await world.kill(10 + number)).trainer.outer for number in range(replicas)]
            begun_s = loop.time()
            heir = await world.add(20, 1, run=False)
            outer = heir.trainer.outer
            assert loop.time() - begun_s < 15.0
            (told,) = heir.heard("stage-rescued")
            last = max(lost, key=lambda outer: outer.height)
            if replicas == 1:
                assert outer.height >= last.height, "an entry that was committed is not lost"
            if outer.height == last.height:
                assert (outer.head, outer.state_root) == (last.head, last.state_root)
                assert torch.equal(outer.anchor, last.anchor)
                assert torch.equal(outer.momentum, last.momentum)
            else:
                assert abs(outer.height - last.height) == 1
            assert told["height"] == outer.height
            assert not heir.heard("stage-lost")
            heir.task = asyncio.create_task(heir.trainer.run())
            await world.heights(outer.height + 3)

    virtual_time.run(main)


def test_a_lone_replica_commits_nothing_that_no_guardian_has() -> None:
    """Its outer steps wait for the guardian, killed or not; seeds are moments of the kill."""

    async def once(after_s: float) -> tuple[int, int]:
        async with TrainerWorld(round_spec(2), spare_bytes=SPARE, slower=SLOWER) as world:
            await two_stages(world, 2, 1)
            await guarded(world, 1, copies=2)
            await asyncio.sleep(2.0 + after_s)
            lost = await world.kill(10)
            heir = await world.add(20, 1, run=False)
            assert not lost.heard("guardian-silent")
            return lost.trainer.outer.height, heir.trainer.outer.height

    for after_s in (0.0, 0.5, 1.0):
        committed, rescued = virtual_time.run(once(after_s))
        assert rescued in (committed, committed + 1), after_s


def test_a_lone_replica_whose_guardians_stand_still_goes_on_after_a_moment_and_tells() -> None:
    async def main() -> None:
        async with TrainerWorld(round_spec(2), spare_bytes=SPARE, slower=SLOWER) as world:
            await two_stages(world, 4, 1)
            keepers = await guarded(world, 1, copies=2)  # or one more, for a moment
            assert len(keepers) < 4, "a driver has to go on"
            lone = world.replicas[10]
            for keeper in keepers:
                world.network.freeze(keeper.peer)
            await lone.reach(lone.trainer.outer.height + 2)
            assert lone.heard("guardian-silent")
            assert lone.trainer.outer.status()["entries_unguarded"]

    virtual_time.run(main, limit_s=600.0)


def test_who_says_that_it_keeps_a_copy_has_what_is_committed_or_the_stage_would_be_lost() -> None:
    """Its snapshot may be the one the run began with, of which nobody can tell that it was all there was."""

    async def main() -> None:
        async with TrainerWorld(round_spec(2), spare_bytes=SPARE, slower=SLOWER) as world:
            await two_stages(world, 1, 1)
            lone, keeper = world.replicas[10], world.replicas[0]
            async with asyncio.timeout(60.0):
                while not keeper.heard("guarding"):
                    await asyncio.sleep(0.001)
            committed = lone.trainer.outer.height
            assert committed, "nothing is kept before there is an entry"
            await world.kill(10)
            heir = await world.add(20, 1, run=False)
            assert not heir.heard("stage-lost")
            assert heir.trainer.outer.height >= committed

    virtual_time.run(main, limit_s=120.0)


def test_when_a_guardian_dies_another_peer_takes_its_place_and_one_that_lagged_catches_up() -> None:
    async def main() -> None:
        async with TrainerWorld(round_spec(2), spare_bytes=SPARE, slower=SLOWER) as world:
            await two_stages(world, 3, 2)
            first, second = await guarded(world, 1, copies=2)
            await world.kill(first.number)
            kept = await guarded(world, 1, copies=2)
            assert first not in kept
            world.network.freeze(second.peer)
            height = world.replicas[10].trainer.outer.height
            await world.replicas[10].reach(height + 3)
            world.network.thaw(second.peer)
            async with asyncio.timeout(20.0):
                while guarding(second).holds(1) <= height + 3:
                    await asyncio.sleep(0.1)
            (shown,) = guarding(second).status()
            assert int(str(shown["behind"])) <= 1

    virtual_time.run(main)


def copy_of(replica: Replica) -> tuple[Copy, Snapshots]:
    """What a guardian has of stage 1."""
    guard = guarding(replica)._guarded[1].guard
    assert guard._replica is not None
    return guard._replica, guard._catching_up._jumping._snapshots


@pytest.mark.parametrize("lie", ["root", "chunks", "entries"])
def test_a_guardian_that_lies_is_passed_over_and_the_stage_comes_from_the_other(lie: str) -> None:
    async def main() -> None:
        async with TrainerWorld(round_spec(2), spare_bytes=SPARE, slower=SLOWER) as world:
            await two_stages(world, 2, 1)
            await guarded(world, 1, copies=2)
            await world.heights(6)
            lost, copies = world.replicas[10].trainer.outer, [copy_of(r)[0] for r in world.group(0)]
            while {copy.log.head for copy in copies} != {lost.head}:
                await world.heights(lost.height + 1)
                await asyncio.sleep(0.2)  # one of them alone may have the next entry, and be right about it
            await world.kill(10)
            await asyncio.sleep(3.0)
            honest, liar = sorted(world.group(0), key=lambda replica: guarding(replica).holds(1))
            copy, snapshots = copy_of(liar)
            if lie == "root":
                copy.state_root = bytes(32)
            elif lie == "chunks":
                snapshots.get(snapshots.newest_height).anchor.add_(1.0)
            else:
                copy.log.head = bytes(32)
            heir = await world.add(20, 1, run=False)
            outer = heir.trainer.outer
            right, _ = copy_of(honest)
            true = {lost.head: lost.state_root, right.log.head: right.state_root}
            assert true[outer.head] == outer.state_root
            assert outer.height >= right.log.height

    virtual_time.run(main)


def test_a_copy_outlives_its_guardians_process_on_disk(tmp_path: Path) -> None:
    async def main() -> None:
        async with TrainerWorld(round_spec(2), spare_bytes=SPARE, disk=tmp_path, slower=SLOWER) as world:
            await two_stages(world, 2, 1)
            await guarded(world, 1, copies=2)
            await world.heights(6)
            await asyncio.sleep(2.0)
            lost = (await world.kill(10)).trainer.outer
            for number in (0, 1):
                await asyncio.sleep(2.0)
                await world.kill(number)
            await world.add(0, 0)
            await guarded(world, 1, copies=1)
            heir = await world.add(20, 1, run=False)
            assert heir.trainer.outer.height >= lost.height
            assert heir.heard("stage-rescued")

    virtual_time.run(main)


def test_a_copy_that_fails_is_begun_again_and_its_disk_too_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails() -> None:
        raise OSError("no such luck")

    async def main() -> None:
        async with TrainerWorld(round_spec(2), spare_bytes=SPARE, disk=tmp_path, slower=SLOWER) as world:
            await two_stages(world, 2, 1)
            keeper, _ = await guarded(world, 1, copies=2)
            own, folder = guarding(keeper), copy_of(keeper)[1].directory
            assert folder is not None
            (folder / "snapshot-000000000000.safetensors").mkdir(parents=True)  # which nobody can unlink
            failed = own._guarded[1].guard
            monkeypatch.setattr(failed, "_follow", fails)
            async with asyncio.timeout(30.0):
                while not (own.holds(1) and own._guarded[1].guard is not failed):
                    await asyncio.sleep(0.1)
            assert "no such luck" in str(keeper.heard("guard-failed")[0]["text"])
            await keeper.reach(keeper.trainer.outer.height + 6)  # its snapshots are written meanwhile
            async with asyncio.timeout(10.0):
                await own._end(1, own._guarded[1])
            assert any("snapshot-000000000000" in str(told["why"]) for told in keeper.heard("disk-refused"))
            await keeper.reach(keeper.trainer.outer.height + 1)

    virtual_time.run(main)


def test_a_copy_that_fails_again_and_again_is_begun_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was: every two seconds, whatever it took each time."""
    begun = Counter[PeerId]()

    async def fails(guard: Guard) -> None:
        begun[guard._context.me] += 1
        raise MemoryError

    monkeypatch.setattr(Guard, "run", fails)

    async def main() -> None:
        async with TrainerWorld(round_spec(2), spare_bytes=SPARE, slower=10 * SLOWER) as world:
            await two_stages(world, 2, 1)
            await asyncio.sleep(120.0)

    virtual_time.run(main)
    assert 4 <= max(begun.values()) <= 12


def test_a_copy_that_held_for_long_each_time_is_begun_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was: no failure was ever forgotten: after a few in days each left two minutes without a copy."""
    gaps_s: list[float] = []
    failed_s: dict[PeerId, float] = {}

    async def holds_for_long(guard: Guard) -> None:
        me, loop = guard._context.me, asyncio.get_running_loop()
        if me in failed_s:
            gaps_s.append(loop.time() - failed_s[me])
        guard.level_since_s = loop.time()
        await asyncio.sleep(AGAIN_MOST_S)
        failed_s[me] = loop.time()
        raise OSError

    monkeypatch.setattr(Guard, "run", holds_for_long)

    async def main() -> None:
        async with TrainerWorld(round_spec(2), spare_bytes=SPARE, slower=100 * SLOWER) as world:
            await two_stages(world, 1, 1)
            async with asyncio.timeout(20 * AGAIN_MOST_S):
                while len(gaps_s) < 14:
                    await asyncio.sleep(10.0)

    virtual_time.run(main)
    assert max(gaps_s) < 10.0


def test_a_writer_outlives_a_folder_that_cannot_be_cleared(tmp_path: Path) -> None:
    async def main() -> None:
        async with TrainerWorld(round_spec(1), disk=tmp_path, slower=SLOWER) as world:
            replica = await world.add(0, 0)
            (tmp_path / "other" / "snapshot-000000000000.safetensors").mkdir(parents=True)
            with pytest.raises(StorageError, match="by hand"):
                clear(tmp_path / "other")
            snapshots = replica.trainer.outer._snapshots
            snapshots.write(clear, tmp_path / "other")
            async with asyncio.timeout(30.0):
                await snapshots._writes.join()
            assert replica.heard("disk-refused")
            await replica.reach(replica.trainer.outer.height + 2)

    virtual_time.run(main)


def test_what_is_handed_to_a_guardian_has_to_be_a_lone_replicas_own_next_entry() -> None:
    """P8: nobody else's bytes get into a copy."""

    async def main() -> None:
        async with TrainerWorld(round_spec(2), spare_bytes=SPARE, slower=SLOWER) as world:
            await two_stages(world, 2, 2)
            keeper, other = await guarded(world, 1, copies=2)
            replica = world.replicas[10]
            height = replica.trainer.outer.height
            last = replica.trainer.outer.entry(height)
            assert last is not None
            seat = Seat(replica.peer, replica.incarnation, 1.0, present=True)
            nothing = dataclasses.replace(last, contributors=(), leaving="", digests=b"", listed=b"")
            own = dataclasses.replace(nothing, roster=(seat,), leader=replica.peer)
            stranger = dataclasses.replace(seat, peer=other.peer)
            others = dataclasses.replace(own, roster=(stranger,), leader=other.peer)
            cases = (
                (replica, b"rubbish", MessageInvalid, "Entry"),
                (replica, last.encode(), MessageInvalid, "alone"),
                (other, own.encode(), MessageInvalid, "alone"),
                (other, others.encode(), Stale, "no replica of stage 1"),
                (replica, dataclasses.replace(own, revision=9).encode(), Busy, "revision 9 of the settings"),
                (replica, own.encode(), Stale, "fork|does not continue"),
                (replica, bytes(ENTRY_BYTES + 1), MessageTooLarge, "allowed"),
            )
            before = copy_of(keeper)[0].log.height
            for caller, data, kind, words in cases:
                with pytest.raises(kind, match=words):
                    await call(
                        caller.transport,
                        keeper.peer,
                        "outer.1.keep",
                        Keep(),
                        Kept,
                        timeout_s=9.0,
                        payload=data,
                    )
            assert guarding(keeper)._guarded[1].guard._handed is None
            await replica.reach(height + 3)
            await asyncio.sleep(3.0)
            assert copy_of(keeper)[0].log.height > before, "and it goes on"

    virtual_time.run(main)


# --- who guards what


def candidates(stages: int, each: int, spare_bytes: int = 100) -> list[Candidate]:
    return [
        Candidate(PeerId(f"p{stage}-{n}"), (stage,), spare_bytes)
        for stage in range(stages)
        for n in range(each)
    ]


def test_two_peers_of_other_stages_guard_each_stage_whoever_looks() -> None:
    everybody = candidates(stages=4, each=3)
    chosen = choose_guardians(RUN, [10] * 4, everybody)
    assert chosen == choose_guardians(RUN, [10] * 4, everybody[::-1])
    for stage, guardians in enumerate(chosen):
        assert len(set(guardians)) == 2
        assert not {c.peer for c in everybody if stage in c.stages} & set(guardians)
    fewer = [c for c in everybody if c.peer != chosen[0][0]]
    again = choose_guardians(RUN, [10] * 4, fewer)
    assert chosen[0][1] == again[0][0], "who stays keeps what it has"


def test_who_has_a_copy_keeps_it_whoever_comes() -> None:
    everybody = candidates(stages=4, each=3)
    chosen = choose_guardians(RUN, [10] * 4, everybody)
    guards = {c.peer: tuple(s for s, peers in enumerate(chosen) if c.peer in peers) for c in everybody}
    everybody = [dataclasses.replace(c, guards=guards[c.peer]) for c in everybody]
    for number in range(20):
        newcomer = Candidate(PeerId(f"newcomer-{number}"), (number % 4,), 100)
        assert choose_guardians(RUN, [10] * 4, [*everybody, newcomer]) == chosen


def test_who_says_that_it_has_copies_of_everything_keeps_no_other_token_from_having_them() -> None:
    honest = [dataclasses.replace(c, token=f"token of {c.peer}") for c in candidates(stages=4, each=2)]
    boasts = [Candidate(PeerId(f"{n}"), (), 10**9, (0, 1, 2, 3), "boaster") for n in range(9)]
    chosen = choose_guardians(RUN, [100] * 4, [*honest, *boasts])
    assert all(set(guardians) - {boast.peer for boast in boasts} for guardians in chosen)


def test_a_swarm_under_one_token_has_two_guardians_for_each_stage_too() -> None:
    everybody = [dataclasses.replace(c, token="all") for c in candidates(stages=4, each=3)]
    chosen = choose_guardians(RUN, [10] * 4, everybody)
    assert [len(set(guardians)) for guardians in chosen] == [2] * 4
    guards = {c.peer: tuple(s for s, peers in enumerate(chosen) if c.peer in peers) for c in everybody}
    settled = [dataclasses.replace(c, guards=guards[c.peer]) for c in everybody]
    assert choose_guardians(RUN, [10] * 4, settled) == chosen


def test_a_stage_that_nobody_guards_gets_the_second_guardian_of_another_if_nobody_else_has_room() -> None:
    def peer(name: str, stage: int, guards: int) -> Candidate:
        return Candidate(PeerId(name), (stage,), 100, (guards,))

    everybody = [peer("a", 1, 0), peer("b", 2, 0), peer("c", 0, 1), peer("d", 2, 1), peer("e", 2, 1)]
    chosen = choose_guardians(RUN, [100] * 3, everybody)
    assert all(chosen)
    assert chosen[2][0] in ("a", "c"), "the others hold the stage"
    assert len(set(sum(chosen, ()))) == len(sum(chosen, ())), "nobody has room for two"


def test_in_a_swarm_known_in_part_few_take_themselves_for_guardians() -> None:
    """Each of 4,000 looks at 40 that it knows: two of these have the lowest hash there."""
    everybody = candidates(stages=4, each=1000)
    rng = random.Random(1)
    guards: Counter[int] = Counter()
    for me in everybody:
        known = [me, *rng.sample(everybody, 39)]
        chosen = choose_guardians(RUN, [10] * 4, known, part=40 / 4000)
        guards.update(stage for stage, peers in enumerate(chosen) if me.peer in peers)
    assert all(2 <= guards[stage] <= 20 for stage in range(4)), guards


def test_memory_to_spare_is_never_exceeded() -> None:
    needs = [60, 60, 10]
    chosen = choose_guardians(RUN, needs, candidates(stages=3, each=1))
    taken = {
        peer: sum(n for n, g in zip(needs, chosen, strict=True) if peer in g) for g in chosen for peer in g
    }
    assert all(taken[peer] <= 100 for peer in taken)
    assert not any(choose_guardians(RUN, needs, candidates(stages=3, each=4, spare_bytes=9)))
    assert choose_guardians(RUN, [1] * 20, [Candidate(PeerId("p"), (0,), 100)]).count((PeerId("p"),)) == 8


def test_where_memory_is_scarce_no_stage_is_without_a_guardian_while_another_has_two() -> None:
    for stages in (3, 5, 8):
        few = candidates(stages, each=2)[2:]  # each has memory for one copy
        chosen = choose_guardians(RUN, [100] * stages, few)
        assert min(map(len, chosen)) == 1
        assert sum(map(len, chosen)) == len(few)


def test_who_has_no_room_for_what_it_shall_guard_lets_go_of_what_another_shall() -> None:
    me, a = PeerId("me"), PeerId("a")
    assert may_let_go(me, [a], {me: 5, a: 5}, trained=True)
    assert not may_let_go(me, [a], {me: 5, a: 4}, trained=True)
    assert not may_let_go(me, [], {me: 5, a: 5}, trained=True)


def test_a_copy_is_let_go_only_when_two_others_have_it() -> None:
    me, a, b = PeerId("me"), PeerId("a"), PeerId("b")
    assert may_let_go(me, [a, b], {me: 5, a: 5, b: 6}, trained=True)
    assert not may_let_go(me, [a, b], {me: 5, a: 5, b: 4}, trained=True)
    assert not may_let_go(me, [a, b], {me: 5, a: 5}, trained=True)
    assert not may_let_go(me, [a, b], {me: 5, a: 5, b: 6}, trained=False)
    assert not may_let_go(me, [me, b], {me: 5, a: 5, b: 6}, trained=True)


def test_guardians_that_are_not_chosen_any_more_do_not_drop_the_last_copies_at_once() -> None:
    leavers, chosen = [PeerId(name) for name in "abc"], [PeerId("d"), PeerId("e")]
    heights = dict.fromkeys(leavers, 5)
    for kept in ({}, {PeerId("d"): 0}, {PeerId("d"): 5}, {PeerId("d"): 5, PeerId("e"): 4}):
        assert not any(may_let_go(peer, chosen, heights | kept, trained=True) for peer in leavers)
    heights |= dict.fromkeys(chosen, 5)
    assert all(may_let_go(peer, chosen, heights, trained=True) for peer in leavers)


def test_a_copy_takes_states_and_a_tail_of_entries() -> None:
    spec = round_spec(2)
    stage = make_plan(spec).stages[1]
    assert guard_bytes(stage, 8) > guard_bytes(stage, 4) > 3 * 8 * stage.parameters
