"""The micro-batches a hop has answered and nobody has decided: held, settled by commit or by asking around.

`Hop` holds, decides and counts here; the rules are in `settlement`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.protocol import limits
from shoal.protocol.errors import ShoalError
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Transport, call
from shoal.training.methods import at_stage
from shoal.training.pipeline.compute import Passage
from shoal.training.pipeline.ledger import Ledger
from shoal.training.pipeline.messages import (
    APPLIED,
    TENTATIVE,
    UNKNOWN,
    Link,
    MicroBatch,
    QueryChain,
    Verdict,
)
from shoal.training.pipeline.replicas import Replicas
from shoal.training.pipeline.settlement import Outcome, outcome
from shoal.training.pipeline.successors import Event

ASK_AFTER_S = 3.0  # a commit is one message behind the answer; by now it is late
_QUERY_TIMEOUT_S = 2.0
_ASKED_AT_ONCE = 16  # micro-batches: a partition leaves many at the same time


@dataclass(slots=True, eq=False)
class Held:
    """One attempt, answered."""

    passage: Passage
    caller: PeerId
    chain: tuple[Link, ...]  # whole, the driver first
    since: float  # loop time
    asked: float


class Undecided:
    """See the module."""

    def __init__(
        self,
        stage: int,
        me: PeerId,
        ttl_s: float,
        transport: Transport,
        replicas: Replicas,
        ledger: Ledger,
        apply: Callable[[Passage], None],
        released: Callable[[tuple[MicroBatch, int]], None],
        event: Event,
    ) -> None:
        """`apply` is called once for each that counts, `released` whenever one is held no more."""
        self._stage = stage
        self._me = me
        self._ttl_s = ttl_s
        self._transport = transport
        self._replicas = replicas
        self._ledger = ledger
        self._apply = apply
        self._released = released
        self._event = event
        self._held: dict[tuple[MicroBatch, int], Held] = {}
        self._by_caller: Counter[PeerId] = Counter()

    def __len__(self) -> int:
        return len(self._held)

    def of_caller(self, caller: PeerId) -> int:
        return self._by_caller[caller]

    def hold(
        self, micro_batch: MicroBatch, attempt: int, passage: Passage, caller: PeerId, chain: tuple[Link, ...]
    ) -> None:
        """Until `decide` or `settle`; not at all if another attempt has counted meanwhile."""
        if self._ledger.has(micro_batch):  # should all others go, it would be told as missing here
            self._ledger.abandoned += 1
            self._released((micro_batch, attempt))
            return
        now = asyncio.get_running_loop().time()
        self._release((micro_batch, attempt))
        self._held[micro_batch, attempt] = Held(passage, caller, chain, now, now)
        self._count(caller, 1)

    def reroute(self, key: tuple[MicroBatch, int], caller: PeerId, chain: tuple[Link, ...]) -> None:
        """Another replica has taken the caller's place: the chain is another one, this attempt the same."""
        if (held := self._held.get(key)) is not None:
            self._count(held.caller, -1)
            self._count(caller, 1)
            held.caller, held.chain = caller, chain

    def abandon(self, key: tuple[MicroBatch, int]) -> None:
        """Nobody was told the answer, and nobody will be: nothing is missing."""
        if self._release(key) is not None:
            self._ledger.abandoned += 1

    def verdict(self, micro_batch: MicroBatch, asker: PeerId) -> Verdict:
        """What this replica knows of a micro-batch; while it is undecided, the chain that has the asker."""
        if self._ledger.has(micro_batch):
            return Verdict(APPLIED, self._ledger.chain(micro_batch))
        chains = [held.chain for key, held in self._held.items() if key[0] == micro_batch]
        with_asker = (chain for chain in chains if any(link.peer == asker for link in chain))
        return Verdict(TENTATIVE, next(with_asker, ())) if chains else Verdict(UNKNOWN, ())

    def decide(self, micro_batch: MicroBatch, chain: tuple[Link, ...]) -> None:
        """Apply the attempt that `chain` names; abandon this micro-batch's other attempts. Idempotent."""
        for key in [key for key in self._held if key[0] == micro_batch]:
            held = self._release(key)
            if held is None or Link(self._stage, self._me, key[1]) not in chain:
                self._ledger.abandoned += 1
            elif self._ledger.apply(micro_batch, chain, held.passage.token_count):
                self._apply(held.passage)

    async def settle(self) -> None:
        """Ask the other hops about everything undecided for long; let go of what nobody will decide."""
        now = asyncio.get_running_loop().time()
        due = [(key, held) for key, held in self._held.items() if now - held.asked >= ASK_AFTER_S]
        for _, held in due:
            held.asked = now
        for start in range(0, len(due), _ASKED_AT_ONCE):
            some = due[start : start + _ASKED_AT_ONCE]
            await asyncio.gather(*(self._settle(key, held) for key, held in some))

    async def _settle(self, key: tuple[MicroBatch, int], held: Held) -> None:
        micro_batch, attempt = key
        departed = self._replicas.has_departed
        own = Link(self._stage, self._me, attempt)
        verdicts = await self._ask_all(held.chain, micro_batch)
        tentative = [said.chain for said in verdicts.values() if said and said.decision == TENTATIVE]
        adopters = {link for chain in tentative if own in chain for link in chain} - {*held.chain}
        in_order = sorted(adopters, key=lambda link: (link.stage, link.peer, link.attempt))
        verdicts |= await self._ask_all(in_order[: limits.STAGES], micro_batch)
        what = outcome(
            own,
            verdicts,
            driver_departed=departed(PeerId(micro_batch.driver), micro_batch.incarnation),
            age_s=asyncio.get_running_loop().time() - held.since,
            ttl_s=self._ttl_s,
        )
        if key not in self._held or what is Outcome.HOLD:
            return
        match what:
            case Outcome.APPLY:
                said = (v.chain for v in verdicts.values() if v is not None and v.decision == APPLIED)
                self.decide(micro_batch, next(chain for chain in said if own in chain))
            case Outcome.ABANDON:
                self._release(key)
                self._ledger.abandoned += 1
            case Outcome.DROP:
                self._release(key)
                self._ledger.dropped += 1
                self._event("dropped", {"micro_batch": micro_batch.number, "driver": micro_batch.driver})

    async def _ask_all(self, chain: Sequence[Link], micro_batch: MicroBatch) -> dict[Link, Verdict | None]:
        departed = self._replicas.has_departed
        own = (self._stage, self._me)
        others = (link for link in chain if (link.stage, link.peer) != own)
        links = [link for link in others if not departed(PeerId(link.peer))]
        peers = [PeerId(link.peer) for link in chain]
        found = await asyncio.gather(*(self._ask(link, peers, micro_batch) for link in links))
        return dict(zip(links, found, strict=True))

    async def _ask(self, link: Link, chain: Sequence[PeerId], micro_batch: MicroBatch) -> Verdict | None:
        peer, method = PeerId(link.peer), at_stage(link.stage, "commit")
        if self._replicas.is_gone(peer):
            return None
        await self._replicas.meet(peer, chain)
        query = QueryChain(micro_batch, self._stage)
        try:
            reply = await call(self._transport, peer, method, query, Verdict, timeout_s=_QUERY_TIMEOUT_S)
        except ShoalError:
            return None
        verdict: Verdict = reply.header
        return verdict

    def _release(self, key: tuple[MicroBatch, int]) -> Held | None:
        held = self._held.pop(key, None)
        if held is not None:
            self._count(held.caller, -1)
            self._released(key)
        return held

    def _count(self, caller: PeerId, change: int) -> None:
        self._by_caller[caller] += change
        if not self._by_caller[caller]:
            del self._by_caller[caller]
