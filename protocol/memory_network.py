"""A network in memory: links with latency, bandwidth, loss, cuts, frozen and killed peers.

The lower half of the transport's memory twin; `memory_transport` builds streams on it, tests and the
simulator break it. It lives on one event loop, normally a VirtualTimeLoop, and draws randomness from the
generator it is given, so a seed and a program determine every arrival; `trace_digest` proves it.

A route carries what one peer sends to another on one channel: first in, first out, as fast as its link.
Loss is what TCP makes of it: nothing disappears, it comes a retransmission later. A cut or a
frozen end holds everything back; what is held longer than keepalive tolerates breaks the connection.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from blake3 import blake3

from shoal.protocol.identity import PeerId
from shoal.protocol.limits import KEEPALIVE_ANSWER_S, KEEPALIVE_S
from shoal.protocol.transport import Channel

_RETRANSMISSION_S = 0.2  # the smallest retransmission timeout of Linux
_MOST_LOST = 8  # in a row; then the simulated TCP gets through
Tamper = Callable[[PeerId, PeerId, str, bytes], bytes | None]


@dataclass(frozen=True, slots=True)
class Link:
    """One direction between two peers."""

    latency_s: float = 0.001
    bytes_per_s: float = 1e9
    loss: float = 0.0  # share of frames that need a retransmission


_LOOPBACK = Link(latency_s=0.0, bytes_per_s=float("inf"))


class Network:
    """Links, faults and who listens. All changes take effect at once."""

    def __init__(self, rng: random.Random | int = 0, link: Link | None = None) -> None:
        self.rng = random.Random(rng) if isinstance(rng, int) else rng
        self.tamper: Tamper | None = None
        """Sees every frame (sender, receiver, method, frame); returns it, another one, or None to lose it."""
        self._link = link or Link()
        self._links: dict[tuple[PeerId, PeerId], Link] = {}
        self._routes: dict[tuple[PeerId, PeerId, Channel], Route] = {}
        self._cuts: set[tuple[PeerId, PeerId]] = set()
        self._frozen: set[PeerId] = set()
        self._trace = blake3()

    def set_link(self, one: PeerId, other: PeerId, link: Link, *, one_way: bool = False) -> None:
        """Replace the link between two peers (one way: from `one` to `other`) for what is sent next."""
        self._links[one, other] = link
        if not one_way:
            self._links[other, one] = link

    def link(self, sender: PeerId, receiver: PeerId) -> Link:
        """The link that `sender` reaches `receiver` by."""
        if sender == receiver:
            return _LOOPBACK
        return self._links.get((sender, receiver), self._link)

    def cut(self, one: PeerId, other: PeerId, *, one_way: bool = False) -> None:
        """Hold back everything between two peers (one way: from `one` to `other`), what is on its way too."""
        self._cuts.add((one, other))
        if not one_way:
            self._cuts.add((other, one))
        self._apply_blocks()

    def heal(self, one: PeerId, other: PeerId) -> None:
        """Undo `cut`, both ways."""
        self._cuts -= {(one, other), (other, one)}
        self._apply_blocks()

    def freeze(self, peer: PeerId) -> None:
        """A stopped process: connections stay open, nothing goes in or out."""
        self._frozen.add(peer)
        self._apply_blocks()

    def thaw(self, peer: PeerId) -> None:
        """Undo `freeze`."""
        self._frozen.discard(peer)
        self._apply_blocks()

    def is_blocked(self, sender: PeerId, receiver: PeerId) -> bool:
        """Whether a cut or a frozen end holds this direction back."""
        return (sender, receiver) in self._cuts or not self._frozen.isdisjoint((sender, receiver))

    def route(self, sender: PeerId, receiver: PeerId, channel: Channel) -> Route:
        """What carries things from `sender` to `receiver`."""
        key = (sender, receiver, channel)
        if key not in self._routes:
            lose = partial(self.connection_lost, sender, receiver)
            self._routes[key] = Route(partial(self._delay, sender, receiver), lose)
            self._routes[key].block(self.is_blocked(sender, receiver))
        return self._routes[key]

    def pieces(self, sender: PeerId, receiver: PeerId, method: str, frame: bytes) -> tuple[int, ...]:
        """The sizes in which a frame crosses. A simulation whose tensors are smaller than those they stand
        for says here what a frame would weigh; each piece that arrives counts as movement of its connection.
        """
        return (len(frame),)

    def trace(self, event: str) -> None:
        """Add an event, with its time, to the trace."""
        self._trace.update(f"{asyncio.get_running_loop().time():.9f} {event}\n".encode())

    def trace_digest(self) -> str:
        """Hex digest of everything that was delivered so far, in order and with times."""
        return self._trace.hexdigest(length=16)

    def connection_lost(self, one: PeerId, other: PeerId) -> None:
        """Keepalive found the connection dead. The transports' half overrides this."""

    def _delay(self, sender: PeerId, receiver: PeerId, size: int) -> tuple[float, float]:
        """(seconds on the wire, seconds until it arrives after that)."""
        link = self.link(sender, receiver)
        lost = 0
        while lost < _MOST_LOST and link.loss and self.rng.random() < link.loss:
            lost += 1
        return size / link.bytes_per_s, link.latency_s + lost * (_RETRANSMISSION_S + 2 * link.latency_s)

    def _apply_blocks(self) -> None:
        for (sender, receiver, _), route in self._routes.items():
            route.block(self.is_blocked(sender, receiver))


class Route:
    """A first-in-first-out queue with delays. Bounded by the windows of the streams that send into it."""

    def __init__(self, delay: Callable[[int], tuple[float, float]], lose: Callable[[], None]) -> None:
        self._delay = delay
        self._lose = lose
        self._queue: deque[tuple[float, Callable[[], None]]] = deque()
        self._free_s = 0.0  # when the link has sent all that it took
        self._last_s = 0.0
        self._blocked = False
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._keepalive: asyncio.TimerHandle | None = None

    def push(self, size: int, deliver: Callable[[], None]) -> float:
        """Call `deliver` when `size` bytes have crossed. Returns when the last one leaves (loop time)."""
        now = self._loop.time()
        sending_s, travelling_s = self._delay(size)
        self._free_s = max(now, self._free_s) + sending_s
        self._last_s = max(self._free_s + travelling_s, self._last_s)
        self._queue.append((self._last_s, deliver))
        self._arm()
        return self._free_s

    def block(self, blocked: bool) -> None:
        """Hold everything back, or let it go again (then it needs the link's latency once more)."""
        if blocked == self._blocked:
            return
        self._blocked = blocked
        if blocked:
            self._keepalive = self._loop.call_later(KEEPALIVE_S + KEEPALIVE_ANSWER_S, self._lose)
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        else:
            if self._keepalive is not None:
                self._keepalive.cancel()
            earliest_s = self._loop.time() + self._delay(0)[1]
            self._queue = deque((max(due_s, earliest_s), deliver) for due_s, deliver in self._queue)
            self._last_s = max(self._last_s, earliest_s)
            self._arm()

    def _arm(self) -> None:
        if self._queue and self._timer is None and not self._blocked:
            self._timer = self._loop.call_at(self._queue[0][0], self._fire)

    def _fire(self) -> None:
        self._timer = None
        now = self._loop.time()
        while self._queue and self._queue[0][0] <= now and not self._blocked:
            self._queue.popleft()[1]()
        self._arm()
