"""Whoever comes asks for the run's spec and for its own pardon: peers that stand still cost it seconds."""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from outer_world import inline
from trust_world import World

from shoal.node.presence import Presence
from shoal.node.revoked import leave_when_revoked
from shoal.node.signed_spec import SignedSpec, serve_spec
from shoal.protocol.admission import Membership
from shoal.protocol.errors import NetworkError, TokenRevoked
from shoal.protocol.identity import PeerId, PeerKey, Role
from shoal.protocol.memory_transport import MemoryNetwork
from shoal.protocol.revocation import RevocationBook
from shoal.protocol.virtual_time import run
from shoal.training.spec import RunSpec

TRAINER = frozenset({Role.TRAINER})
FROZEN = [PeerId(f"frozen-{number}") for number in range(8)]
HERE = PeerId("here")


class Run:
    """A run of which eight peers stand still, and one answers unless it is frozen, too."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spec = RunSpec()
        self.trust = World(folder / "owner", self.spec.run_id())
        self.network = MemoryNetwork(random.Random(1))
        self.answering = self.member()

    def member(self) -> Membership:
        owner = self.trust.owner
        book = RevocationBook(owner.run_id, owner.root_der)
        return Membership(self.trust.token(), PeerKey.generate(), lambda: self.trust.now, book)

    async def joined(self, member: Membership) -> Any:
        """The presence of who has come, as far as it is needed here."""
        signed = SignedSpec.sign(self.spec, self.trust.owner)
        for peer in (*FROZEN, HERE):
            transport = self.network.transport(peer, TRAINER)
            serve_spec(transport, lambda: signed, self.answering)
            await transport.start()
            if peer != HERE:
                self.network.freeze(peer)
        mine = self.network.transport(PeerId("me"), TRAINER)
        await mine.start()
        others = [*FROZEN, HERE]
        here = [SimpleNamespace(peer=peer, name=str(peer), liveness=None) for peer in others]
        view = SimpleNamespace(here=lambda: here, members=here)
        members = SimpleNamespace(
            view=lambda: view, changed=asyncio.Event().wait, on_event=lambda callback: None
        )
        fake: Any = SimpleNamespace(transport=mine, membership=member, members=members, token=member.token)
        fake.others, fake.spec = lambda: others, None
        fake._ask_for_spec = functools.partial(Presence._ask_for_spec, fake)
        return fake


def play(folder: Path, scene: Callable[[Run], Coroutine[Any, Any, None]]) -> None:
    run(functools.partial(scene, Run(folder)))


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual time has none."""
    monkeypatch.setattr(asyncio, "to_thread", inline)


def test_a_joiner_learns_the_spec_though_those_asked_first_stand_still(tmp_path: Path) -> None:
    """What was: five seconds for each, all in one order, and after thirty it gave up."""

    async def scene(there: Run) -> None:
        joiner = await there.joined(there.member())
        found = await Presence.learn_spec(joiner, tmp_path / "mine")
        assert found.spec == there.spec

    (tmp_path / "mine").mkdir(mode=0o700)
    play(tmp_path, scene)


def test_a_joiner_whom_nobody_answers_names_them(tmp_path: Path) -> None:
    async def scene(there: Run) -> None:
        joiner = await there.joined(there.member())
        there.network.freeze(HERE)
        many = [PeerId(f"frozen-{number}") for number in range(len(FROZEN), 40)]
        for peer in many:
            await there.network.transport(peer, TRAINER).start()
            there.network.freeze(peer)
        joiner.others = lambda: [*FROZEN, HERE, *many]
        with pytest.raises(NetworkError, match=r"(?s)frozen-\d+: .*\njoin again in a while"):
            await Presence.learn_spec(joiner, tmp_path)

    play(tmp_path, scene)


def test_who_was_pardoned_hears_of_it_though_those_asked_first_stand_still(tmp_path: Path) -> None:
    """What was: the first of them took all the time that there was to ask."""

    async def scene(there: Run) -> None:
        back, owner = there.member(), there.trust.owner
        assert back.revocations.adopt(owner.revoke(peers=[back.me.peer]))
        assert there.answering.revocations.adopt(owner.pardon(back.me.peer))
        waiting = asyncio.create_task(leave_when_revoked(await there.joined(back)))
        await asyncio.sleep(60.0)
        assert not back.revocations.is_revoked(back.me)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    play(tmp_path, scene)


def test_who_is_refused_still_leaves(tmp_path: Path) -> None:
    async def scene(there: Run) -> None:
        back = there.member()
        listed = there.trust.owner.revoke(peers=[back.me.peer])
        assert back.revocations.adopt(listed)
        assert there.answering.revocations.adopt(listed)
        with pytest.raises(TokenRevoked, match="only a new token"):
            await leave_when_revoked(await there.joined(back))

    play(tmp_path, scene)
