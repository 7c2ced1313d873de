"""Control actions that only the owner's daemon performs: orders, their log, tokens.

The page and the command line ask for them on the control socket. Orders are performed one at a time, off the
loop (`desk`); then this peer takes the signed lists over and spreads them. On a peer without the owner's key
the same actions say where to run them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from shoal.node.control import Action
from shoal.node.events import Events
from shoal.node.gathering import Gathering
from shoal.node.owner.audit import AuditEntry
from shoal.node.owner.desk import Here, OrderDesk
from shoal.node.owner.home import OwnerHome
from shoal.node.owner.orders import (
    DIRECTED,
    KINDS,
    NAME_CHARACTERS,
    Order,
    parse_order,
    parse_token_order,
    text_of,
)
from shoal.node.presence import Presence
from shoal.protocol.errors import NetworkError, UsageError
from shoal.protocol.unbroken import unbroken

_SHOWN, _SHOWN_MOST = 100, 1000
_NUMBER_MOST = 2**53


class OwnerActions:
    """Belongs to one daemon. `presence` and `gathering` give None while it starts."""

    def __init__(
        self,
        home: OwnerHome | None,
        presence: Callable[[], Presence | None],
        gathering: Callable[[], Gathering | None],
        events: Events,
    ) -> None:
        self._desk = OrderDesk(home) if home is not None else None
        self._presence = presence
        self._gathering = gathering
        self._events = events
        self._one = asyncio.Lock()

    def actions(self) -> dict[str, Action]:
        """By the names they have on the control socket."""
        return {
            "order": self._order,
            "orders": self._orders,
            "tokens": self._tokens,
            "token_create": self._token_create,
            "token_revoke": self._token_revoke,
        }

    async def _order(self, request: Mapping[str, Any]) -> object:
        desk, presence = self._here()
        order = parse_order(request)
        if order.what in DIRECTED and order.peer in (presence.transport.me, presence.name):
            raise UsageError("that is the owner's own peer\nstop it with: shoal leave")
        return await self._alone(presence, lambda: self._performed(desk, presence, order))

    async def _alone(self, presence: Presence, perform: Callable[[], Awaitable[AuditEntry]]) -> object:
        """What was signed is spread, whether or not somebody still waits for it."""

        async def performed() -> AuditEntry:
            entry = await perform()
            self._spread(presence, entry)
            return entry

        async with self._one:
            return (await unbroken(performed())).to_json()

    async def _performed(self, desk: OrderDesk, presence: Presence, order: Order) -> AuditEntry:
        if order.what != "checkpoint":
            return await asyncio.to_thread(desk.perform, order, _swarm(presence))
        done = await asyncio.to_thread(desk.done, order.key)
        gathering = self._gathering()
        if gathering is None:
            raise NetworkError("this peer is still starting\ntry again in a moment")
        if done is not None:
            return done
        number = gathering.ask()["number"]
        return await asyncio.to_thread(desk.note, order, f"checkpoint {number} is being gathered")

    async def _orders(self, request: Mapping[str, Any]) -> object:
        desk, _ = self._here()
        most = _whole(request, "most", _SHOWN, _SHOWN_MOST)
        before = _whole(request, "before", 0, _NUMBER_MOST) or None
        return {"kinds": list(KINDS), **await asyncio.to_thread(desk.overview, most, before)}

    async def _tokens(self, request: Mapping[str, Any]) -> object:
        desk, _ = self._here()
        return await asyncio.to_thread(desk.tokens)

    async def _token_create(self, request: Mapping[str, Any]) -> object:
        desk, _ = self._here()
        return await asyncio.to_thread(desk.create_token, parse_token_order(request))

    async def _token_revoke(self, request: Mapping[str, Any]) -> object:
        desk, presence = self._here()
        token_id = text_of(request, "id", NAME_CHARACTERS)
        who = text_of(request, "who", NAME_CHARACTERS) or "local"
        return await self._alone(presence, lambda: asyncio.to_thread(desk.revoke_token, token_id, who))

    def _spread(self, presence: Presence, entry: AuditEntry) -> None:
        """Take over what was signed, and tell."""
        if entry.what in ("ban", "unban", "token_revoke"):  # a long list takes a while to read
            presence.membership.revocations.reload()
        else:
            presence.membership.amendments.reload()
        fields = entry.to_json()
        self._events("order", {**fields, "text": f"order of {entry.who}: {entry.what}: {entry.text}"})

    def _here(self) -> tuple[OrderDesk, Presence]:
        if self._desk is None:
            raise UsageError(
                "this peer does not hold the owner's key, so it can order nothing\n"
                "run it on the machine of `shoal up`, with its --data-dir"
            )
        presence = self._presence()
        if presence is None:
            raise NetworkError("this peer is still starting\ntry again in a moment")
        return self._desk, presence


def _swarm(presence: Presence) -> Here:
    view = presence.members.view()
    return {m.peer: (m.name, m.incarnation) for m in view.here() if m.peer != view.me}


def _whole(request: Mapping[str, Any], name: str, default: int, most: int) -> int:
    value = request.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise UsageError(f"{name} has to be a whole number of at most {most}")
    return value
