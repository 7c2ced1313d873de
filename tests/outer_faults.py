"""Faults in a simulated group: a test's own strike at a point of a message, by means of protocol/faults."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from shoal.protocol import faults
from shoal.protocol.faults import Action, Arming
from shoal.protocol.faulty_transport import FaultyTransport
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Buffer, Transport

_PLACES = {"before": "sending", "after": "sent", "receiving": "received"}
Strike = Callable[[PeerId], None]


def _unchanged(peer: PeerId, header: object, payload: Buffer) -> tuple[object, Buffer]:
    return header, payload


class Faults:
    """What is armed. `strike` is called once, when `kind` passes for the `count`-th time at `point`.

    The one who passes runs no further from there (unless `hangs` is off): it is cancelled, or woken.
    """

    def __init__(self, seed: int = 0) -> None:
        self.hangs = True
        self._strikes: dict[Arming, Strike] = {}
        self._awake: list[asyncio.Future[None]] = []
        self._faults = faults.Faults(kill=self._blow, freeze=self._blow, seed=seed)
        self._faults.tamper = _unchanged

    @property
    def hit(self) -> PeerId | None:
        """Who was struck last."""
        return self._faults.struck[-1][1] if self._faults.struck else None

    @property
    def tamper(self) -> faults.Tamper:
        """Changes what is sent."""
        return self._faults.tamper or _unchanged

    @tamper.setter
    def tamper(self, tamper: faults.Tamper) -> None:
        self._faults.tamper = tamper

    def wrap(self, transport: Transport) -> Transport:
        """For `World(wrap=...)`."""
        return FaultyTransport(transport, self._faults)

    def arm(
        self, kind: type, point: str, strike: Strike, *, count: int = 1, who: PeerId | None = None
    ) -> None:
        """Strike "before" or "after" sending, or "receiving", a message; the arming before is off."""
        arming = Arming(f"{kind.__name__}.{_PLACES[point]}", Action.KILL, nth=count, who=who)
        self.disarm()
        self.arm_also(arming, strike)

    def arm_also(self, arming: Arming, strike: Strike = lambda peer: None) -> None:
        """Arm any action at any point, beside the others; `strike` is how this world kills or freezes."""
        self._strikes[arming] = strike
        self._faults.arm(arming)

    def has_struck(self, arming: Arming) -> PeerId | None:
        """At whom, if it did."""
        return next((peer for struck, peer in self._faults.struck if struck is arming), None)

    def disarm(self) -> None:
        """Nothing strikes any more."""
        self._faults.disarm()

    def wake(self) -> None:
        """Frozen processes go on."""
        for future in self._awake:
            if not future.done():
                future.set_result(None)
        self._awake.clear()

    async def _blow(self, peer: PeerId) -> None:
        struck, _ = self._faults.struck[-1]
        self._strikes[struck](peer)
        if self.hangs:
            self._awake.append(asyncio.get_running_loop().create_future())
            await self._awake[-1]
