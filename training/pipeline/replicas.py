"""What the pipeline asks of the membership table; the trainer adapts `dht.members` to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from shoal.dht.directory import SignedRecord
from shoal.protocol.identity import PeerId


class Replica(NamedTuple):
    """A live replica of a stage; load and rate as its last heartbeat claims them."""

    peer: PeerId
    rtt_s: float
    backlog_s: float = 0.0
    service_s: float = 0.0  # lane time of a micro-batch; 0: unknown
    heard_s: float = -math.inf  # loop time of that heartbeat
    step_s: float = 0.0  # of a text, among those of its sessions; 0: unknown


class Replicas(Protocol):
    """Live replicas by stage."""

    def of_stage(self, stage: int) -> Sequence[Replica]:
        """The replicas that may be asked now."""

    def suspect(self, peer: PeerId, reason: str) -> None:
        """A call to this peer failed."""

    def is_gone(self, peer: PeerId) -> bool:
        """Whether the peer departed or is silent: calling it is a waste of time."""

    def has_departed(self, peer: PeerId, incarnation: int | None = None) -> bool:
        """Whether that driver (None: the peer, whatever it does) is certainly over: it said goodbye, refuses
        connections, or was replaced.

        A silent peer may only be frozen, and decide after all when it wakes.
        """

    async def meet(self, peer: PeerId, chain: Sequence[PeerId]) -> None:
        """Find out how to dial a peer of a chain that has this one, too: not everybody knows everybody."""

    def record_of(self, peer: PeerId) -> SignedRecord | None:
        """What tells others how to dial a replica, if it is known."""

    async def changed(self) -> None:
        """Returns after the next change of any stage's replicas."""
