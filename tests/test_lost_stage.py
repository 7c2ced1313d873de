"""A stage of which no copy is left: it waits, or goes on as the spec says, and says so; in virtual time."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest
import torch
from trainer_world import RandomFeed, Replica, TrainerWorld, round_spec

from shoal.dht.beats import Beat, StageBeat
from shoal.dht.liveness import Liveness
from shoal.dht.view import Member, SwarmView
from shoal.protocol import limits, virtual_time, wire
from shoal.protocol.errors import MessageInvalid
from shoal.protocol.identity import PeerId
from shoal.training.model.layout import genesis, stage_layout
from shoal.training.outer.log import LogState, Rebuilt, check_beginning
from shoal.training.outer.policy import SILENT_S
from shoal.training.partition import stage_ranges
from shoal.training.recovery.lost_stage import loss_of, rebuilt
from shoal.training.spec import RunSpec


def spec_of(stages: int, policy: str = "halt") -> RunSpec:
    values = round_spec(stages).model_dump()
    values["stages"] |= {"when_lost": policy}
    return RunSpec.model_validate(values)


async def trained(world: TrainerWorld, stages: int, height: int = 3) -> None:
    for number in range(stages):
        await world.add(number, number)
    await world.heights(height)


async def until_heard(replica: Replica, kind: str, limit_s: float = 30.0) -> dict[str, object]:
    async with asyncio.timeout(limit_s):
        while not replica.heard(kind):
            await asyncio.sleep(0.1)
    return replica.heard(kind)[0]


def test_a_lost_stage_waits_and_tells_until_who_held_it_is_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with TrainerWorld(spec_of(2), disk=tmp_path, slower=10.0) as world:
            await trained(world, 2)
            lost = (await world.kill(1)).trainer.outer
            joining = asyncio.create_task(world.add(5, 1))
            await asyncio.sleep(40.0)
            assert not joining.done(), "it must not begin at genesis"
            await world.add(1, 1)  # with its disk
            heir = await joining
            told = heir.heard("stage-lost")
            assert len(told) == 1
            assert "no peer, disk or checkpoint" in str(told[0]["text"])
            assert "shoal checkpoint" in str(told[0]["text"])
            assert heir.heard("stage-found")
            assert heir.trainer.outer.height >= lost.height
            await world.heights(lost.height + 2)

    virtual_time.run(main)


@pytest.mark.parametrize("policy", ["mean", "identity"])
def test_a_lost_stage_is_rebuilt_as_the_spec_says_once_for_all_who_come(policy: str) -> None:
    async def main() -> None:
        async with TrainerWorld(spec_of(4, policy), slower=10.0) as world:
            await trained(world, 4)
            await world.kill(2)
            tokens = max(replica.trainer.outer.tokens for replica in world.replicas.values())
            one, other = await asyncio.gather(world.add(6, 2), world.add(7, 2))
            rebuilds = [told for replica in (one, other) for told in replica.heard("stage-rebuilt")]
            assert [told["policy"] for told in rebuilds] == [policy]
            height = int(str(rebuilds[0]["height"]))
            assert height % world.spec.outer.snapshot_every == 0
            assert one.trainer.outer.tokens >= tokens, "the learning rate goes on where it was"
            await world.heights(height + 3)
            late = await world.add(8, 2)  # who joins long after reads in the log what happened
            await world.heights(late.trainer.outer.height + 2)
            group = (one, other, late)
            states = {r.trainer.outer.head: r.trainer.outer.state_root for r in group}
            assert all(states[r.trainer.outer.head] == r.trainer.outer.state_root for r in group)
            first = {r.trainer.outer.rebuilt for r in group}
            assert len(first) == 1
            (entry,) = first
            assert entry is not None
            assert (entry.stage, entry.policy, entry.height) == (2, policy, height)
            assert entry.peer in (one.peer, other.peer)
            assert len(entry.sources) == (2 if policy == "mean" else 0)
            assert policy in str(late.trainer.status()["outer"])
            assert world.replicas[0].trainer.outer.rebuilt is None, "of this stage alone"

    virtual_time.run(main)


def test_who_joins_amid_a_cut_does_not_rebuild_a_stage_that_the_other_side_holds() -> None:
    """What was: nothing told of its replicas once their records had lapsed, and after ten seconds it did."""

    async def main() -> None:
        async with TrainerWorld(spec_of(2, "mean"), slower=30.0) as world:
            await trained(world, 2, 1)
            first, other, joiner = world.replicas[0], world.replicas[1], world.make(5)
            for one in (first, joiner):
                world.network.cut(one.peer, other.peer)
            world.hub.cut(other.peer)
            await asyncio.sleep(limits.RECORD_TTL_S + 5.0)
            await joiner.start(1)
            met = {first.peer}
            await joiner.members.wait_for(lambda view: met <= {m.peer for m in view.here() if m.beat}, 15.0)
            recovering = asyncio.create_task(joiner.train_at(1, world._duration_s, RandomFeed(world.spec, 5)))
            await asyncio.sleep(SILENT_S - 20.0)
            assert not joiner.heard("stage-rebuilt")
            for one in (first, joiner):
                world.network.heal(one.peer, other.peer)
            world.hub.heal()
            await recovering
            assert not joiner.heard("stage-rebuilt")
            assert joiner.heard("stage-found")
            await joiner.kill()

    virtual_time.run(main)


def test_where_sessions_are_short_a_lost_stage_is_rebuilt_two_minutes_after_it_was_met_last() -> None:
    """What was: each newcomer waited its own two minutes, and none of them stayed for so long."""

    async def main() -> None:
        async with TrainerWorld(spec_of(3, "mean"), slower=30.0) as world:
            await trained(world, 3, 1)
            await world.kill(1)
            lost_s = asyncio.get_running_loop().time()
            await asyncio.sleep(limits.RECORD_TTL_S + 5.0)  # no newcomer knows who it was
            for number in range(5, 9):
                joiner = world.make(number)
                await joiner.start(1)
                recovering = asyncio.create_task(
                    joiner.train_at(1, world._duration_s, RandomFeed(world.spec, number))
                )
                await asyncio.wait([recovering], timeout=40.0)
                if joiner.heard("stage-rebuilt"):
                    break
                recovering.cancel()
                await joiner.kill()
            else:
                raise AssertionError("nobody rebuilt it")
            rebuilt_s = next(at_s for at_s, kind, _ in joiner.events if kind == "stage-rebuilt")
            assert SILENT_S - 2.0 <= rebuilt_s - lost_s <= SILENT_S + 15.0
            await joiner.kill()

    virtual_time.run(main)


def test_a_log_that_says_it_was_rebuilt_is_believed_only_under_its_own_head() -> None:
    run, digest = bytes(32), bytes(range(32))
    entry = Rebuilt(2, 8, "mean", 5, PeerId("p" * 46), (digest, digest), digest)
    state = LogState(2, 8, entry.head(run), 0, (), (), (), rebuilt=entry)
    check_beginning(run, state)
    check_beginning(run, dataclasses.replace(state, height=9, head=digest))  # entries came after it
    for lie in (
        dataclasses.replace(state, rebuilt=dataclasses.replace(entry, policy="identity")),
        dataclasses.replace(state, rebuilt=dataclasses.replace(entry, height=9)),
        dataclasses.replace(state, stage=1),
        dataclasses.replace(state, head=digest),
    ):
        with pytest.raises(MessageInvalid):
            check_beginning(run, lie)
    with pytest.raises(MessageInvalid):
        wire.encode(dataclasses.replace(entry, policy="halt"), 4096)


def test_rebuilt_layers_are_the_neighbours_mean_or_pass_on_what_they_get() -> None:
    spec = spec_of(4)
    layouts = [stage_layout(spec, layers) for layers in stage_ranges(spec)]
    before, lost, after = (genesis(spec, layout) for layout in layouts[:3])
    mean = rebuilt(layouts[1], lost, [(layouts[0], before), (layouts[2], after)])
    by_name = [{slot.name: slot for slot in layout.slots} for layout in layouts]
    for slot in layouts[1].slots:
        kind = slot.name.removeprefix("layers.1.")
        near = by_name[0][f"layers.0.{kind}"].view(before), by_name[2][f"layers.2.{kind}"].view(after)
        torch.testing.assert_close(slot.view(mean), (near[0] + near[1]) / 2)
    first = rebuilt(layouts[0], before, [(layouts[1], lost)])
    embedding = by_name[0]["embedding"]
    assert torch.equal(embedding.view(first), embedding.view(before)), "nobody else has one like it"
    identity = rebuilt(layouts[1], lost, ())
    zero = {slot.name for slot in layouts[1].slots if not slot.view(identity).any()}
    assert zero == {"layers.1.attention.o", "layers.1.feedforward.down"}


def test_a_stage_counts_as_lost_only_while_nobody_holds_it_and_the_run_has_entries() -> None:
    me = PeerId("me")

    def member(name: str, stage: int, height: int, **changes: object) -> Member:
        beat = Beat(stages=(StageBeat(stage, height=height, log_tokens=100 * height),))
        known = {"peer": PeerId(name), "stages": (stage,), "beat": beat, **changes}
        return Member(**known)  # type: ignore[arg-type]

    def lost(*members: Member, now_s: float = 10.0) -> bool | None:
        """None: it is not; else whether for good."""
        loss = loss_of(SwarmView(me, now_s, (member("me", 1, 0, state="joining"), *members)), 1)
        return loss.certain if loss is not None else None

    silent = {"liveness": Liveness.GONE, "heard_s": 5.0, "gone_s": 10.0}
    assert lost() is None
    assert lost(member("a", 0, 0)) is None
    assert lost(member("a", 0, 3)) is True
    assert lost(member("a", 0, 3), member("b", 1, 0)) is None, "a group that has made no entry yet"
    assert lost(member("a", 0, 3), member("b", 1, 0, state="joining")) is True
    assert lost(member("a", 0, 3), member("b", 1, 3, **silent)) is False, "it may thaw"
    assert lost(member("a", 0, 3), member("b", 1, 3, **silent), now_s=200.0) is True
    assert lost(member("b", 1, 3, departed=True, **silent)) is True
    never_heard = {"liveness": Liveness.GONE, "gone_s": 9.0, "beat": None}
    assert lost(member("a", 0, 3), member("b", 1, 3, **never_heard)) is False, "its record told of it"

    draining = member("b", 1, 0, state="draining")
    assert lost(member("a", 0, 3), draining) is None, "it has the stage until it is gone"
    assert lost(member("a", 0, 3), member("b", 1, 3, state="draining", **silent)) is False, "it may thaw"
    left = member("b", 1, 3, state="draining", departed=True, **silent)
    assert lost(member("a", 0, 3), left) is True
    loss = loss_of(SwarmView(me, 10.0, (member("a", 0, 3), left)), 1)
    assert loss is not None and loss.known, "who left in order was the last one: nobody else is waited for"

    liar = member(
        "z", 0, 2**53 - 1, beat=Beat(stages=(StageBeat(0, height=2**53 - 1, log_tokens=2**53 - 1),))
    )
    loss = loss_of(SwarmView(me, 10.0, (member("a", 0, 3), member("c", 0, 4), liar)), 1)
    assert loss is not None and 4 <= loss.height <= 1000 and 400 <= loss.log_tokens <= 100_000, "P5"
    assert lost(liar) is True

    guards = Beat(stages=(StageBeat(0, height=3),), guards=(StageBeat(1, height=3),))
    guardian = member("g", 0, 3, beat=guards)
    assert lost(guardian) is False, "a copy is about to be taken from it"
    assert lost(member("a", 0, 3), member("g", 0, 3, beat=guards, **silent)) is False, "it may thaw"
    assert lost(member("a", 0, 3), member("g", 0, 3, beat=guards, **silent), now_s=200.0) is True
    assert lost(member("a", 0, 3), member("g", 0, 3, beat=guards, departed=True, **silent)) is True
    elsewhere = Beat(stages=(StageBeat(0, height=3),), guards=(StageBeat(2, height=3),))
    assert lost(member("g", 0, 3, beat=elsewhere)) is True, "of another stage"
