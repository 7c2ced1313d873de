"""The line between leader and member: a silent peer is noticed, and no peer is blamed for the own silence."""

from __future__ import annotations

import asyncio

import pytest
from transport_world import ANYBODY

from shoal.protocol.errors import PeerSilent
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.memory_transport import MemoryNetwork
from shoal.protocol.transport import Stream
from shoal.protocol.virtual_time import VirtualTimeLoop, run
from shoal.training.outer.line import LEADER_SILENCE_S, MEMBER_SILENCE_S, TICK_S, lifeline
from shoal.training.outer.messages import Done

LEADER, MEMBER = PeerId("leader"), PeerId("member")


class Pair:
    """A leader that says DONE at a given time, and a member that waits for it."""

    def __init__(self, says_at_s: float) -> None:
        network = MemoryNetwork(1)
        roles = frozenset({Role.TRAINER})
        self.network = network
        self.leader, self.member = network.transport(LEADER, roles), network.transport(MEMBER, roles)
        self._says_at_s = says_at_s
        self.heard: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.member.serve("line", self._wait, ANYBODY)

    async def _wait(self, stream: Stream) -> None:
        async with lifeline(stream, LEADER_SILENCE_S) as line:
            try:
                await line.receive(Done)
                self.heard.set_result(asyncio.get_running_loop().time())
            except PeerSilent as error:
                self.heard.set_exception(error)

    async def lead(self) -> float:
        """Returns when the member heard of it. Raises what it met instead."""
        await self.leader.start()
        await self.member.start()
        leading = asyncio.create_task(self._lead())
        try:
            return await self.heard
        finally:
            leading.cancel()
            await asyncio.gather(leading, return_exceptions=True)

    async def _lead(self) -> None:
        async with self.leader.open(MEMBER, "line") as stream, lifeline(stream, MEMBER_SILENCE_S) as line:
            await asyncio.sleep(self._says_at_s)
            line.post(Done(1, bytes(32)))
            await self.heard


def loop() -> VirtualTimeLoop:
    running = asyncio.get_running_loop()
    assert isinstance(running, VirtualTimeLoop)
    return running


def test_ticks_keep_a_quiet_line() -> None:
    async def main() -> None:
        assert await Pair(says_at_s=30.0).lead() < 30.0 + TICK_S

    run(main)


def test_who_stood_still_hears_what_came_meanwhile() -> None:
    async def main() -> None:
        pair = Pair(says_at_s=3.0)
        loop().call_at(1.1, loop().stand_still, 1.5 * LEADER_SILENCE_S)
        assert await pair.lead() < 3.0 + TICK_S

    run(main)


def test_a_silent_leader_is_noticed() -> None:
    async def main() -> None:
        pair = Pair(says_at_s=30.0)
        loop().call_at(1.1, pair.network.freeze, LEADER)
        with pytest.raises(PeerSilent):
            await pair.lead()
        assert loop().time() < 1.1 + LEADER_SILENCE_S + TICK_S

    run(main)
