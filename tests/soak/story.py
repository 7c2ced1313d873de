"""One seed of the soak: a group, its links, and a story of faults, drawn and told in virtual time.

Promises checked: P3 at every act that leaves a connected majority (it commits again within COMMITS_S), P1
and P4 at the end, when everything is healed and thawed: equal bits, and by the scalar ledger every step of
whoever lives is in once. Nothing here but `random.Random(seed)` decides anything, so a seed is a story.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fault_table import all_cases
from outer_faults import Faults
from outer_world import Node, round_spec
from partition_world import PartitionWorld

from shoal.protocol.errors import ShoalError
from shoal.protocol.faults import Action, Arming
from shoal.protocol.identity import PeerId
from shoal.protocol.memory_transport import Link
from shoal.protocol.virtual_time import Deadlock, TimeLimit, run
from shoal.training.spec import RunSpec

LIMIT_S = 3000.0  # virtual
COMMITS_S = 60.0  # a connected majority commits again within this, whatever happened
SETTLES_S = 300.0  # after the last heal: forks are resolved, lost entries are back
MEMORY = next((path for path in ("/dev/shm",) if os.path.isdir(path)), None)  # no story outlives the machine
SILENT_S = 20.0  # until a silent peer counts as departed; 120 outside, which is only longer
STEP_S = 2.0
PEERS = (*[3] * 6, *[4] * 6, *[5] * 4, 6, 6, 7, 7, 8, 8, 9, 10, 11, 12)
CODECS = (
    ("float32", "float32"),
    ("layers", "layers"),
    *[("float32", "float32")] * 3,
    ("int8", "int8"),
    ("int4", "int8"),
    ("onebit", "int8"),
    ("topk8", "int8"),
)
ACTS = ("kill", "two", "freeze", "message", "message", "message", "cut", "cut", "long cut", "join", "restart")
# A peer that breaks a decision or a contribution itself lies: audits find that, not rounds.
_UNTRUE = {"ContributedPart", "Prepare", "Answer", "Go", "Commit"}
CASES = [
    case
    for case in all_cases()
    if not case.needs_guardian and (case.action is not Action.CORRUPT or case.message not in _UNTRUE)
]


class Broken(AssertionError):
    """A promise was not kept."""


class Story:
    """One seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.faults = Faults(seed)
        self.told: list[str] = []
        self.folder: Path | None = None
        self._joining: dict[PeerId, asyncio.Event] = {}  # set when it is struck before it is there
        self._numbers = 20  # of those who join

    def spec(self) -> RunSpec:
        rng = self.rng
        contribution, published = rng.choice(CODECS)
        outer = {
            "inner_steps": rng.randint(2, 6),
            "fragments": rng.randint(1, 4),
            "part_bytes": 1024,
            "snapshot_every": rng.choice([2, 4, 8]),
            "round_deadline_s": rng.choice([2.0, 4.0]),
        }
        codecs = {"contribution": contribution, "published": published, "warmup_rounds": 2}
        return round_spec(outer=outer, compression=codecs)

    async def tell(self) -> str:
        rng, spec = self.rng, self.spec()
        count = rng.choice(PEERS)
        durable = rng.random() < 0.15
        world = PartitionWorld(
            0,
            spec,
            seed=self.seed,
            size=256 * max(4, spec.outer.fragments),
            wrap=self.faults.wrap,
            silent_s=SILENT_S,
        )
        self._note(f"{count} peers, {spec.outer.fragments} fragments, {spec.compression.contribution}")
        if durable:
            self.folder = Path(tempfile.mkdtemp(prefix="soak-", dir=MEMORY))
        async with world:
            for number in range(count):
                await self._start(world, number, 1)
            self._draw_links(world)
            await world.train(3 * STEP_S, STEP_S)
            for _ in range(rng.randint(2, 4)):
                await self._act(world, rng.choice(ACTS))
            await self._end(world)
        return "fork" if any(kind == "fork" for node in world.nodes for kind, _ in node.events) else "ok"

    def _note(self, what: str) -> None:
        self.told.append(what)

    # -- acts

    async def _act(self, world: PartitionWorld, act: str) -> None:
        rng = self.rng
        awake = [node for node in world.live.values() if node.name not in world.frozen]
        now_s = asyncio.get_running_loop().time()
        self._note(f"{now_s:.1f} s {act}")
        match act:
            case "kill" | "two":
                for node in rng.sample(awake, min(1 + (act == "two"), (len(awake) - 1) // 2)):
                    world.kill(node)
                await self._commits(world)
            case "freeze" if (len(awake) - 1) // 2:
                node = rng.choice(awake)
                world.freeze(node)
                await self._commits(world)
                await world.train(rng.choice([2.0, 8.0, 0.5 * SILENT_S]), STEP_S)
                world.thaw(node)
            case "message" if (len(awake) - 1) // 2:
                self._arm(world)
                await self._commits(world)
            case "cut" | "long cut":
                await self._cut(world, awake, act == "long cut")
            case "join" if len(awake) < 12:
                self._numbers += 1
                await self._start(world, self._numbers, 1)
                await self._commits(world)
            case "restart" if (len(awake) - 1) // 2:
                node = rng.choice(awake)
                world.kill(node)
                await world.train(rng.random() * 5, STEP_S)
                await self._start(world, int(node.name[9:11]), node.incarnation + 1)
                await self._commits(world)

    def _arm(self, world: PartitionWorld) -> None:
        case = self.rng.choice(CASES)
        delay_s = self.rng.choice([0.3, 3.0]) if case.action is Action.DELAY else 0.0
        arming = Arming(case.point, case.action, nth=self.rng.randint(1, 6), seconds=delay_s)
        self._note(f"  {arming}")
        frozen = case.action is Action.FREEZE

        def strike(peer: PeerId) -> None:
            if peer in self._joining:
                self._joining[peer].set()
            node = world.live.get(peer)
            if node is None or peer in world.frozen:
                return
            self._note(f"  {asyncio.get_running_loop().time():.1f} s struck {peer[8:11]}")
            if frozen:
                world.freeze(node)
                asyncio.get_running_loop().call_later(0.7 * SILENT_S, self._thaw, world, node)
            else:
                world.kill(node)

        self.faults.disarm()
        self.faults.arm_also(arming, strike)

    def _thaw(self, world: PartitionWorld, node: Node) -> None:
        if node.name in world.frozen:
            world.thaw(node)
        self.faults.wake()

    async def _cut(self, world: PartitionWorld, awake: Sequence[Node], long: bool) -> None:
        rng = self.rng
        nodes = rng.sample(awake, len(awake))
        first = rng.randint(1, len(nodes) - 1)
        sides = [nodes[:first], nodes[first:]]
        if long and len(sides[1]) > 1 and rng.random() < 0.25:
            middle = rng.randint(1, len(sides[1]) - 1)
            sides = [sides[0], sides[1][:middle], sides[1][middle:]]
        self._note(f"  sides {[[node.name[8:11] for node in side] for side in sides]}")
        await world.train(rng.random() * 3, STEP_S)
        world.cut(*sides)
        await world.train(
            rng.uniform(1.3, 2.5) * SILENT_S if long else rng.uniform(1.0, 0.8 * SILENT_S), STEP_S
        )
        world.heal()
        if rng.random() < 0.5:
            await world.settle(SETTLES_S, STEP_S)

    # -- checks

    async def _commits(self, world: PartitionWorld) -> None:
        """P3: those who live and are awake commit once more, all of them."""
        awake = [node for node in world.live.values() if node.name not in world.frozen]
        height = max(node.outer.height for node in awake)
        loop = asyncio.get_running_loop()
        begin_s = loop.time()

        def behind() -> list[Node]:
            here = [n for n in world.live.values() if n in awake and n.name not in world.frozen]
            return [node for node in here if node.outer.height <= height]

        while slow := behind():
            if loop.time() - begin_s > COMMITS_S:
                raise Broken(f"no commit for {COMMITS_S:g} s at {[node.name[8:11] for node in slow]}")
            await world.train(0.5, STEP_S)

    async def _end(self, world: PartitionWorld) -> None:
        self.faults.disarm()
        self.faults.wake()
        for peer in list(world.frozen):
            world.thaw(world.live[peer])
        self._note(f"{asyncio.get_running_loop().time():.1f} s end")
        await world.settle(SETTLES_S, STEP_S)
        for _ in range(world.spec.outer.fragments + 1):
            await self._commits(world)
        await world.settle(COMMITS_S, STEP_S)
        try:
            world.prove(anchor=False)
            world.assert_nothing_is_lost()
        except AssertionError as error:
            raise Broken(str(error)) from error

    # -- the world

    async def _start(self, world: PartitionWorld, number: int, incarnation: int) -> None:
        folder = self.folder / str(number) if self.folder else None
        node = world.node(number, incarnation, folder)
        struck = self._joining[node.name] = asyncio.Event()
        tasks = [asyncio.create_task(node.start()), asyncio.create_task(struck.wait())]
        done, _ = await asyncio.wait(tasks, timeout=COMMITS_S, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        found, _ = await asyncio.gather(*tasks, return_exceptions=True)
        del self._joining[node.name]
        if struck.is_set():
            self._note("  struck before it had joined")
            world.kill(node)
            return
        world.nodes.append(node)
        if not done or isinstance(found, ShoalError):
            raise Broken(f"{node.name[8:11]} cannot join: {found!r}")
        if isinstance(found, BaseException):
            raise found

    def _draw_links(self, world: PartitionWorld) -> None:
        rng, names = self.rng, [node.name for node in world.nodes]
        for i, one in enumerate(names):
            for other in names[i + 1 :]:
                latency_s, rate = rng.choice([0.001, 0.02, 0.1]), rng.choice([1e5, 1e6, 1e8])
                world.network.set_link(one, other, Link(latency_s, rate, rng.choice([0.0, 0.0, 0.02])))


def outcome(seed: int) -> tuple[int, str, list[str]]:
    """(seed, what came of it, the story)."""
    story = Story(seed)
    try:
        return seed, run(story.tell, limit_s=LIMIT_S), story.told
    except (AssertionError, Deadlock, TimeLimit) as error:
        return seed, f"FAILED: {type(error).__name__}: {str(error)[:600]}", story.told
    finally:
        if story.folder is not None:
            shutil.rmtree(story.folder, ignore_errors=True)
