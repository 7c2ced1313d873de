"""Whom a text may ask for a stage: its live replicas, but for those that refused or failed lately.

And who stands by for each stage. `chain` owns one; the choices themselves are pure (`choice`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from shoal.protocol.errors import Busy, NetworkError, ProtocolViolation, ShoalError
from shoal.protocol.identity import PeerId
from shoal.training.pipeline.replicas import Replica, Replicas
from shoal.training.serving.choice import choose, stand_by

MOST_AVOID_S = 60.0
_AVOID_S = 2.0  # a server that failed; twice as long after each further failure
_LOOK_S = 0.25  # at least, between two choices of who stands by


class Candidates:
    """Of one text."""

    def __init__(self, replicas: Replicas, stages: int, rng: random.Random) -> None:
        self.standby: list[PeerId | None] = [None] * stages
        self._replicas, self._rng = replicas, rng
        self._avoid_until_s: dict[PeerId, float] = {}
        self._failures: dict[PeerId, int] = {}
        self._look_s = 0.0

    def known(self, stage: int) -> Sequence[Replica]:
        """All of a stage."""
        return self._replicas.of_stage(stage)

    def next(self, stage: int, now_s: float) -> PeerId | None:
        """Who is asked now: whoever stands by, or the best one."""
        kept = [one for one in self.known(stage) if one.peer == self.standby[stage]]
        return choose(kept, self._avoid_until_s, now_s, 0.0) or self.another(stage, None, now_s)

    def another(self, stage: int, but: PeerId | None, now_s: float) -> PeerId | None:
        """The best one but this."""
        known = [one for one in self.known(stage) if one.peer != but]
        return choose(known, self._avoid_until_s, now_s, self._rng.random())

    def instead(self, stage: int, chain: Sequence[PeerId | None], now_s: float) -> Sequence[Replica]:
        """The stage's server in this chain, and those without a part in it that could be asked."""
        return [
            one
            for one in self.known(stage)
            if one.peer == chain[stage]
            or (one.peer not in chain and self._avoid_until_s.get(one.peer, now_s) <= now_s)
        ]

    def stand_by(self, chain: Sequence[PeerId | None], now_s: float) -> None:
        """Choose for each stage who goes on if its server fails."""
        if now_s < self._look_s:
            return
        self._look_s = now_s + _LOOK_S
        for stage, kept in enumerate(self.standby):
            draw = self._rng.random()
            self.standby[stage] = stand_by(self.known(stage), chain, kept, self._avoid_until_s, now_s, draw)

    def failed(self, peer: PeerId, trouble: ShoalError, now_s: float) -> None:
        """Remember it, so that the next choice is a better one."""
        if isinstance(trouble, NetworkError | ProtocolViolation):
            self._replicas.suspect(peer, f"session: {trouble}")
        if isinstance(trouble, Busy):
            avoid_s = trouble.retry_after_s
        else:
            failures = self._failures[peer] = self._failures.get(peer, 0) + 1
            avoid_s = min(_AVOID_S * 2.0 ** (failures - 1), MOST_AVOID_S)
        self.avoid(peer, now_s + avoid_s * self._rng.uniform(0.8, 1.2))

    def avoid(self, peer: PeerId, until_s: float) -> None:
        """Do not ask it before then."""
        self._avoid_until_s[peer] = until_s

    def forgive(self) -> None:
        """All may be asked again."""
        self._avoid_until_s.clear()
