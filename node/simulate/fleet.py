"""The peers of the policy simulation, as plain state: a lane with its queues, a place, and whom it knows.

No messages and no clocks of their own: `flow` moves micro-batches through them, `routers` choose the way.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from shoal.dht.beats import Beat, StageBeat
from shoal.dht.view import Member
from shoal.node.simulate.machines import Machine
from shoal.protocol.identity import PeerId
from shoal.training.rebalance import Placed

BEAT_S = 1.0
_PIECES = (
    3  # of a micro-batch at a lane: forward, input gradient, weight gradient, a third each (`lane.paced`)
)


@dataclass(slots=True, eq=False, repr=False)  # they refer to one another
class Leg:
    """What one hop has of a micro-batch. Times in virtual seconds."""

    node: Node
    caller: Node | None  # who sent it here; None: it drives
    sent_s: float
    void: bool = False  # dead, or of no use any more
    forwarded: bool = False  # its forward is done
    forwarded_s: float = 0.0
    returned: bool = False  # it has the gradient of the stages behind
    returned_s: float = 0.0
    answered: bool = False  # its own gradient reached the stage before


@dataclass(slots=True, eq=False, repr=False)  # they refer to one another
class Trip:
    """One micro-batch on its way through a chain."""

    legs: list[Leg]  # by stage, the driver's first; grows forward, and stays on the way back
    broken_s: dict[int, float] = field(default_factory=dict)  # stage -> since when it wants another replica


@dataclass(slots=True, eq=False, repr=False)  # they refer to one another
class Node:
    """One peer."""

    number: int
    name: PeerId
    machine: Machine
    stage: int = 0
    service_s: float = 1.0  # lane time of a micro-batch at its stage
    state: str = "joining"  # as in `dht.directory`; "gone" at the end
    forward: deque[tuple[Trip, Leg]] = field(default_factory=deque)
    backward: deque[tuple[Trip, Leg]] = field(default_factory=deque)
    weights: int = 0  # gradients to be computed
    free_s: float = 0.0  # when the piece that runs is done
    busy: bool = False
    trips: dict[Trip, None] = field(default_factory=dict)  # asked of it and not answered
    known: dict[Node, Any] = field(default_factory=dict)  # the next stage's, as the router has it
    waiting: deque[tuple[Trip, Leg]] = field(default_factory=deque)  # for room at the next stage
    wake_s: float = 0.0  # when it looks again, if that lies ahead
    beat_s: float = -BEAT_S
    beat_backlog_s: float = 0.0
    member: Member | None = None
    placed: Placed | None = None  # a node serves one stage in its life: a mover comes back as another

    @property
    def piece_s(self) -> float:
        """One of the three parts of a micro-batch."""
        return self.service_s / _PIECES

    def backlog_s(self, now: float) -> float:
        """Time to finish what runs and what is queued, as `lane.LaneLoad` tells it."""
        pieces = len(self.forward) + len(self.backward) + self.weights
        return pieces * self.piece_s + max(0.0, self.free_s - now)

    def heard(self, now: float) -> tuple[float, float]:
        """(backlog, when): what its last heartbeat said."""
        if now - self.beat_s >= BEAT_S:
            self.beat_s, self.beat_backlog_s = now, self.backlog_s(now)
        return self.beat_s, self.beat_backlog_s

    def as_member(self) -> Member:
        """How others see it."""
        if self.member is None or (self.member.state, self.member.stages) != (self.state, (self.stage,)):
            beat = Beat(stages=(StageBeat(self.stage, service_s=self.service_s),))
            self.member = Member(
                peer=self.name, state=self.state, stages=(self.stage,), service_s=self.service_s, beat=beat
            )
        return self.member

    def as_placed(self) -> Placed:
        """How planners see it."""
        if self.placed is None:
            self.placed = Placed(self.name, self.stage, self.service_s)
        return self.placed


def transfer_s(sender: Node, receiver: Node, payload_bytes: float) -> float:
    """Until so many bytes have crossed."""
    one, other = sender.machine, receiver.machine
    bytes_per_s = min(one.upload_bytes_per_s, other.download_bytes_per_s)
    return one.latency_s + other.latency_s + payload_bytes / bytes_per_s


def rtt_s(one: Node, other: Node) -> float:
    return 2 * (one.machine.latency_s + other.machine.latency_s)
