"""What every part of one replica's round machinery shares: names, cut, codecs, and the way out."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.protocol import limits
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.transport import Transport
from shoal.training.amended import Amended
from shoal.training.outer.buffers import Buffers
from shoal.training.outer.messages import method
from shoal.training.outer.parts import Fragment, cut
from shoal.training.outer.strategy import OuterStrategy
from shoal.training.spec import RunSpec

Offload = Callable[..., Awaitable[Any]]
Event = Callable[[str, dict[str, object]], None]
Meet = Callable[[PeerId, Sequence[PeerId]], Awaitable[None]]  # find out how to dial one of a chain
GROUP_ROLES = frozenset({Role.OWNER, Role.TRAINER})


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """One replica's place in its group."""

    spec: RunSpec
    stage: int
    run_id: bytes
    size: int  # fp32 values of the stage
    fragments: tuple[Fragment, ...]
    strategy: OuterStrategy
    me: PeerId
    incarnation: int
    transport: Transport
    offload: Offload  # codecs, hashing, what is small of the disk
    disk: Offload  # large writes: a slow disk holds up nothing else
    suspect: Callable[[PeerId, str], None]
    event: Event
    rng: random.Random
    payload_budget_bytes: int
    amended: Amended
    meet: Meet
    refused: Counter[PeerId] = field(default_factory=Counter)
    buffers: Buffers = field(default_factory=Buffers)

    @classmethod
    def of(
        cls,
        spec: RunSpec,
        stage: int,
        size: int,
        *,
        me: PeerId,
        incarnation: int,
        transport: Transport,
        offload: Offload,
        disk: Offload | None = None,
        suspect: Callable[[PeerId, str], None],
        event: Event,
        rng: random.Random,
        amended: Amended | None = None,
        meet: Meet | None = None,
    ) -> Context:
        """What follows from the spec is computed here, once."""
        outer = spec.outer
        return cls(
            spec,
            stage,
            spec.run_id(),
            size,
            cut(size, outer.part_bytes, spec.compression.block, outer.fragments),
            OuterStrategy.of(outer),
            me,
            incarnation,
            transport,
            offload,
            disk or offload,
            suspect,
            event,
            rng,
            outer.payload_budget_bytes,
            amended or Amended(spec),
            meet or everybody_is_known,
        )

    def beside(self, stage: int, size: int, payload_budget_bytes: int | None = None) -> Context:
        """The same peer's place at another stage, whose state it fetches or keeps."""
        found = Context.of(
            self.spec,
            stage,
            size,
            me=self.me,
            incarnation=self.incarnation,
            transport=self.transport,
            offload=self.offload,
            disk=self.disk,
            suspect=self.suspect,
            event=self.event,
            rng=self.rng,
            amended=self.amended,
            meet=self.meet,
        )
        if payload_budget_bytes is None:
            return found
        return dataclasses.replace(found, payload_budget_bytes=payload_budget_bytes)

    def method(self, name: str) -> str:
        """The transport method of this stage's group."""
        return method(self.stage, name)

    def refuse(self, peer: PeerId, reason: str) -> None:
        """Count what a peer sent against the protocol, and let membership know."""
        self.refused[peer] += 1
        if len(self.refused) > limits.RECORDS_HELD:  # ids cost nothing
            del self.refused[min(self.refused, key=self.refused.__getitem__)]
        self.suspect(peer, reason)
        self.event("refused", {"peer": peer, "reason": reason})


async def everybody_is_known(peer: PeerId, chain: Sequence[PeerId]) -> None:
    """`Meet` in a swarm that is known whole."""
