"""A pipeline of real processes to break: three stages of two replicas, mutual TLS on loopback, real trainers.

    async with PipelineGroup(folder, nursery) as group:
        await group.arm("Gradient.sending kill", *group.of_stage(1))

Micro-batches go round all the time; `audit` lets those in flight finish, counts, and lets them go on.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fault_orders import JsonObject, Order
from fault_processes import ProcessGroup
from fault_replica import COMMAND_S, Nursery, Replica
from pipeline_audit import Account, Audit, Id, audit
from pipeline_table import STAGES

from shoal.training.checkpoint.manifest import CHECKPOINTS_FOLDER, numbered
from shoal.training.checkpoint.read import open_checkpoint, verify
from shoal.training.recovery.guardians import GUARDIANS
from shoal.training.spec import RunSpec

REPLICAS = 2
SETTLE_S = 60.0  # the longest that a hop holds what nobody decides is half of it
LOOK_S = 0.1


def pipeline_spec(**sections: JsonObject) -> RunSpec:
    """A model of a few thousand parameters; an inner step every few micro-batches, a round every few s."""
    model = {"layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "feedforward": 48, "sequence": 16}
    inner = {
        "optimizer": "sgd",
        "learning_rate": 0.05,
        "micro_batch_sequences": 2,
        "inner_tokens": 128,
        "warmup_tokens": 0,
        "in_flight": 4,
    }
    outer = {"inner_steps": 8, "part_bytes": 4096, "snapshot_every": 4, "round_deadline_s": 4.0}
    checkpoint = {"every_s": 0.0}
    return RunSpec.model_validate(
        {
            "model": model,
            "inner": inner | sections.get("inner", {}),
            "outer": outer | sections.get("outer", {}),
            "checkpoint": checkpoint | sections.get("checkpoint", {}),
            "stages": {"count": STAGES, "rebalance_window_s": 0.0},
        }
    )


class PipelineReplica(Replica):
    """A worker of a stage, and what it told of its trainer."""

    def __init__(self, number: int, incarnation: int, seed: int) -> None:
        super().__init__(number, incarnation, seed)
        self.stage = number // REPLICAS
        self.decided_s = 0.0  # when all that was in flight at the last question was decided
        self.lost: set[int] = set()
        self.dropped: set[tuple[str, int]] = set()
        self.reroutes_s: list[float] = []
        self.left = False

    def heard(self, line: JsonObject) -> None:
        super().heard(line)
        match line.get("event"):
            case "decided":
                self.decided_s = line["at_s"]
            case "left":
                self.left = True
            case "told" if line["kind"] == "lost":
                self.lost.add(line["data"]["micro_batch"])
            case "told" if line["kind"] == "dropped":
                self.dropped.add((line["data"]["driver"], line["data"]["micro_batch"]))
            case "told" if line["kind"] == "reroute":
                self.reroutes_s.append(line["data"]["seconds"])


class PipelineGroup(ProcessGroup[PipelineReplica]):
    """All workers; the number of one says its stage."""

    def __init__(self, folder: Path, nursery: Nursery, spec: RunSpec | None = None, *, seed: int = 1) -> None:
        super().__init__(folder, nursery, range(STAGES * REPLICAS), seed=seed)
        self.spec = spec or pipeline_spec()
        self._settled: frozenset[Id] = frozenset()

    def order(self, number: int, incarnation: int) -> Order:
        return replace(
            self.plain_order(number, incarnation, self.spec),
            directory=str(self.disk_of(number)),
            stage=number // REPLICAS,
        )

    def replica(self, number: int, incarnation: int) -> PipelineReplica:
        return PipelineReplica(number, incarnation, self.seed)

    def disk_of(self, number: int) -> Path:
        """A worker's folder, in all of its lives."""
        return self.folder / f"w{number}"

    def of_stage(self, stage: int) -> list[PipelineReplica]:
        """Who lives, frozen or not."""
        return [replica for replica in self.members if replica.stage == stage]

    def drivers(self) -> list[PipelineReplica]:
        """Those that run."""
        return [replica for replica in self.awake() if replica.stage == 0]

    async def ask_all(
        self, do: str, replicas: Sequence[PipelineReplica] | None = None, **named: float
    ) -> None:
        """Of each that runs, or of some."""
        asked = self.awake() if replicas is None else replicas
        await asyncio.gather(*(replica.ask(do, limit_s=COMMAND_S, **named) for replica in asked))

    # -- promises

    async def at_work(self, replicas: Sequence[PipelineReplica], limit_s: float = 60.0) -> None:
        """Until each of these has applied something more. Raises AssertionError with everybody's story."""
        before = dict(zip(replicas, await self._accounts(replicas), strict=True))
        idle = list(replicas)
        try:
            async with asyncio.timeout(limit_s):
                while idle:
                    await asyncio.sleep(LOOK_S)
                    said = zip(idle, await self._accounts(idle), strict=True)
                    idle = [life for life, account in said if _count(account) <= _count(before[life])]
        except TimeoutError:
            names = ", ".join(map(str, idle))
            raise AssertionError(f"{names} did nothing for {limit_s:g} s\n{self.story()}") from None

    async def guarded(self, stage: int, limit_s: float = 60.0) -> None:
        """Until a stage has its guardians: two peers of other stages with a copy of its log's head."""
        async with asyncio.timeout(limit_s):
            while True:
                awake = self.awake()
                said = dict(zip(awake, await self._accounts(awake), strict=True))
                height = max(account["height"] for life, account in said.items() if life.stage == stage)
                copies = [account["guards"].get(str(stage), 0) for account in said.values()]
                if sum(copy >= height > 0 for copy in copies) >= GUARDIANS:
                    return
                await asyncio.sleep(LOOK_S)

    async def audit(self) -> Audit:
        """P1 and P2, at a moment when nothing is under way. Raises AssertionError when it does not come."""
        await self.ask_all("pause", paused=True)
        said = await self._quiet()
        await self._assert_equal(said)
        accounts = [self._account(life, said.get(life)) for life in self.lives]
        found = audit(accounts, STAGES, self._settled)
        self._settled |= frozenset[Id]().union(*(account.ids() for account in accounts))
        await self.ask_all("pause", paused=False)
        return found

    def assert_checkpoints_are_whole(self) -> None:
        """P4: whatever was written under a checkpoint's name can be read. Raises StorageError."""
        for folder in self.folder.glob(f"w*/{CHECKPOINTS_FOLDER}"):
            for _, path in numbered(folder):
                verify(open_checkpoint(path))

    async def _quiet(self) -> dict[PipelineReplica, JsonObject]:
        """What all say once nothing is in flight, undecided or owed, and no round is under way."""
        said: dict[PipelineReplica, JsonObject] = {}
        try:
            async with asyncio.timeout(SETTLE_S):
                while True:
                    awake = self.awake()
                    said = dict(zip(awake, await self._accounts(awake), strict=True))
                    busy = [a for a in said.values() if a["in_flight"] or a["owed"] or a["undecided"]]
                    if not busy and self._common(said):
                        return said
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            shown = "\n".join(f"{life}: {_without_ids(account)}" for life, account in said.items())
            raise AssertionError(f"not quiet within {SETTLE_S:g} s\n{shown}\n{self.story()}") from None

    async def _accounts(self, replicas: Sequence[PipelineReplica]) -> list[JsonObject]:
        found = await asyncio.gather(*(replica.ask("account") for replica in replicas))
        return [{"in_flight": 0, "owed": 0, "undecided": 0, **account} for account in found]

    @staticmethod
    def _common(said: dict[PipelineReplica, JsonObject]) -> bool:
        heads = {(life.stage, account["head"]) for life, account in said.items()}
        return len(heads) == len({stage for stage, _ in heads})

    async def _assert_equal(self, said: dict[PipelineReplica, JsonObject]) -> None:
        keys = ("height", "head", "state_root", "anchor")
        states = {(life.stage, *(account[key] for key in keys)) for life, account in said.items()}
        assert len(states) == STAGES, f"replicas of a stage differ: {states}"

    def _account(self, life: PipelineReplica, said: JsonObject | None) -> Account:
        """Of a life that is over: the last it wrote."""
        path = self.folder / f"w{life.number}-{life.incarnation}.account"
        if said is None:
            assert path.exists(), f"{life} ended without an account\n{self.story()}"
            said = json.loads(path.read_text())
        return Account(
            str(life),
            life.stage,
            said["applied"],
            frozenset(life.lost),
            frozenset(life.dropped),
            f"{life.peer}/{life.incarnation}",
        )


def _count(account: JsonObject) -> int:
    return int(account["micro_batches"])


def _without_ids(account: JsonObject) -> JsonObject:
    return {key: value for key, value in account.items() if key not in ("applied", "reroutes_s")}
