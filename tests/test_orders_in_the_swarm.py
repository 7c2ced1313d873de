"""What the owner orders reaches all, takes effect in the same round everywhere, and loses nothing."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

import pytest
from members_world import RUN
from members_world import owner as owner_key
from orders_world import Owner, check_tiling, decided
from trainer_world import TrainerWorld, round_spec

from shoal.protocol import virtual_time
from shoal.protocol.amendments import PAUSED, RUNNING, AmendmentBook
from shoal.protocol.errors import Busy, MessageInvalid
from shoal.training.amended import AMENDABLE, amended
from shoal.training.outer.entry import Entry
from shoal.training.outer.policy import succession
from shoal.training.weights import learning_rate

SETTLE_S = 5.0  # for what is in flight, and its commits


async def told(world: TrainerWorld, version: int) -> None:
    """Until all have the list."""
    async with asyncio.timeout(10.0):
        for replica in world.replicas.values():
            with replica.members.amendments.watch() as changed:
                while replica.members.amendments.version < version:
                    changed.clear()
                    await changed.wait()


def work(world: TrainerWorld) -> dict[int, tuple[int, int, int]]:
    """Tokens applied, inner steps and height of each."""
    return {
        number: (r.trainer.decisions.tokens, r.trainer.weights.inner_steps, r.trainer.outer.height)
        for number, r in world.replicas.items()
    }


def check_books(world: TrainerWorld) -> None:
    """While nothing is in flight: what drivers decided is what the second stage applied, once each."""
    assert decided(world.group(0)) == decided(world.group(1))
    check_tiling(world.replicas.values(), 2)


def test_a_paused_run_is_quiet_takes_joiners_and_goes_on_with_nothing_lost() -> None:
    async def main() -> None:
        owner = Owner()
        async with TrainerWorld(round_spec(2), seed=5) as world:
            for number in range(4):
                await world.add(number, number % 2)
            await world.heights(3)
            pause = owner.order(state=PAUSED)
            assert world.replicas[2].members.amendments.adopt(pause)
            await told(world, 1)
            await asyncio.sleep(SETTLE_S)
            check_books(world)

            before = work(world)
            joiner = await world.add(9, 0)
            await asyncio.sleep(30.0)
            assert joiner.online
            assert work(world) == {**before, 9: (0, 0, joiner.trainer.outer.height)}
            for replica in world.replicas.values():  # heartbeats went on
                assert {m.peer for m in replica.members.view().here()} == {
                    other.peer for other in world.replicas.values()
                }
            assert not world.replicas[0].members.amendments.adopt(pause), "the same order twice is one"

            assert world.replicas[1].members.amendments.adopt(owner.order(state=RUNNING))
            await told(world, 2)
            await world.heights(max(height for _, _, height in before.values()) + 3)
            assert joiner.trainer.decisions.tokens > 0

            assert joiner.members.amendments.adopt(owner.order(state=PAUSED))
            await told(world, 3)
            await asyncio.sleep(SETTLE_S)
            check_books(world)

    virtual_time.run(main)


def test_a_side_that_was_cut_off_learns_the_newest_order_when_the_cut_heals() -> None:
    async def main() -> None:
        owner = Owner()
        async with TrainerWorld(round_spec(2), seed=6) as world:
            for number in range(4):
                await world.add(number, number % 2)
            await world.heights(3)
            sides = ([world.replicas[0], world.replicas[1]], [world.replicas[2], world.replicas[3]])
            for one, other in itertools.product(*sides):
                world.network.cut(one.peer, other.peer)
            first, second = owner.order(state=PAUSED), owner.order(state=RUNNING)
            third = owner.order(state=PAUSED)
            assert sides[0][0].members.amendments.adopt(third)
            assert sides[1][0].members.amendments.adopt(first)
            assert sides[1][1].members.amendments.adopt(second)  # and reaches the other of its side
            await asyncio.sleep(10.0)
            assert [peer.members.amendments.version for side in sides for peer in side] == [3, 3, 2, 2]
            ahead = decided(sides[1][:1]) - decided(sides[0][:1])
            assert ahead, "the side that is not paused works"

            for one, other in itertools.product(*sides):
                world.network.heal(one.peer, other.peer)
            await told(world, 3)
            await asyncio.sleep(30.0)  # chains agree again, and nothing is in flight
            check_books(world)
            before = decided(world.group(0))
            await asyncio.sleep(30.0)
            assert decided(world.group(0)) == before

            assert sides[1][1].members.amendments.adopt(owner.order(state=RUNNING))
            await told(world, 4)
            await world.heights(max(r.trainer.outer.height for r in world.replicas.values()) + 2)
            check_tiling(world.replicas.values(), 2)

    virtual_time.run(main)


def test_settings_change_for_all_members_of_a_stage_in_the_same_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One member does not get the list: no round is made with it until it has."""

    async def main() -> None:
        owner = Owner()
        spec = round_spec(1)
        async with TrainerWorld(spec, seed=7) as world:
            for number in range(3):
                await world.add(number, 0)
            await world.heights(5)  # those that came first have long rounds
            deaf = world.replicas[2]
            with monkeypatch.context() as patch:
                patch.setattr(deaf.members.amendments, "adopt", lambda signed: False)
                owner.set("inner.learning_rate", 0.05)
                listed = owner.set("outer.inner_steps", 6)
                assert world.replicas[0].members.amendments.adopt(listed)
                group = [world.replicas[0], world.replicas[1]]
                began = max(replica.trainer.outer.height for replica in group)
                await asyncio.gather(*(replica.reach(began + 3) for replica in group))
            for height in range(began + 2, began + 4):
                entry = group[0].trainer.outer.entry(height)
                assert entry is not None
                assert entry.revision == 2
                contributors = {entry.roster[row.seat].peer for row in entry.contributors}
                assert deaf.peer not in contributors

            assert deaf.members.amendments.adopt(listed)
            await world.heights(max(r.trainer.outer.height for r in world.replicas.values()) + 3)
            revisions, steps = [], []
            outer = group[0].trainer.outer
            for height in range(1, outer.height + 1):
                if (entry := outer.entry(height)) is not None:
                    revisions.append(entry.revision)
                    steps.append(sum(row.to_step - row.from_step for row in entry.contributors))
            assert revisions == sorted(revisions)
            assert set(revisions) == {0, 2}
            before = steps[revisions.index(2) - 1]
            assert min(steps[-2:]) >= 3 * 6 - 3 > before, "a round has six steps of each, not two"
            for replica in world.replicas.values():
                trainer = replica.trainer
                assert trainer.outer.revision == 2
                expected = amended(spec, owner.listed.settings)
                assert trainer.outer.spec == expected
                assert trainer.status()["learning_rate"] == learning_rate(expected, trainer.outer.tokens)
            listed_again = {
                entry.roster[row.seat].peer
                for height in range(outer.height - 1, outer.height + 1)
                if (entry := outer.entry(height)) is not None
                for row in entry.contributors
            }
            assert deaf.peer in listed_again

            joiner = await world.add(9, 0)
            assert joiner.trainer.outer.revision == 2, "a snapshot says which settings are in force"
            assert joiner.trainer.outer.spec == expected

    virtual_time.run(main)


