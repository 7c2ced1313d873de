"""A group of real replicas to break: one process each, mutual TLS on loopback, real membership and rounds.

    async with FaultGroup(folder, nursery, 3) as group:
        await group.rounds(2)
        await group.arm("Commit.received kill", group.members[1])

Everything a worker tells is kept by its `Replica`. The ledger's oracle knows from the seed what each inner
step of each process added, reads the entries as they are committed, and so proves that every step is in once.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from fault_ledger import ScalarLedger
from fault_orders import LINE_BYTES, JsonObject, Order
from fault_replica import Nursery, Replica
from fault_story import story, waits

from shoal.protocol.admission import OwnerKey
from shoal.protocol.identity import Role
from shoal.training.outer.entry import Entry, parse
from shoal.training.outer.policy import succession
from shoal.training.spec import RunSpec

SIZE = 1 << 18  # values: 1 MiB, in sixteen parts
RUN = bytes(range(32))
SEED = 1


def fault_spec(**sections: JsonObject) -> RunSpec:
    """Small parts, fp32 on the wire so that the oracle can count, rounds of two steps."""
    outer = {"inner_steps": 2, "part_bytes": 1 << 16, "round_deadline_s": 4.0, "snapshot_every": 4}
    codecs = {"contribution": "float32", "published": "float32"}
    return RunSpec.model_validate(
        {"outer": outer | sections.get("outer", {}), "compression": codecs | sections.get("compression", {})}
    )


class FaultGroup:
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
        self.spec = spec or fault_spec()
        self.size = size
        self.seed = seed
        self.lives: list[Replica] = []  # all there ever were
        self._folder = folder
        self._nursery = nursery
        self._replicas = replicas
        self._durable = durable
        self._upload_bytes_per_s = upload_bytes_per_s
        self._news = asyncio.Event()
        self._claims = itertools.count()
        self._listening: set[asyncio.Task[None]] = set()
        now = time.time()
        owner = OwnerKey.create(folder / "owner", RUN, "faults", now)
        self._token = owner.issue_token([Role.TRAINER], 86_400.0, (), "worker", now).encode()

    async def __aenter__(self) -> FaultGroup:
        self._server = await asyncio.start_unix_server(
            self._connected, self._folder / "socket", limit=LINE_BYTES
        )
        await self.start(*range(self._replicas))
        return self

    async def __aexit__(self, *_: object) -> None:
        for replica in self.lives:
            if not replica.ended and replica.pid:
                replica.signal(signal.SIGKILL)
        if self._listening:
            await asyncio.wait(self._listening)
        self._server.close()
        await self._server.wait_closed()

    # -- life and death

    async def start(self, *numbers: int, arming: str | None = None) -> list[Replica]:
        """Start workers, each as its next incarnation; they have joined when this returns.

        Raises ConnectionError for one that what was armed in it has killed.
        """
        newcomers = [await self._fork(number) for number in numbers]
        await self.until(lambda: all(r.pid or r.ended for r in newcomers), "workers to start")
        if arming is not None:
            await self.arm(arming, *newcomers)
        known = {replica: (await replica.ask("record"))["record"] for replica in self.awake()}
        joining = (
            replica.ask("join", records=[record for of, record in known.items() if of is not replica])
            for replica in newcomers
        )
        await asyncio.gather(*joining)
        await self.meet()
        return newcomers

    async def _fork(self, number: int) -> Replica:
        replica = Replica(number, 1 + sum(life.number == number for life in self.lives), self.seed)
        self.lives.append(replica)
        self._nursery.fork(
            Order(
                socket=str(self._folder / "socket"),
                errors=str(self._folder / f"w{number}.errors"),
                number=number,
                incarnation=replica.incarnation,
                seed=self.seed,
                token=self._token,
                spec=self.spec.model_dump(mode="json"),
                size=self.size,
                directory=str(self._folder / f"w{number}") if self._durable else None,
                upload_bytes_per_s=self._upload_bytes_per_s,
            )
        )
        return replica

    async def meet(self) -> None:
        """Until all members that are awake see each other, and nobody else."""
        awake = self.awake()
        peers = [replica.peer for replica in awake]
        await asyncio.gather(*(r.ask("meet", peers=[p for p in peers if p != r.peer]) for r in awake))

    @property
    def members(self) -> list[Replica]:
        """Who lives."""
        return [replica for replica in self.lives if replica.pid and not replica.ended]

    def awake(self) -> list[Replica]:
        """Who lives and runs."""
        return [replica for replica in self.members if not replica.frozen]

    async def kill(self, replica: Replica) -> None:
        """SIGKILL; returns when it is gone."""
        replica.signal(signal.SIGKILL)
        await self.until(lambda: replica.ended, f"end of {replica}")

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

    async def arm(self, arming: str, *replicas: Replica) -> None:
        """Arm a fault point in some processes; the first that passes it is struck, and no other."""
        claim = self._folder / f"claim-{next(self._claims)}"
        await asyncio.gather(*(r.ask("arm", arming=arming, once=str(claim)) for r in replicas))

    async def until(self, holds: Callable[[], bool], what: str, limit_s: float = 60.0) -> None:
        """Look at each piece of news. Raises AssertionError with everybody's story."""
        try:
            async with asyncio.timeout(limit_s):
                while not holds():
                    crashes = [f"{replica}: {replica.crash}" for replica in self.lives if replica.crash]
                    assert not crashes, f"{crashes}\n{self.story()}"
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            waiting = await waits(self.awake())
            raise AssertionError(f"no {what} within {limit_s:g} s\n{self.story()}\n{waiting}") from None

    async def statuses(self, replicas: Sequence[Replica] | None = None) -> list[JsonObject]:
        """Of each."""
        return list(await asyncio.gather(*(r.ask("status") for r in replicas or self.awake())))

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
        paths = {replica: self._folder / f"w{replica.number}.tensors" for replica in self.awake()}
        await asyncio.gather(*(replica.ask("dump", path=str(path)) for replica, path in paths.items()))
        ledger = ScalarLedger(self.spec, self.size, self.seed, {r.peer: r.number for r in self.lives})
        ledger.read(self.entries())
        for replica, path in paths.items():
            anchor, weights = torch.load(path)
            ledger.check((replica.peer, replica.incarnation), replica.steps, anchor, weights)

    def story(self) -> str:
        """For a failed test."""
        return story(self.lives, self._folder)

    # -- the line

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._listening.add(task)
            task.add_done_callback(self._listening.discard)
        first = json.loads(await reader.readline())
        replica = next(
            r for r in self.lives if (r.number, r.incarnation) == (first["number"], first["incarnation"])
        )
        await replica.listen(reader, writer, self._news.set)
        writer.close()
