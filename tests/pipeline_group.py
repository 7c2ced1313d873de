"""A pipeline of real processes to break: three stages of two replicas, mutual TLS on loopback, real trainers.

    async with PipelineGroup(folder, nursery) as group:
        await group.arm("Gradient.sending kill", *group.of_stage(1))

Micro-batches go round all the time; `audit` lets those in flight finish, counts, and lets them go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fault_orders import JsonObject, Order
from fault_processes import ProcessGroup
from fault_replica import COMMAND_S, Nursery, Replica
from pipeline_audit import Account, Audit, Id, audit
from pipeline_table import STAGES

from shoal.training.checkpoint.manifest import CHECKPOINTS_FOLDER, numbered
from shoal.training.checkpoint.read import open_checkpoint, verify
from shoal.training.outer.policy import succession
from shoal.training.recovery.guardians import GUARDIANS
from shoal.training.spec import RunSpec

REPLICAS = 2
SPARE = STAGES * REPLICAS  # the number of who moves
SETTLE_S = 60.0  # the longest that a hop holds what nobody decides is half of it
LOOK_S = 0.1
STUTTER_S = 0.1  # of one who is slowed down: a part of it stopped, the rest running


def pipeline_spec(**sections: JsonObject) -> RunSpec:
    """A model of a few thousand parameters; an inner step every few micro-batches, a round every few s."""
    model: JsonObject = {"layers": 4, "width": 32, "heads": 4, "kv_heads": 2}
    model |= {"feedforward": 48, "sequence": 16}
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
            "model": model | sections.get("model", {}),
            "inner": inner | sections.get("inner", {}),
            "outer": outer | sections.get("outer", {}),
            "checkpoint": checkpoint | sections.get("checkpoint", {}),
            "stages": {"count": STAGES, "rebalance_window_s": 0.0} | sections.get("stages", {}),
        }
    )


class Reroute(NamedTuple):
    """A micro-batch whose replica had failed, as its caller tells."""

    handed_s: float  # when it was with the one that answered
    seconds: float  # from the failure, as the caller saw it, to the answer

    @classmethod
    def told(cls, data: JsonObject, at_s: float) -> Reroute:
        return cls(at_s - data["seconds"] + data["asked_s"], data["seconds"])


class PipelineReplica(Replica):
    """A worker of a stage, and what it told of its trainer."""

    def __init__(self, number: int, incarnation: int, seed: int, stage: int) -> None:
        super().__init__(number, incarnation, seed)
        self.stage = stage  # the last that it came to, or is about to
        self.decided_s = 0.0  # when all that was in flight at the last question was decided
        self.lost: set[tuple[int, int]] = set()  # (own incarnation, micro-batch)
        self.dropped: set[tuple[int, str, int]] = set()  # (stage, driver, micro-batch)
        self.reroutes: list[Reroute] = []
        self.told: list[tuple[float, str, JsonObject]] = []  # of moves: when, what
        self.left = False

    def heard(self, line: JsonObject) -> None:
        super().heard(line)
        match line.get("event"):
            case "decided":
                self.decided_s = line["at_s"]
            case "left":
                self.left = True
            case "stage":
                self.stage = line["stage"]
            case "told":
                self._heard_of(line["kind"], line["data"], line["at_s"])

    def _heard_of(self, kind: str, data: JsonObject, at_s: float) -> None:
        match kind:
            case "lost":
                self.lost.add((data["incarnation"], data["micro_batch"]))
            case "dropped":
                self.dropped.add((data["stage"], data["driver"], data["micro_batch"]))
            case "reroute":
                self.reroutes.append(Reroute.told(data, at_s))
            case "online" | "moving" | "prefetched" | "move-cut":
                self.told.append((at_s, kind, data))


class PipelineGroup(ProcessGroup[PipelineReplica]):
    """All workers; the number of one says its stage. One more, who moves, is at `spare_stage` at first."""

    def __init__(self, folder: Path, nursery: Nursery, spec: RunSpec | None = None, *, seed: int = 1) -> None:
        super().__init__(folder, nursery, range(STAGES * REPLICAS), seed=seed)
        self.spec = spec or pipeline_spec()
        self.spare_stage = 0
        self._settled: frozenset[Id] = frozenset()
        self._slow: list[asyncio.Task[None]] = []

    def order(self, number: int, incarnation: int) -> Order:
        return replace(
            self.plain_order(number, incarnation, self.spec),
            directory=str(self.disk_of(number)),
            stage=self._stage_of(number),
            moves=number == SPARE,
        )

    def replica(self, number: int, incarnation: int) -> PipelineReplica:
        return PipelineReplica(number, incarnation, self.seed, self._stage_of(number))

    def _stage_of(self, number: int) -> int:
        return self.spare_stage if number == SPARE else number // REPLICAS

    @property
    def spare(self) -> PipelineReplica | None:
        """Who moves, while it lives."""
        return next((replica for replica in self.members if replica.number == SPARE), None)

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

    # -- blows from outside

    async def kill_all(self, replicas: Sequence[PipelineReplica]) -> None:
        """SIGKILL, after an account of what each did; returns when they are gone."""
        await asyncio.gather(*(replica.ask("die") for replica in replicas), return_exceptions=True)
        await self.until(lambda: all(replica.ended for replica in replicas), "end of who was killed")

    async def release(self, held: Sequence[PipelineReplica]) -> None:
        """Who stood at a point, and seemed frozen, goes on."""
        for replica in held:
            replica.frozen = False
        await self.ask_all("release", held)

    def freeze(self, *replicas: PipelineReplica) -> None:
        """SIGSTOP."""
        for replica in replicas:
            replica.signal(signal.SIGSTOP)

    def throttle(self, *replicas: PipelineReplica) -> None:
        """Let these run a tenth of the time, whatever they do, and nobody else any more."""
        for slow in self._slow:
            slow.cancel()
        self._slow = [asyncio.create_task(stutter(replica.pid)) for replica in replicas]

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

    async def high(self, stage: int, height: int) -> None:
        """Until a replica of a stage has a log of this height."""
        while True:
            said = await self._accounts(self.of_stage(stage))
            if any(account.get("height", 0) >= height for account in said):
                return
            await asyncio.sleep(LOOK_S)

    async def led_next(self, stage: int, leaders: Sequence[PipelineReplica], limit_s: float = 60.0) -> None:
        """Until a stage has just ended a round, and one of these is the first to open the next one."""
        here = self.of_stage(stage)
        peers = [replica.peer for replica in here]
        common: int | None = None  # the last height at which all of them stood
        async with asyncio.timeout(limit_s):
            while True:
                heights = {account.get("height", 0) for account in await self._accounts(here)}
                if len(heights) == 1:
                    before, common = common, heights.pop()
                    first = succession(self.spec.run_id(), stage, common + 1, peers)[0]
                    if before not in (None, common) and any(one.peer == first for one in leaders):
                        return
                await asyncio.sleep(LOOK_S)

    async def guarded(self, stage: int, limit_s: float = 60.0) -> None:
        """Until a stage has its guardians: two peers of other stages with a copy of its log's head."""
        async with asyncio.timeout(limit_s):
            while True:
                awake = self.awake()
                said = [account for account in await self._accounts(awake) if account["stage"] is not None]
                height = max(account["height"] for account in said if account["stage"] == stage)
                copies = [account["guards"].get(str(stage), 0) for account in said]
                if sum(copy >= height > 0 for copy in copies) >= GUARDIANS:
                    return
                await asyncio.sleep(LOOK_S)

    async def audit(self) -> Audit:
        """P1 and P2, at a moment when nothing is under way. Raises AssertionError when it does not come."""
        await self.ask_all("pause", paused=True)
        said = await self._quiet()
        await self._assert_equal(said)
        accounts = [account for life in self.lives for account in self._accounts_of(life, said.get(life))]
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
                    busy += [a for a in said.values() if a["stage"] is None or a["state"] != "online"]
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
        heads = {(account["stage"], account["head"]) for account in said.values()}
        return len(heads) == len({stage for stage, _ in heads})

    async def _assert_equal(self, said: dict[PipelineReplica, JsonObject]) -> None:
        keys = ("stage", "height", "head", "state_root", "anchor")
        states = {tuple(account[key] for key in keys) for account in said.values()}
        assert len(states) == STAGES, f"replicas of a stage differ: {states}"

    def _accounts_of(self, life: PipelineReplica, said: JsonObject | None) -> list[Account]:
        """Of each stage that it had. Of a life that is over: the last it wrote."""
        path = self.folder / f"w{life.number}-{life.incarnation}.account"
        if said is None:
            assert path.exists(), f"{life} ended without an account\n{self.story()}"
            said = json.loads(path.read_text())
        return [
            Account(
                f"{life} at {(stage := term['stage'])}",
                stage,
                term["applied"],
                frozenset(number for incarnation, number in life.lost if incarnation == term["incarnation"]),
                frozenset((driver, number) for at, driver, number in life.dropped if at == stage),
                f"{life.peer}/{term['incarnation']}",
            )
            for term in said["terms"]
        ]


async def stutter(pid: int) -> None:
    """A process runs a tenth of the time until this is cancelled, or it ends."""
    with contextlib.suppress(ProcessLookupError):
        try:
            while True:
                os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(0.9 * STUTTER_S)
                os.kill(pid, signal.SIGCONT)
                await asyncio.sleep(0.1 * STUTTER_S)
        finally:
            os.kill(pid, signal.SIGCONT)


def _count(account: JsonObject) -> int:
    return int(account["micro_batches"])


def _without_ids(account: JsonObject) -> JsonObject:
    return {key: value for key, value in account.items() if key not in ("terms", "reroutes_s")}
