"""Finding out that one is shut out. The daemon runs it; the list itself is `protocol.revocation`."""

from __future__ import annotations

import asyncio
import contextlib

from shoal.dht.liveness import Liveness
from shoal.node.presence import Presence
from shoal.node.reachability import say_hello
from shoal.node.signed_spec import fetch_spec
from shoal.protocol.errors import NotHere, ShoalError, TokenRevoked
from shoal.protocol.identity import PeerId
from shoal.training.outer.ask_around import first_good

_ASKED_WHEN_ALONE = 4
_PARDON_S = 15.0  # to find somebody, and to hear of a newer list


async def leave_when_revoked(presence: Presence) -> None:
    """Raises TokenRevoked once the owner's list names this peer.

    Others cut a revoked peer off before the list reaches it. So when nobody talks to it any more, it
    asks one who used to; a single liar among live peers cannot send it away. And whoever comes back with a
    list that names it asks first whether there is a newer one: it may have been pardoned.
    """
    book, changed = presence.membership.revocations, asyncio.Event()
    book.changed.append(changed.set)
    presence.members.on_event(lambda event: changed.set())
    if book.is_revoked(presence.membership.me):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PARDON_S):
                await _ask_for_pardon(presence)
    while not book.is_revoked(presence.membership.me):
        await _ask_if_alone(presence)
        changed.clear()
        await changed.wait()
    raise TokenRevoked(
        f"the run's owner has shut this peer out (revocation list {book.version} names "
        f"token {presence.token.token_id} or this peer)\nonly a new token from the owner helps"
    )


async def _ask_for_pardon(presence: Presence) -> None:
    """Returns once a newer list lets this peer back, or somebody refuses it still."""
    membership = presence.membership

    async def ask(peer: PeerId) -> bool:
        with contextlib.suppress(TokenRevoked):
            await fetch_spec(presence.transport, peer, membership)
            if membership.revocations.is_revoked(membership.me):
                raise NotHere(f"{peer} has no newer list either")
        return True

    while membership.revocations.is_revoked(membership.me):
        if (await first_good(presence.others(), ask))[0]:
            return
        await presence.members.changed()


async def _ask_if_alone(presence: Presence) -> None:
    """Raises TokenRevoked if that is what the others, all silent by now, say when dialled; whatever else one
    of them says is no reason to go."""
    others = [member for member in presence.members.view().members if member.peer != presence.transport.me]
    if any(member.liveness is Liveness.ALIVE for member in others):
        return
    for member in others[:_ASKED_WHEN_ALONE]:
        try:
            await say_hello(presence.transport, member.peer)
        except TokenRevoked:
            raise
        except ShoalError:
            continue
