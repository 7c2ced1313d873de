"""A swarm under churn: peers are killed, frozen, sent away and replaced at random while it trains.

    python tests/soak/unrest.py [--minutes 10] [--peers 6] [--stages 2] [--seed 1] [--replay] [--keep]

Real processes on loopback. All along: replicas with the same log head show the same state (P1), no
micro-batch is applied twice at a stage (P2), some driver commits (P5). At the end nothing may be missing but
what peers that are no more took along. What happens goes to standard error, the summary, one JSON object, to
standard output; exit code 0 if everything held. Where a silence hid the decision, the hop must have said that
it dropped the micro-batch, and the driver counted it. The seed fixes the disturbances, not their timing.
With --replay every peer writes down what its policies saw and decided; at the end all of it is decided again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from swarm_world import Auditor, Id, Peer, Swarm, swarm_spec, write_corpus

from shoal.node.paths import CACHE_KEY
from shoal.node.simulate.replay import replay
from shoal.protocol.errors import ShoalError

CALM_S = (3.0, 10.0)  # between two disturbances
FROZEN_S = (0.5, 12.0)  # shorter and longer than suspicion (2 s) and abort (5 s)
STALL_S = 30.0  # a run that commits nothing for so long does not hold P5
SETTLE_S = 60.0
LOOK_S = 0.2
ACCOUNTS_S = 3.0
_DIFFERENCES_TOLD = 5


@dataclass
class Summary:
    """What the soak prints."""

    minutes: float
    peers: int
    stages: int
    seed: int
    machine: str
    kills: int = 0
    freezes: int = 0
    leaves: int = 0
    joins: int = 0
    micro_batches: int = 0
    heights: list[int] = field(default_factory=list)
    states_compared: int = 0  # heights of a stage at which two replicas or more told their state
    state_differences: list[str] = field(default_factory=list)
    applied_twice: list[str] = field(default_factory=list)
    taken_along: dict[str, int] = field(default_factory=dict)  # lost peer -> micro-batches gone with it
    hidden: dict[str, int] = field(default_factory=dict)  # replica -> dropped, as it or a driver was frozen
    longest_stall_s: float = 0.0
    longest_join_s: float = 0.0
    callbacks_over_50_ms: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    decided_again: dict[str, int] = field(default_factory=dict)  # by policy
    decided_otherwise: int = 0

    @property
    def held(self) -> bool:
        return not (self.state_differences or self.applied_twice or self.problems)


class Churn:
    """One soak."""

    def __init__(self, swarm: Swarm, summary: Summary) -> None:
        self.summary = summary
        self._swarm = swarm
        self._rng = random.Random(summary.seed)
        self._begun_s = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()
        self._leaving: set[str] = set()
        self._moving = True

    async def run(self) -> None:
        """The whole time; fills the summary."""
        swarm, summary = self._swarm, self.summary
        await swarm.start(replicas=max(1, summary.peers // summary.stages))
        async with swarm.auditor() as auditor:
            await self._churn(auditor)
            await self._conclude(auditor)

    async def _churn(self, auditor: Auditor) -> None:
        """Disturb until the time is over, or nothing moves any more."""
        self._begun_s = time.monotonic()
        watching = [
            asyncio.create_task(self._watch_progress()),
            asyncio.create_task(self._keep_accounts(auditor)),
        ]
        try:
            while self._moving and time.monotonic() - self._begun_s < self.summary.minutes * 60:
                await asyncio.sleep(self._rng.uniform(*CALM_S))
                self._disturb()
            await asyncio.gather(*self._tasks)
        finally:
            for task in (*watching, *self._tasks):
                task.cancel()
            await asyncio.gather(*watching, *self._tasks, return_exceptions=True)

    # --- disturbing

    def _disturb(self) -> None:
        """One thing at random that leaves every stage a replica which is neither frozen nor leaving."""
        sound = [peer for peer in self._swarm.peers if peer.training and peer.name not in self._leaving]
        spare = [p for p in sound if sum(q.stage == p.stage for q in sound) > 1]
        volunteers = [peer for peer in spare if peer is not self._swarm.peers[0]]
        living = sum(peer.alive for peer in self._swarm.peers)
        deeds = ["join"] * 2 if living < self.summary.peers else []
        deeds += ["kill", "leave"] if volunteers else []
        deeds += ["freeze"] * 2 if spare else []
        match self._rng.choice(deeds or ["nothing"]):
            case "join":
                self._spawn(self._join())
            case "kill":
                self._kill(self._rng.choice(volunteers))
            case "leave":
                self._spawn(self._leave(self._rng.choice(volunteers)))
            case "freeze":
                self._spawn(self._freeze(self._rng.choice(spare), self._rng.uniform(*FROZEN_S)))

    def _spawn(self, deed: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._guarded(deed))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, deed: Coroutine[Any, Any, None]) -> None:
        try:
            await deed
        except ShoalError as error:
            self._problem(str(error))

    def _kill(self, peer: Peer) -> None:
        self._tell(f"kill {peer.name} of stage {peer.stage}")
        self.summary.kills += 1
        peer.kill()

    async def _freeze(self, peer: Peer, seconds: float) -> None:
        self._tell(f"freeze {peer.name} of stage {peer.stage} for {seconds:.1f} s")
        self.summary.freezes += 1
        peer.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            peer.signal(signal.SIGCONT)

    async def _leave(self, peer: Peer) -> None:
        self._tell(f"{peer.name} of stage {peer.stage} leaves")
        self.summary.leaves += 1
        self._leaving.add(peer.name)
        peer.signal(signal.SIGTERM)
        code = await peer.ended(SETTLE_S)
        if code != 0:
            self._problem(f"{peer.name} left with exit code {code}")

    async def _join(self) -> None:
        self.summary.joins += 1
        begun_s = time.monotonic()
        peer = await self._swarm.join()
        took_s = time.monotonic() - begun_s
        self.summary.longest_join_s = max(self.summary.longest_join_s, round(took_s, 1))
        self._tell(f"{peer.name} joined stage {peer.stage} within {took_s:.1f} s")

    # --- judging

    async def _watch_progress(self) -> None:
        """Notes how long nobody decided anything, and peers that ended unasked."""
        swarm, summary = self._swarm, self.summary
        known, since_s, told = 0, time.monotonic(), set[str]()
        while True:
            decided = sum(len(peer.last_ledger) for peer in swarm.everybody(0))
            now_s = time.monotonic()
            if decided > known:
                known, since_s = decided, now_s
            stalled_s = now_s - since_s
            summary.longest_stall_s = max(summary.longest_stall_s, round(stalled_s, 2))
            if stalled_s > STALL_S and self._moving:
                self._moving = False
                self._problem(f"no progress for {STALL_S:g} s\n{swarm.story()}")
            for peer in swarm.peers:
                unasked = peer.exit_code is not None and not peer.killed and peer.name not in self._leaving
                if unasked and peer.name not in told:
                    told.add(peer.name)
                    self._problem(f"{peer.name} ended by itself: {peer.story()}")
            await asyncio.sleep(LOOK_S)

    async def _keep_accounts(self, auditor: Auditor) -> None:
        """Asks drivers about what is not applied at stage 1, before they forget its chain."""
        swarm = self._swarm
        while self.summary.stages > 1:
            await asyncio.sleep(ACCOUNTS_S)
            decided = (peer.last_ledger for peer in swarm.replicas(0))
            await swarm.account(auditor, frozenset[Id]().union(*decided))

    async def _conclude(self, auditor: Auditor) -> None:
        """Calm again: everybody trains, groups agree, nothing is missing."""
        swarm, summary = self._swarm, self.summary
        stages = range(summary.stages)
        await swarm.until_training([peer for stage in stages for peer in swarm.replicas(stage)], SETTLE_S)
        await asyncio.gather(*(swarm.until_compared(swarm.replicas(stage), SETTLE_S) for stage in stages))
        if summary.stages > 1:
            await swarm.settled(auditor, SETTLE_S)
        for peer in swarm.everybody(1):
            if peer.name in self._leaving:
                self._judge_leaver(peer)

        for driver in swarm.replicas(0):
            hidden = sum(id_[0].startswith(driver.peer_id) for id_ in swarm.hidden)
            if hidden > int(driver.last_status["training"]["lost"]):
                self._problem(f"{hidden} micro-batches of {driver.name} were dropped, and it has not noticed")

    def _judge_leaver(self, peer: Peer) -> None:
        """Who left in order has applied everything that the chains of living drivers name."""
        named = sum(name == peer.name for name in self._swarm.taken_along.values())
        applied = int(peer.farewell()["training"]["micro_batches"])
        if applied < len(peer.last_ledger) + named:
            self._problem(f"{peer.name} left with {len(peer.last_ledger) + named - applied} not applied")

    def fill(self) -> None:
        """Everything that is known at the end, however it came."""
        swarm, summary = self._swarm, self.summary
        heads = swarm.heads
        summary.micro_batches = len(swarm.ledger(0))
        summary.heights = [heads.group_height(stage, "") for stage in range(summary.stages)]
        summary.states_compared = sum(len(states) > 1 for states in heads.seen.values())
        summary.state_differences = heads.differences()
        summary.applied_twice = swarm.applied_twice()
        summary.taken_along = dict(Counter(swarm.taken_along.values()))
        summary.hidden = dict(Counter(swarm.hidden.values()))
        if swarm.decisions:
            again = replay(swarm.spec, swarm.decisions)
            summary.decided_again, summary.decided_otherwise = dict(again.decisions), len(again.differences)
            summary.problems += again.differences[:_DIFFERENCES_TOLD]
        for peer in swarm.peers:
            loop = peer.last_status.get("loop", {})
            if loop.get("callbacks_over_limit"):
                summary.callbacks_over_50_ms[peer.name] = [c for c in loop["culprits"] if c[1] > 50.0]

    def _problem(self, text: str) -> None:
        self._tell(f"PROBLEM {text}")
        self.summary.problems.append(text)

    def _tell(self, text: str) -> None:
        print(f"{time.monotonic() - self._begun_s:6.1f} s  {text}", file=sys.stderr, flush=True)


async def soak(swarm: Swarm, summary: Summary) -> None:
    churn = Churn(swarm, summary)
    async with swarm:
        try:
            await churn.run()
        except ShoalError as error:
            summary.problems.append(f"{error}\n{swarm.story()}")
        finally:
            churn.fill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--peers", type=int, default=6)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replay", action="store_true", help="decide again what the peers decided")
    parser.add_argument("--keep", action="store_true", help="keep the peers' folders and logs")
    asked = parser.parse_args()
    machine = (
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
    )
    summary = Summary(asked.minutes, asked.peers, asked.stages, asked.seed, machine)
    folder = Path(tempfile.mkdtemp(prefix="churn-"))
    os.environ[CACHE_KEY] = str(folder / "cache")
    swarm = Swarm(
        folder, swarm_spec(write_corpus(folder / "corpus.txt"), asked.stages), decisions=asked.replay
    )
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(soak(swarm, summary))
    if summary.held and not asked.keep:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"logs are in {folder}", file=sys.stderr)
    print(json.dumps({**asdict(summary), "held": summary.held}))
    return 0 if summary.held else 1


if __name__ == "__main__":
    sys.exit(main())