def test_a_member_that_no_heartbeat_tells_gets_the_list_from_its_group_and_misses_no_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether it only follows or is to lead itself: whoever names a revision also gives it."""

    async def main() -> None:
        owner = Owner()
        async with TrainerWorld(round_spec(1), seed=7) as world:
            for number in range(3):
                await world.add(number, 0)
            await world.heights(3)
            deaf, book = world.replicas[2], world.replicas[2].members.amendments
            with monkeypatch.context() as patch:  # heartbeats fill another book than the rounds look into
                patch.setattr(deaf.members, "amendments", AmendmentBook(RUN, owner_key().root_der))
                assert world.replicas[0].members.amendments.adopt(owner.set("outer.inner_steps", 3))
                group = list(world.replicas.values())
                began = max(replica.trainer.outer.height for replica in group)
                names = [replica.peer for replica in group]
                heights = itertools.count(began + 2)
                led = next(h for h in heights if succession(world.spec.run_id(), 0, h, names)[0] == deaf.peer)
                await asyncio.gather(*(replica.reach(led + 1) for replica in group))
            assert book.version == 1
            leaders = set()
            for height in range(began + 2, led + 1):
                entry = group[0].trainer.outer.entry(height)
                assert entry is not None and entry.revision == 1
                assert deaf.peer in {entry.roster[row.seat].peer for row in entry.contributors}
                leaders.add(entry.leader)
            assert deaf.peer in leaders

    virtual_time.run(main)


def test_no_entry_under_settings_that_the_owner_never_made_enters_a_log() -> None:
    """In the log it would be in the way of every later round: nobody could know its revision."""

    async def main() -> None:
        async with TrainerWorld(round_spec(1), seed=8) as world:
            replica = await world.add(0, 0)
            await world.heights(2)
            outer, before = replica.trainer.outer, replica.trainer.outer.height
            forged = replace(outer.entry(before) or _no_entry(), height=before + 1, previous=outer.head)
            with pytest.raises(Busy, match="revision 9 of the settings is not known"):
                await outer._member.commit(replace(forged, revision=9).encode())
            await world.heights(before + 3)
            for height in range(1, outer.height + 1):
                assert (outer.entry(height) or _no_entry()).revision == 0

            assert replica.members.amendments.adopt(Owner().set("outer.inner_steps", 3))
            await world.heights(outer.height + 2)
            assert outer.revision == 1
            entry = replace(outer.entry(outer.height) or _no_entry(), height=outer.height + 1)
            with pytest.raises(MessageInvalid, match="revision 0 after 1"):
                outer._member.replica.log.check(replace(entry, previous=outer.head, revision=0))

    virtual_time.run(main)


def _no_entry() -> Entry:
    raise AssertionError("the log has no such entry")


def test_only_some_keys_can_change_and_none_beyond_its_bounds() -> None:
    owner, spec = Owner(), round_spec(1)
    for key, value in (
        ("inner.learning_rate", -1.0),
        ("outer.inner_steps", 0.0),
        ("model.width", 64.0),
        ("inner.no_such_key", 1.0),
        ("inner.total_tokens", 1e300),
        ("inner.final_learning_rate_fraction", 0.5),
    ):
        owner.set(key, value)
    found = amended(spec, owner.listed.settings)
    assert found.inner.final_learning_rate_fraction == 0.5
    assert found.model_copy(update={"inner": spec.inner}) == spec
    assert all("." in key for key in AMENDABLE)
