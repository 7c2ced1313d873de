"""The simulated swarm's network: links that follow from two machines, and frames at their real weight."""

from __future__ import annotations

import math

from shoal.node.simulate.machines import Machine
from shoal.node.simulate.miniature import Miniature
from shoal.protocol.framing import payload_bytes_of
from shoal.protocol.identity import PeerId
from shoal.protocol.memory_transport import Link, MemoryNetwork

LOSS = 0.002  # of frames, each a retransmission later
_PIECE_S = 0.5  # how often a large frame shows that it moves


class DrawnNetwork(MemoryNetwork):
    """See the module. A peer joins with `place`; who was not placed has a link without limits."""

    def __init__(self, seed: int, miniature: Miniature) -> None:
        super().__init__(seed, Link(latency_s=0.0, bytes_per_s=math.inf))
        self._miniature = miniature
        self._machines: dict[PeerId, Machine] = {}
        self._drawn: dict[tuple[PeerId, PeerId], Link] = {}  # between two machines, while both are there
        self.bytes_by_method: dict[str, float] = {}

    def place(self, peer: PeerId, machine: Machine) -> None:
        """This peer runs on this machine."""
        self._machines[peer] = machine
        self._drawn.clear()

    def remove_machine(self, peer: PeerId) -> None:
        """It is gone for good; what is still under way to it arrives over a link without limits."""
        self._machines.pop(peer, None)
        self._drawn.clear()

    def link(self, sender: PeerId, receiver: PeerId) -> Link:
        if (drawn := self._drawn.get((sender, receiver))) is not None:
            return drawn
        one, other = self._machines.get(sender), self._machines.get(receiver)
        if one is None or other is None or one is other:
            return super().link(sender, receiver)
        bytes_per_s = min(one.upload_bytes_per_s, other.download_bytes_per_s)
        drawn = self._drawn[sender, receiver] = Link(one.latency_s + other.latency_s, bytes_per_s, LOSS)
        return drawn

    def pieces(self, sender: PeerId, receiver: PeerId, method: str, frame: bytes) -> tuple[int, ...]:
        payload = payload_bytes_of(frame)
        weight = len(frame) + round(payload * (self._miniature.factor(method) - 1.0))
        self.bytes_by_method[method] = self.bytes_by_method.get(method, 0) + weight
        bytes_per_s = self.link(sender, receiver).bytes_per_s
        count = max(1, math.ceil(weight / (bytes_per_s * _PIECE_S)))
        if count == 1:
            return (weight,)
        each = weight // count
        return (each,) * (count - 1) + (weight - each * (count - 1),)
