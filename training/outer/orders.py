"""The owner's settings, asked for: a peer that is shown a revision it does not know asks whoever shows it.

Heartbeats bring the list as a rule (`dht.link`). Where they do not, a member would keep its group waiting in
every round, and never get past an entry under the new settings. `member` and the guardians ask; all answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.protocol.amendments import SignedAmendments
from shoal.protocol.errors import NotHere, Stale
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Stream, call
from shoal.training.outer.ask_around import ask_around
from shoal.training.outer.context import GROUP_ROLES, Context
from shoal.training.outer.messages import OrdersRequest

METHOD = "orders"
ORDERS_LAG_S = 2.0  # the owner's newest settings may still be on their way here
_ASK_S = 1.0
_ASKED = 3


async def knows(context: Context, revision: int, holders: Sequence[PeerId]) -> bool:
    """Whether the settings of a revision are known here, perhaps because one of `holders` gave them."""
    amended = context.amended
    if revision <= amended.revision:
        return True

    async def ask(peer: PeerId) -> None:
        method = context.method(METHOD)
        answer = await call(
            context.transport, peer, method, OrdersRequest(), SignedAmendments, timeout_s=_ASK_S
        )
        amended.adopt(answer.header)
        if revision > amended.revision:
            raise Stale(f"{peer} knows no revision {revision} of the settings either")

    await ask_around(context, [peer for peer in holders if peer != context.me][:_ASKED], ask)
    return await amended.known(revision, ORDERS_LAG_S)


def serve_orders(context: Context) -> None:
    """Give the owner's list to members of the group."""

    async def answer(stream: Stream) -> None:
        await stream.receive(OrdersRequest)
        if (signed := context.amended.signed) is None:
            raise NotHere("the owner has ordered nothing yet")
        await stream.send(signed)

    context.transport.serve(context.method(METHOD), answer, GROUP_ROLES)
