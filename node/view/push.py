"""Pushes this peer's events and figures to every live peer with the owner role. Nobody waits for it.

One task an owner: it opens a stream, learns what the owner holds already, and then sends what is new once a
second, or at once while events are left. An owner that is away or refuses is tried again later.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable

from shoal.dht.members import Members
from shoal.node.view.buffer import Buffer
from shoal.node.view.messages import METHOD, TelemetryBatch, TelemetryFigures, TelemetryHello, TelemetryTaken
from shoal.protocol.errors import ShoalError
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.transport import Stream, Transport

EVERY_S = 1.0  # events
FIGURES_S = 5.0
ANSWER_S = 5.0
BACKOFF_S, BACKOFF_MOST_S = 0.5, 4.0  # so that an owner that is back knows all within 10 s
OWNERS = 4  # told at once; of more, those of lowest id
_LOOK_S = 0.5

log = logging.getLogger(__name__)


class Push:
    """`run` until cancelled."""

    def __init__(
        self,
        transport: Transport,
        members: Members,
        buffer: Buffer,
        figures: Callable[[], TelemetryFigures | None],
        process: int,
        rng: random.Random,
    ) -> None:
        self._transport = transport
        self._members = members
        self._buffer = buffer
        self._figures = figures
        self._process = process
        self._rng = rng
        self._telling: dict[PeerId, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Tell whoever is an owner now."""
        try:
            while True:
                self._look()
                await asyncio.sleep(_LOOK_S)
        finally:
            for task in self._telling.values():
                task.cancel()
            await asyncio.gather(*self._telling.values(), return_exceptions=True)

    def _look(self) -> None:
        view = self._members.view()
        owners = [m.peer for m in view.here() if Role.OWNER in m.roles and m.peer != view.me]
        wanted = set(sorted(owners)[:OWNERS])
        for peer in self._telling.keys() - wanted:
            self._telling.pop(peer).cancel()
        for peer in sorted(wanted - self._telling.keys()):
            self._telling[peer] = asyncio.create_task(self._tell(peer), name=f"telemetry to {peer}")

    async def _tell(self, owner: PeerId) -> None:
        failures = 0
        while True:
            try:
                async with self._transport.open(owner, METHOD) as stream:
                    await self._converse(stream)
            except (ShoalError, TimeoutError) as error:
                log.info("telemetry to %s: %s", owner, error)
            failures += 1
            most_s = min(BACKOFF_MOST_S, BACKOFF_S * 2.0 ** min(failures, 8))
            await asyncio.sleep(self._rng.uniform(0.5, 1.0) * most_s)

    async def _converse(self, stream: Stream) -> None:
        loop = asyncio.get_running_loop()
        number = await self._ask(stream, TelemetryHello(self._process))
        figures_s = -math.inf  # when they went last
        while True:
            begun_s = loop.time()
            events, figures = self._buffer.after(number), None
            if begun_s - figures_s >= FIGURES_S:
                figures_s, figures = begun_s, self._figures()
            elif not events:
                await asyncio.sleep(EVERY_S)
                continue
            batch = TelemetryBatch(events, figures, self._buffer.dropped)
            number = max(await self._ask(stream, batch), events[-1].number if events else number)
            if number >= self._buffer.count:
                await asyncio.sleep(max(0.0, begun_s + EVERY_S - loop.time()))

    async def _ask(self, stream: Stream, header: object) -> int:
        async with asyncio.timeout(ANSWER_S):
            await stream.send(header)
            taken: TelemetryTaken = (await stream.receive(TelemetryTaken)).header
        return min(taken.number, self._buffer.count)
