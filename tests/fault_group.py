"""A group of real replicas to break: one process each, mutual TLS on loopback, real membership and rounds.

    async with FaultGroup(folder, nursery, 3) as group:
        await group.rounds(2)
        await group.arm("Commit.received kill", group.members[1])

Everything a worker tells is kept by its `Replica`. The ledger's oracle knows from the seed what each inner
step of each process added, reads the entries as they are committed, and so proves that every step is in once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from fault_ledger import ScalarLedger
from fault_orders import JsonObject, Order
from fault_processes import RUN, ProcessGroup
from fault_replica import Nursery, Replica

from shoal.protocol.amendments import Amendments, Setting, sign_amendments
from shoal.protocol.wire import encode
from shoal.training.outer.entry import Entry, parse
from shoal.training.outer.policy import succession
from shoal.training.spec import RunSpec

SIZE = 1 << 18  # values: 1 MiB, in sixteen parts
SEED = 1


def fault_spec(**sections: JsonObject) -> RunSpec:
    """Small parts, fp32 on the wire so that the oracle can count, rounds of two steps."""
    outer = {"inner_steps": 2, "part_bytes": 1 << 16, "round_deadline_s": 4.0, "snapshot_every": 4}
    codecs = {"contribution": "float32", "published": "float32"}
    return RunSpec.model_validate(
        {"outer": outer | sections.get("outer", {}), "compression": codecs | sections.get("compression", {})}
    )


class FaultGroup(ProcessGroup[Replica]):
    """The workers of one stage. Use as `async with`; they end with it."""

    def __init__(
        self,
        folder: Path,
        nursery: Nursery,
        replicas: int,
        spec: RunSpec | None = None,
        *,
        size: int = SIZE,
        seed: int = SEED,
        durable: bool = False,
        upload_bytes_per_s: float | None = None,
    ) -> None:
        super().__init__(folder, nursery, range(replicas), seed=seed)
        self._ordered = Amendments(RUN)
        self.spec = spec or fault_spec()
        self.size = size
        self._durable = durable
        self._upload_bytes_per_s = upload_bytes_per_s

    def order(self, number: int, incarnation: int) -> Order:
        return replace(
            self.plain_order(number, incarnation, self.spec),
            size=self.size,
            directory=str(self.folder / f"w{number}") if self._durable else None,
            upload_bytes_per_s=self._upload_bytes_per_s,
        )

    def replica(self, number: int, incarnation: int) -> Replica:
        return Replica(number, incarnation, self.seed)

    def leader(self) -> Replica:
        """Who leads the round to come, as long as all are there."""
        height = max(replica.height for replica in self.members) + 1
        first, *_ = succession(self.spec.run_id(), 0, height, sorted(r.peer for r in self.members))
        return next(replica for replica in self.members if replica.peer == first)

    # -- rounds

    async def step(self, replicas: Sequence[Replica] | None = None, count: int = 2) -> None:
        """Inner steps of each, enough for a round to be due."""
        stepping = list(replicas or self.awake())
        made = await asyncio.gather(*(replica.ask("step", count=count) for replica in stepping))
        for replica, answer in zip(stepping, made, strict=True):
            replica.steps = answer["inner_steps"]

    async def reach(
        self, height: int, replicas: Sequence[Replica] | None = None, limit_s: float = 60.0
    ) -> None:
        """Until all of them have committed up to this height."""
        waited = replicas or self.awake()
        await self.until(lambda: all(r.height >= height for r in waited), f"height {height}", limit_s)

    async def rounds(self, count: int) -> None:
        """Some rounds in which nothing happens."""
        for _ in range(count):
            height = max(replica.height for replica in self.awake())
            await self.step()
            await self.reach(height + 1)

    async def statuses(self, replicas: Sequence[Replica] | None = None) -> list[JsonObject]:
        """Of each."""
        return list(await asyncio.gather(*(r.ask("status") for r in replicas or self.awake())))

    async def amend(self, replicas: Sequence[Replica]) -> None:
        """The owner changes a setting, and these hear of it."""
        version = self._ordered.version + 1
        setting = Setting(version, "inner.learning_rate", 1e-3 / version)
        self._ordered = Amendments(RUN, version, settings=(setting,))
        signed = encode(sign_amendments(self._ordered, self.owner.sign)).hex()
        await asyncio.gather(*(replica.ask("order", signed=signed) for replica in replicas))

    # -- promises

    async def assert_equal(self, replicas: Sequence[Replica] | None = None) -> None:
        """P1: byte-equal heads, roots, anchors and momentum of these, or of all that are awake.

        A round may be under way still, where a machine that stood still left somebody's steps to it.
        """
        asked = replicas or self.awake()
        said: list[JsonObject] = []
        while len({status["head"] for status in said}) != 1:
            await self.until(lambda: len({replica.head for replica in asked}) == 1, "common head")
            said = await self.statuses(asked)
        keys = ("height", "head", "state_root", "anchor", "momentum")
        assert len({tuple(status[key] for key in keys) for status in said}) == 1, self.story()

    def entries(self) -> list[Entry]:
        """The log that ends at the members' head; what a lost peer decided alone is not in it."""
        told = {digest: data for life in self.lives for digest, data in life.entries.items()}
        chain: list[Entry] = []
        leading = max(self.awake(), key=lambda replica: replica.height)
        head, height = leading.head, leading.height
        while len(chain) < height:
            assert head in told, f"nobody told of entry {height - len(chain)}\n{self.story()}"
            chain.append(parse(told[head]))
            head = chain[-1].previous
        return chain[::-1]

    async def assert_every_step_is_in_once(self) -> None:
        """P4: the agreed state holds exactly the listed steps, local weights those beyond them."""
        paths = {replica: self.folder / f"w{replica.number}.tensors" for replica in self.awake()}
        await asyncio.gather(*(replica.ask("dump", path=str(path)) for replica, path in paths.items()))
        ledger = ScalarLedger(self.spec, self.size, self.seed, {r.peer: r.number for r in self.lives})
        ledger.read(self.entries())
        for replica, path in paths.items():
            anchor, weights = torch.load(path)
            ledger.check((replica.peer, replica.incarnation), replica.steps, anchor, weights)
