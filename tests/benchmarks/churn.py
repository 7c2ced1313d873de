"""What does churn cost a swarm, beyond the peers that it takes away?

    python tests/benchmarks/churn.py [--peers 8] [--session 60] [--minutes 5] [--calm 60] [--pace 1.0]
        [--seed 1] [--json]

Real processes (`shoal up`, `shoal join`) of two stages on the paced lane: a micro-batch takes a declared time
of the lane, so that two cores can stand for eight machines. First the swarm trains undisturbed for `--calm`
seconds, then for `--minutes` every volunteer's session ends after an exponential time, by SIGKILL or in
order, and a process that has its imports behind it takes its place. The owner's peer stays.

`of_calm`: committed tokens a second under churn over those before, each over the processes alive in the mean,
joiners from the moment they begin. Goal 0.85; and no micro-batch applied twice, none missing but what killed
replicas took along, byte-equal heads at the end. Exit status 1 if missed, 2 if all processes together used
more than half of the cores: then the figures are the machine's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from swarm_world import Auditor, Id, Peer, Swarm, swarm_spec, write_corpus

from shoal.node.demo.processes import JsonObject
from shoal.node.paths import CACHE_KEY
from shoal.protocol.errors import ShoalError
from shoal.training.spec import RunSpec

GOAL, CPU_GOAL = 0.85, 0.5
STAGES = 2
LOOK_S = 0.5
WARM_UP_S = 20.0
SETTLE_S = 90.0


def churn_spec(corpus: Path) -> RunSpec:
    """The tests' small run with enough in flight to keep every lane busy."""
    values = swarm_spec(corpus, STAGES).model_dump()
    values["inner"] |= {"in_flight": 8, "micro_batch_sequences": 2}
    return RunSpec.model_validate(values)


def all_decided(swarm: Swarm) -> frozenset[Id]:
    """What any ledger shows: the last of a killed driver's are in those of the hops that it told."""
    return frozenset[Id]().union(*(swarm.ledger(stage) for stage in range(STAGES)))


class Meter:
    """Committed micro-batches and peers alive, between two moments."""

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._begun_s = self._now_s = time.monotonic()
        self._decided = len(all_decided(swarm))
        self._alive_s = self._online_s = 0.0

    async def watch(self, until_s: float) -> None:
        """Look again and again; `until_s` on the monotonic clock."""
        while self._now_s < until_s:
            await asyncio.sleep(LOOK_S)
            now_s = time.monotonic()
            self._alive_s += (now_s - self._now_s) * sum(peer.alive for peer in self._swarm.peers)
            self._online_s += (now_s - self._now_s) * sum(peer.training for peer in self._swarm.peers)
            self._now_s = now_s

    def figures(self) -> dict[str, float]:
        seconds = self._now_s - self._begun_s
        tokens = (len(all_decided(self._swarm)) - self._decided) * self._swarm.spec.micro_batch_tokens
        alive, online = self._alive_s / seconds, self._online_s / seconds
        return {
            "seconds": round(seconds, 1),
            "tokens_per_s": round(tokens / seconds, 2),
            "alive": round(alive, 2),
            "online": round(online, 2),
            "tokens_per_s_of_alive": round(tokens / seconds / alive, 3),
            "tokens_per_s_of_online": round(tokens / seconds / online, 3),
        }


class Churn:
    """Sessions that end, and others that begin."""

    def __init__(self, swarm: Swarm, session_s: float, seed: int) -> None:
        self._swarm = swarm
        self._session_s = session_s
        self._rng = random.Random(seed)
        self.kills = self.leaves = self.joins = 0
        self.emptied = 0  # times a stage lost its last replica
        self.problems: list[str] = []

    async def run(self, until_s: float) -> None:
        """Every volunteer has its sessions; the last of each stays."""
        begin = self._swarm.peers[1:]
        await asyncio.gather(*(self._place(peer, until_s) for peer in begin))

    async def _place(self, peer: Peer, until_s: float) -> None:
        while True:
            ends_s = time.monotonic() + self._rng.expovariate(1.0 / self._session_s)
            if ends_s > until_s:
                return
            await asyncio.sleep(ends_s - time.monotonic())
            await self._end(peer)
            try:
                self.joins += 1
                peer = await self._swarm.join()
            except ShoalError as error:
                self.problems.append(str(error))
                return

    async def _end(self, peer: Peer) -> None:
        stage = [other for other in self._swarm.replicas(peer.stage or 0) if other is not peer]
        self.emptied += not stage
        if self._rng.random() < 0.5:
            self.kills += 1
            peer.kill()
            return
        self.leaves += 1
        peer.signal(signal.SIGTERM)
        await peer.ended(60.0)


