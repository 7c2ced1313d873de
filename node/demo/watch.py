"""Listens to all peers of the demo, and sums up what they say. The demo asks it; the screen shows it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

from shoal.node.demo.measure import Heads, Losses
from shoal.node.demo.processes import JsonObject, PeerProcess
from shoal.node.demo.screen import Progress, Screen

_POLL_S = 1.0
_RATE_POLLS = 20


class Watch:
    """Everything heard so far. `heard` is for the peers' events, `run` asks for their statuses."""

    def __init__(self, stages: int, seconds: float, screen: Screen) -> None:
        self.peers: list[PeerProcess] = []
        self.statuses: dict[str, JsonObject] = {}  # the last of each peer, the dead ones' too
        self.heads = Heads()
        self.losses = Losses()
        self.reroutes: list[tuple[float, int]] = []  # (Unix time, stage)
        self.started_s = 0.0
        self._stages = stages
        self._seconds = seconds
        self._screen = screen
        self._marks: deque[tuple[float, int]] = deque(maxlen=_RATE_POLLS)  # (time, tokens)

    def begin(self) -> None:
        """Everybody is online: time counts from here."""
        self.started_s = time.monotonic()

    def heard(self, peer: PeerProcess, event: JsonObject) -> None:
        """An event that a peer printed."""
        match event.get("event"):
            case "held-out":
                self.losses.add(float(event["loss"]), int(event["log_tokens"]))
            case "reroute":
                self.reroutes.append((float(event["at"]), int(event["stage"])))
            case "round" if "head" in event:
                state = str(event["head"]), str(event["state_root"])
                self.heads.add(peer.peer_id, int(event["stage"]), int(event["height"]), *state)
            case "plan":
                self._screen.tell("peer", f"{peer.name} takes stage {peer.stage}", stage=peer.stage)

    async def run(self) -> None:
        """Ask every peer for its status once a second and show the sum, until cancelled."""
        while True:
            alive = [peer for peer in self.peers if peer.alive]
            found = await asyncio.gather(*(peer.status() for peer in alive))
            for peer, status in zip(alive, found, strict=True):
                if status is not None:
                    self.take_status(peer, status)
            self._screen.progress(self._progress())
            await asyncio.sleep(_POLL_S)

    def take_status(self, peer: PeerProcess, status: JsonObject) -> None:
        """A peer's answer on its control socket."""
        self.statuses[peer.name] = status
        training: dict[str, Any] = status["training"]
        if peer.stage is not None and training:
            state = training["head"], training["state_root"]
            self.heads.add(peer.peer_id, peer.stage, training["height"], *state)

    def tokens(self) -> int:
        """Tokens that drivers committed, the dead ones' included."""
        drivers = {peer.name for peer in self.peers if peer.stage == 0}
        return sum(int(s["training"].get("tokens", 0)) for n, s in self.statuses.items() if n in drivers)

    def replicas(self) -> list[int]:
        """Living peers of every stage."""
        stages = [peer.stage for peer in self.peers if peer.alive]
        return [stages.count(stage) for stage in range(self._stages)]

    def _progress(self) -> Progress:
        now, tokens = time.monotonic(), self.tokens()
        self._marks.append((now, tokens))
        then, before = self._marks[0]
        return Progress(
            elapsed_s=round(now - self.started_s, 1),
            seconds=self._seconds,
            loss=self.losses.last,
            tokens=tokens,
            tokens_per_s=round((tokens - before) / (now - then), 1) if now > then else 0.0,
            rounds=[self.heads.group_height(stage, "") for stage in range(self._stages)],
            replicas=self.replicas(),
            peers=sum(peer.alive for peer in self.peers),
        )
