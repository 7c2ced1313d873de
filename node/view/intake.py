"""What an owner's peer takes from the others: bounded, budgeted, and filed under the authenticated sender.

A flood costs its sender its stream. Events beyond a peer's budget are acknowledged and counted, not kept. The
holders of one token cannot take the places of all others.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from shoal.node.view.figures import Told
from shoal.node.view.messages import METHOD, TelemetryBatch, TelemetryEvent, TelemetryHello, TelemetryTaken
from shoal.protocol.errors import Busy, Stale, StreamEnded
from shoal.protocol.identity import PeerId, Role, VerifiedPeer
from shoal.protocol.transport import Stream, Transport

PEERS = 2048  # told of at most; who was silent longest makes room
PEERS_OF_A_TOKEN = 256
BATCHES, BATCHES_PER_S = 80.0, 5.0  # a full buffer's, and what an honest peer sends with some to spare
EVENTS, EVENTS_PER_S = 2048.0, 10.0
TOKEN_EVENTS, TOKEN_EVENTS_PER_S = 65_536.0, 100.0  # of all holders of one token: names are cheap
SILENCE_S = 30.0  # a stream on which nothing comes for so long is given up
Take = Callable[[PeerId, int, tuple[TelemetryEvent, ...]], None]  # peer, process, new events in order


@dataclass(slots=True)
class _Budget:
    left: float
    as_of_s: float

    def spend(self, cost: float, now_s: float, most: float, per_s: float) -> bool:
        self.left = min(most, self.left + (now_s - self.as_of_s) * per_s)
        self.as_of_s = now_s
        if self.left < cost:
            return False
        self.left -= cost
        return True


class Intake:
    """Of one coordinator."""

    def __init__(self, take: Take, held: Callable[[PeerId], tuple[int, int]]) -> None:
        """`held`: process and number of a peer's last event that is on disk, zeros if none is."""
        self.told: dict[PeerId, Told] = {}
        self.taken = self.refused = 0  # events
        self.floods = 0
        self._take = take
        self._held = held
        self._tokens: dict[PeerId, str] = {}
        self._batches: dict[PeerId, _Budget] = {}
        self._events: dict[PeerId, _Budget] = {}
        self._token_events: dict[str, _Budget] = {}

    def serve(self, transport: Transport) -> None:
        """Answer the method for all members."""
        transport.serve(METHOD, self._answer, frozenset(Role))

    @property
    def dropped(self) -> int:
        """Events that fell out of the peers' own buffers."""
        return sum(told.dropped for told in self.told.values())

    async def _answer(self, stream: Stream) -> None:
        hello: TelemetryHello = (await stream.receive(TelemetryHello)).header
        sender, process = stream.remote, hello.process
        told = self._admit(sender, process)
        await stream.send(TelemetryTaken(told.number))
        while True:
            try:
                async with asyncio.timeout(SILENCE_S):
                    batch: TelemetryBatch = (await stream.receive(TelemetryBatch)).header
            except (StreamEnded, TimeoutError):
                return
            if self.told.get(sender.peer) is not told:
                raise Stale(f"another process of {sender.peer} tells of itself")
            self._spend_batch(sender)
            self._file(sender, told, batch)
            await stream.send(TelemetryTaken(told.number))

    def _admit(self, sender: VerifiedPeer, process: int) -> Told:
        peer = sender.peer
        told = self.told.get(peer)
        if told is None or told.process != process:
            if told is None:
                self._make_room(sender)
            held_process, number = self._held(peer)
            told = self.told[peer] = Told(process)
            told.number = number if held_process == process else 0
            self._tokens[peer] = sender.token_id
        return told

    def _make_room(self, sender: VerifiedPeer) -> None:
        if Counter(self._tokens.values())[sender.token_id] >= PEERS_OF_A_TOKEN:
            self._forget(min(self._of(sender.token_id), key=lambda peer: self.told[peer].told_s))
        elif len(self.told) >= PEERS:
            self._forget(min(self.told, key=lambda peer: self.told[peer].told_s))

    def _of(self, token_id: str) -> list[PeerId]:
        return [peer for peer, token in self._tokens.items() if token == token_id]

    def _forget(self, peer: PeerId) -> None:
        del self.told[peer]
        token_id = self._tokens.pop(peer)
        self._batches.pop(peer, None)
        self._events.pop(peer, None)
        if token_id not in self._tokens.values():
            self._token_events.pop(token_id, None)

    def _spend_batch(self, sender: VerifiedPeer) -> None:
        now_s = asyncio.get_running_loop().time()
        budget = self._batches.setdefault(sender.peer, _Budget(BATCHES, now_s))
        if not budget.spend(1.0, now_s, BATCHES, BATCHES_PER_S):
            self.floods += 1
            raise Busy(f"more than {BATCHES_PER_S:g} batches of telemetry a second", retry_after_s=10.0)

    def _file(self, sender: VerifiedPeer, told: Told, batch: TelemetryBatch) -> None:
        now_s = asyncio.get_running_loop().time()
        own = self._events.setdefault(sender.peer, _Budget(EVENTS, now_s))
        shared = self._token_events.setdefault(sender.token_id, _Budget(TOKEN_EVENTS, now_s))
        new = []
        for event in batch.events:
            if event.number <= told.number:
                continue  # sent again
            told.number = event.number
            if own.spend(1.0, now_s, EVENTS, EVENTS_PER_S) and shared.spend(
                1.0, now_s, TOKEN_EVENTS, TOKEN_EVENTS_PER_S
            ):
                new.append(event)
            else:
                self.refused += 1
        told.dropped = batch.dropped
        if batch.figures is not None:
            told.take(batch.figures, now_s)
        self.taken += len(new)
        if new:
            self._take(sender.peer, told.process, tuple(new))
