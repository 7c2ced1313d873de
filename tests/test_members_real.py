"""Membership on real sockets: a killed process is missed by its closed connection, not by its silence."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from members_process import __file__ as program
from members_process import peer

from shoal.dht.liveness import Liveness
from shoal.dht.view import SwarmView
from shoal.protocol.admission import OwnerKey
from shoal.protocol.identity import Role
from shoal.protocol.wire import encode


def three_alive(view: SwarmView) -> bool:
    return sum(member.liveness is Liveness.ALIVE for member in view.members) == 3


def test_a_killed_process_is_gone_at_once_and_a_leaving_one_says_so(tmp_path: Path) -> None:
    owner = OwnerKey.create(tmp_path / "owner", bytes(32), "test", time.time())
    token = owner.issue_token([Role.TRAINER], 3600.0, (), "volunteer", time.time())

    async def story() -> None:
        async with peer(token) as first, peer(token) as second:
            await second.learn((first.own_record()[0],), "the test")
            known = encode(first.own_record()[0]).hex()
            child = await asyncio.create_subprocess_exec(sys.executable, program, token.encode(), known)
            try:
                for members in (first, second):
                    await members.wait_for(three_alive, 60.0)
                (victim,) = {m.peer for m in first.view().members} - {first.me, second.me}
            finally:
                child.kill()
                await child.wait()
            for members in (first, second):
                view = await members.wait_for(lambda view: view.is_gone(victim), 30.0)
                dead = view.get(victim)
                assert dead is not None
                assert dead.departed
                assert "refused" in dead.reason
            await second.leave("done")
            view = await first.wait_for(lambda view: view.is_gone(second.me), 30.0)
            left = view.get(second.me)
            assert left is not None
            assert left.reason == "said goodbye"

    asyncio.run(story())