async def keep_accounts(swarm: Swarm, auditor: Auditor) -> None:
    """Asks drivers about what is not applied at stage 1, before they forget its chain or go."""
    while True:
        await asyncio.sleep(2.0)
        decided = (peer.last_ledger for peer in swarm.replicas(0))
        await swarm.account(auditor, frozenset[Id]().union(*decided))


async def measure(swarm: Swarm, options: argparse.Namespace) -> JsonObject:
    await swarm.start(options.peers // STAGES)
    await asyncio.sleep(WARM_UP_S)
    async with swarm.auditor() as auditor:
        accounts = asyncio.create_task(keep_accounts(swarm, auditor))
        used_s, begun_s = _cpu_s(), time.monotonic()
        calm = Meter(swarm)
        await calm.watch(time.monotonic() + options.calm)
        calm_figures = calm.figures()
        cpu_share = (_cpu_s() - used_s) / (time.monotonic() - begun_s) / (os.cpu_count() or 1)
        churn, stormy = Churn(swarm, options.session, options.seed), Meter(swarm)
        until_s = time.monotonic() + options.minutes * 60.0
        sessions = asyncio.create_task(churn.run(until_s))
        await stormy.watch(until_s)
        figures = stormy.figures()
        await sessions
        found: JsonObject = {
            "calm": calm_figures,
            "churn": figures,
            "of_calm": figures["tokens_per_s_of_alive"] / calm_figures["tokens_per_s_of_alive"],
            "of_calm_online": figures["tokens_per_s_of_online"] / calm_figures["tokens_per_s_of_online"],
            "cpu_share": cpu_share,
            **{key: getattr(churn, key) for key in ("kills", "leaves", "joins", "emptied")},
        }
        problems = churn.problems
        try:
            await swarm.until_training([p for s in range(STAGES) for p in swarm.replicas(s)], SETTLE_S)
            await asyncio.gather(*(swarm.until_compared(swarm.replicas(s), SETTLE_S) for s in range(STAGES)))
            accounts.cancel()
            await asyncio.gather(accounts, return_exceptions=True)
            await swarm.settled(auditor, SETTLE_S)
        except ShoalError as error:
            problems.append(str(error))
        accounts.cancel()
        rescued = [e for peer in swarm.peers for e in peer.events if e["event"] == "stage-rescued"]
        return found | {
            "micro_batches": len(swarm.ledger(0)),
            "applied_twice": swarm.applied_twice(),
            "taken_along": len(swarm.taken_along),
            "state_differences": swarm.heads.differences(),
            "rescued": len(rescued),
            "problems": problems,
        }


def _cpu_s() -> float:
    """Used so far by this process's children and theirs."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


async def run(folder: Path, options: argparse.Namespace) -> JsonObject:
    swarm = Swarm(folder, churn_spec(write_corpus(folder / "corpus.txt")))
    swarm.options = ("--pace", str(options.pace))
    async with swarm:
        return await measure(swarm, options)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peers", type=int, default=8, help="as many of each stage")
    parser.add_argument("--session", type=float, default=60.0, help="mean, in seconds")
    parser.add_argument("--minutes", type=float, default=5.0, help="under churn")
    parser.add_argument("--calm", type=float, default=60.0, help="seconds before it")
    parser.add_argument("--pace", type=float, default=1.0, help="seconds of the lane a micro-batch")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="churn-"))
    os.environ[CACHE_KEY] = str(folder / "cache")
    try:
        found = asyncio.run(run(folder, options))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(found, indent=None if options.json else 2))
    wrong = found["applied_twice"] or found["state_differences"] or found["problems"]
    if wrong or found["of_calm"] < GOAL:
        return 1
    return 2 if found["cpu_share"] > CPU_GOAL else 0


if __name__ == "__main__":
    sys.exit(main())
