"""Random faults against rounds, in virtual time: `python tests/soak/rounds.py --seeds 0-500`.

Each seed draws a group, its links and a story of steps, kills, freezes at named messages, joins and wakes. At
the end the group must commit again, hold equal bits (P1) and have every step in once (P4). A freeze is a cut
here (the process runs on), so both sides may commit; such a fork must heal, lost entries are only counted.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from outer_faults import Faults
from outer_world import Node, World

from shoal.protocol.errors import ShoalError
from shoal.protocol.identity import PeerId
from shoal.protocol.memory_transport import Link
from shoal.protocol.virtual_time import Deadlock, TimeLimit, run
from shoal.training.outer import messages

KINDS = [
    *(messages.Prepare, messages.Answer, messages.Go, messages.Gone, messages.Report, messages.Commit),
    *(messages.Done, messages.Contributing, messages.ContributedPart, messages.Publishing),
    *(messages.PublishedPart, messages.PartRequest, messages.EntriesRequest, messages.EntryItem),
]
ACTS = ("steps", "kill", "kill-at", "freeze-at", "thaw", "join")
LIMIT_S = 4000.0


class Story:
    """One seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.faults = Faults()
        self.told: list[object] = []

    async def tell(self) -> str:
        rng = self.rng
        async with World(rng.randint(2, 6), seed=self.seed, size=3000, wrap=self.faults.wrap) as world:
            self._draw_links(world)
            for _ in range(rng.randint(3, 8)):
                await self._act(world, rng.choice(ACTS))
                for _ in range(rng.randint(1, 4)):
                    for node in list(world.live.values()):
                        if node.name not in world.frozen and rng.random() < 0.8:
                            node.step(rng.randint(50, 200))
                    await asyncio.sleep(rng.random() * 2)
            self.faults.disarm()
            self._thaw(world)
            await asyncio.sleep(6)
            await world.rounds(3)
            await asyncio.sleep(3)
            return self._verdict(world)

    def _draw_links(self, world: World) -> None:
        rng, names = self.rng, [node.name for node in world.nodes]
        for i, one in enumerate(names):
            for other in names[i + 1 :]:
                latency_s, rate = rng.choice([0.001, 0.02, 0.1]), rng.choice([1e5, 1e6, 1e8])
                world.network.set_link(one, other, Link(latency_s, rate, rng.choice([0.0, 0.0, 0.02])))

    async def _act(self, world: World, act: str) -> None:
        rng = self.rng
        awake = [node for node in world.live.values() if node.name not in world.frozen]
        self.told.append((round(asyncio.get_running_loop().time(), 2), act))
        if act == "kill" and len(awake) > 2:
            world.kill(rng.choice(awake))
        elif act in ("kill-at", "freeze-at") and len(awake) > 2:
            kind, point = rng.choice(KINDS), rng.choice(["before", "after", "receiving"])
            freeze = act == "freeze-at" and not world.frozen
            self.told.append((kind.__name__, point))
            self.faults.arm(
                kind, point, lambda peer: self._strike(world, peer, freeze), count=rng.randint(1, 4)
            )
        elif act == "thaw":
            self._thaw(world)
        elif act == "join" and len(awake) < 7:
            node = world.node(10 + len(world.nodes))
            world.nodes.append(node)
            try:
                async with asyncio.timeout(60):
                    await node.start()
            except (ShoalError, TimeoutError) as error:
                self.told.append(("join failed", str(error)[:200]))

    def _strike(self, world: World, peer: PeerId, freeze: bool) -> None:
        node = newest(world, peer)
        self.told.append(("hit", peer[8:11]))
        if freeze and peer in world.live:
            world.freeze(node)
        else:
            world.kill(node)

    def _thaw(self, world: World) -> None:
        for peer in list(world.frozen):
            world.thaw(newest(world, peer))
        self.faults.wake()

    def _verdict(self, world: World) -> str:
        if not world.equal():
            raise AssertionError("heads or states differ")
        try:
            world.assert_every_step_is_in_once()
        except AssertionError:
            events = [data for node in world.processes.values() for _, data in node.events]
            if any("a fork" in str(data.get("why")) for data in events):
                return "healed fork"
            raise
        return "ok"


def newest(world: World, peer: PeerId) -> Node:
    return [node for node in world.processes.values() if node.name == peer][-1]


def outcome(seed: int) -> str:
    story = Story(seed)
    try:
        return run(story.tell, limit_s=LIMIT_S)
    except (AssertionError, TimeoutError, Deadlock, TimeLimit) as error:
        print(f"seed {seed}: {str(error)[:300] or 'no round within 60 s'}\n  {story.told}")
        return "FAILED"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0-100", help="first-last, the last one not included")
    first, last = map(int, parser.parse_args().seeds.split("-"))
    counts = Counter(outcome(seed) for seed in range(first, last))
    print(dict(counts))
    raise SystemExit(1 if counts["FAILED"] else 0)


if __name__ == "__main__":
    main()
