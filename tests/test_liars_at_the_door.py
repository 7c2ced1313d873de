"""One peer's word keeps no newcomer out, and sends nobody home."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import cast

import pytest

from shoal.dht.liveness import Liveness
from shoal.dht.view import Member, SwarmView
from shoal.node import revoked, signed_spec
from shoal.node.presence import Presence
from shoal.node.signed_spec import SignedSpec
from shoal.protocol.admission import Membership
from shoal.protocol.errors import NotHere, ShoalError, StorageError, TokenExpired, TokenRevoked, WrongRole
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Transport

LIARS, SPEC = ("a liar", "another liar"), cast(SignedSpec, object())


def a_presence(*others: str, liveness: Liveness = Liveness.ALIVE) -> Presence:
    """Of "me", among others."""
    members = tuple(Member(peer=PeerId(name), liveness=liveness) for name in sorted((*others, "me")))
    view = SwarmView(PeerId("me"), 0.0, members)
    stub = SimpleNamespace(
        members=SimpleNamespace(view=lambda: view),
        transport=SimpleNamespace(me=PeerId("me")),
        membership=None,
        rng=random.Random(1),
    )
    stub.others = lambda: Presence.others(cast(Presence, stub))
    return cast(Presence, stub)


@pytest.mark.parametrize("lie", [TokenRevoked, TokenExpired, WrongRole])
def test_a_newcomer_asks_on_where_one_says_that_it_is_shut_out(
    monkeypatch: pytest.MonkeyPatch, lie: type[ShoalError]
) -> None:
    async def fetch(transport: Transport, peer: PeerId, membership: Membership) -> SignedSpec:
        if peer in LIARS:
            raise lie("you are not wanted here")
        return SPEC

    monkeypatch.setattr(signed_spec, "fetch_spec", fetch)
    found = asyncio.run(Presence._ask_for_spec(a_presence(*LIARS, "honest"), {}))
    assert found is SPEC
    with pytest.raises(lie, match="not wanted"):  # where all say so
        asyncio.run(Presence._ask_for_spec(a_presence(*LIARS), {}))


@pytest.mark.parametrize("said", [NotHere, StorageError, WrongRole, ShoalError])
def test_who_is_alone_leaves_for_nothing_but_a_revocation(
    monkeypatch: pytest.MonkeyPatch, said: type[ShoalError]
) -> None:
    async def hello(transport: Transport, peer: PeerId) -> None:
        raise (said if peer in LIARS else TokenRevoked)("go home")

    monkeypatch.setattr(revoked, "say_hello", hello)
    asyncio.run(revoked._ask_if_alone(a_presence(*LIARS, liveness=Liveness.GONE)))
    with pytest.raises(TokenRevoked):
        asyncio.run(revoked._ask_if_alone(a_presence(*LIARS, "the owner", liveness=Liveness.GONE)))
