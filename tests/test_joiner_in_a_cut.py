"""Who joins one side of a cut knows no more of the other side than its log tells."""

from __future__ import annotations

import asyncio
import itertools

from trainer_world import RandomFeed, TrainerWorld, round_spec

from shoal.protocol import limits, virtual_time
from shoal.training.outer.policy import SILENT_S

HERE, THERE, JOINER = (0, 1), (2, 3, 4), 5


def test_a_joiner_does_not_take_those_it_never_met_for_departed() -> None:
    """What was: it led the smaller side at once, though the larger one went on, and read a stream of it."""

    async def main() -> None:
        async with TrainerWorld(round_spec(1), slower=20.0) as world:
            for number in (*HERE, *THERE):
                await world.add(number, 0)
            await world.heights(3)
            joiner = world.make(JOINER)
            ours = [*(world.replicas[number] for number in HERE), joiner]
            theirs = [world.replicas[number] for number in THERE]
            for one, other in itertools.product(ours, theirs):
                world.network.cut(one.peer, other.peer)
            for replica in theirs:
                world.hub.cut(replica.peer)
            cut_s = asyncio.get_running_loop().time()
            await asyncio.sleep(limits.RECORD_TTL_S + 5.0)  # nothing tells of them any more
            before = max(world.replicas[number].trainer.outer.height for number in HERE)
            assert all(replica.trainer.outer.height > before for replica in theirs)
            await joiner.start(0)
            here = {world.replicas[number].peer for number in HERE}
            await joiner.members.wait_for(lambda view: here <= {m.peer for m in view.here() if m.beat}, 15.0)
            world.replicas[JOINER] = joiner
            feed = RandomFeed(world.spec, JOINER)
            await joiner.train_at(0, world._duration_s, feed)
            joiner.task = asyncio.create_task(joiner.run())
            assert asyncio.get_running_loop().time() < cut_s + SILENT_S / 2
            await asyncio.sleep(cut_s + SILENT_S - 1.0 - asyncio.get_running_loop().time())
            assert {replica.trainer.outer.height for replica in ours} == {before}
            assert feed.reads().keys() == {JOINER}, "the others are read on the other side"
            async with asyncio.timeout(SILENT_S):  # then the log may fork
                await asyncio.gather(*(replica.reach(before + 1) for replica in ours))

    virtual_time.run(main)
