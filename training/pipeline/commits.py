"""A driver's decisions on their way to the hops: told directly, in parallel, until each has acknowledged.

Whoever does not answer at once is owed its commits: they are kept, bounded, and told again when it answers,
so that a silent peer delays nobody. A commit that its hop cannot have applied any more, or never says that it
has, is counted as lost; should the hop ask what was decided after all, it is not lost, and the count says so.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict, deque
from collections.abc import Coroutine
from dataclasses import dataclass

from shoal.protocol.errors import NetworkError, ShoalError
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Transport, call
from shoal.training.methods import at_stage
from shoal.training.pipeline.messages import APPLIED, CommitChain, MicroBatch, Verdict
from shoal.training.pipeline.replicas import Replicas
from shoal.training.pipeline.successors import Event

TIMEOUT_S = 2.0
AT_ONCE = 64  # decisions being told for the first time
OWED_MOST = 1024  # commits kept for one hop
LOST_KEPT = 4096  # names of those given up, by which a late question still finds them
_PAUSE_S, _PAUSE_MOST_S = 0.05, 1.0
_LOOK_S = 0.2  # how often a leaver looks whether only silent peers are left

log = logging.getLogger(__name__)


Hop = tuple[PeerId, int]  # a peer and the stage that it is asked about


@dataclass(slots=True)
class _Owed:
    """A commit that a peer has not acknowledged."""

    commit: CommitChain
    until: float  # loop time until which its hop may hold the micro-batch


class Commits:
    """See the module. One for a driver; `close` ends what is still being told."""

    def __init__(
        self, transport: Transport, replicas: Replicas, ttl_s: float, rng: random.Random, event: Event
    ) -> None:
        """`ttl_s`: how long a hop holds an undecided micro-batch whose driver it cannot reach."""
        self._transport = transport
        self._replicas = replicas
        self._ttl_s = ttl_s
        self._rng = rng
        self._event = event
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._owed: dict[Hop, deque[_Owed]] = {}
        self._given_up: OrderedDict[tuple[MicroBatch, Hop], None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self.lost = 0

    @property
    def owed(self) -> int:
        """Commits that wait for a hop to answer."""
        return sum(map(len, self._owed.values()))

    async def deliver(self, commit: CommitChain) -> None:
        """Begin to tell the chain; waits while too many are being told."""
        await self._slots.acquire()
        self._spawn(self._tell_all(commit))

    async def settled(self, *, leaving: bool = False) -> None:
        """Returns when every hop has acknowledged, or was given up.

        Who is `leaving` does not wait for the silent: they ask the others of their chains when they wake.
        """
        while self._tasks:
            silent = all(self._replicas.is_gone(peer) for peer, _ in self._owed)
            if leaving and silent and len(self._tasks) == len(self._owed):
                return
            timeout_s = _LOOK_S if leaving else None
            await asyncio.wait(self._tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)

    async def close(self) -> None:
        """Tell nothing more; hops that have not heard ask the others of their chain."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def asked(self, micro_batch: MicroBatch, hop: Hop) -> None:
        """The hop has asked, and is told the decision now."""
        if (micro_batch, hop) in self._given_up:
            del self._given_up[micro_batch, hop]
            self.lost -= 1

    async def _tell_all(self, commit: CommitChain) -> None:
        until = asyncio.get_running_loop().time() + self._ttl_s
        try:
            async with asyncio.TaskGroup() as tasks:
                for link in commit.chain[1:]:
                    tasks.create_task(
                        self._tell_or_owe((PeerId(link.peer), link.stage), _Owed(commit, until))
                    )
        finally:
            self._slots.release()

    async def _tell_or_owe(self, hop: Hop, owed: _Owed) -> None:
        await self._replicas.meet(hop[0], [PeerId(link.peer) for link in owed.commit.chain])
        if hop not in self._owed and await self._tell(hop, owed.commit):
            return
        if hop not in self._owed:
            self._owed[hop] = deque()
            self._spawn(self._pay(hop, self._owed[hop]))  # begins after the first is in
        if len(self._owed[hop]) < OWED_MOST:
            self._owed[hop].append(owed)
        else:
            self._give_up(hop, owed.commit)

    async def _pay(self, hop: Hop, queue: deque[_Owed]) -> None:
        """Tell a hop what it is owed, the oldest first, until nothing is left."""
        loop, pause_s = asyncio.get_running_loop(), _PAUSE_S
        while queue:
            await asyncio.sleep(pause_s * self._rng.uniform(0.5, 1.5))
            pause_s = min(pause_s * 2, _PAUSE_MOST_S)
            while queue and (queue[0].until < loop.time() or self._replicas.has_departed(hop[0])):
                self._give_up(hop, queue.popleft().commit)
            while queue and await self._tell(hop, queue[0].commit):
                queue.popleft()
                pause_s = _PAUSE_S
        del self._owed[hop]

    async def _tell(self, hop: Hop, commit: CommitChain) -> bool:
        """Whether the hop answered, whatever it said."""
        peer, method = hop[0], at_stage(hop[1], "commit")
        try:
            reply = await call(self._transport, peer, method, commit, Verdict, timeout_s=TIMEOUT_S)
        except NetworkError as error:
            self._replicas.suspect(peer, f"commit: {error}")
            return False
        except ShoalError as error:
            self._event("commit-refused", {"peer": peer, "reason": str(error)})
            self._give_up(hop, commit)
            return True
        if reply.header.decision != APPLIED:
            self._give_up(hop, commit)
        return True

    def _give_up(self, hop: Hop, commit: CommitChain) -> None:
        self.lost += 1
        self._given_up[commit.micro_batch, hop] = None
        if len(self._given_up) > LOST_KEPT:
            self._given_up.popitem(last=False)
        self._event("lost", {"micro_batch": commit.micro_batch.number, "peer": hop[0]})

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a commit could not be told", exc_info=error)
