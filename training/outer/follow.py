"""What a member answers on the network: the leader's stream, contributions, published parts, log and parts.

Thin shells around `Member` and `Round`; everything that arrives is bounded here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from shoal.protocol.errors import (
    NotHere,
    PeerSilent,
    ProtocolViolation,
    ShoalError,
    Stale,
    StreamEnded,
)
from shoal.protocol.transport import Channel, Message, Stream
from shoal.training.outer.context import GROUP_ROLES, Context
from shoal.training.outer.entry import ENTRY_BYTES
from shoal.training.outer.line import LEADER_SILENCE_S, MEMBER_TICK_S, Line, lifeline
from shoal.training.outer.member import Member
from shoal.training.outer.messages import (
    Commit,
    ContributedPart,
    Contributing,
    Done,
    EntriesRequest,
    EntryItem,
    Go,
    Gone,
    PartRequest,
    Prepare,
    PublishedPart,
    Publishing,
    Report,
)
from shoal.training.outer.orders import serve_orders
from shoal.training.outer.reentry import Reentering
from shoal.training.outer.round import Round

_SLACK_S = 30.0  # beyond a round's deadlines, before a leader that only ticks counts as lost


async def follow(context: Context, member: Member, line: Line) -> None:
    """One round behind one leader, from PREPARE to DONE."""
    opening = await line.receive(Prepare, max_payload_bytes=ENTRY_BYTES)
    longest_s = context.spec.outer.round_deadline_s
    reporting: list[asyncio.Task[None]] = []  # more than one where a leader begins anew after a vain draft
    try:
        async with asyncio.timeout(4 * longest_s + _SLACK_S):
            line.post(*await member.prepare(opening.header, bytes(opening.payload), line.peer))
            while True:
                message = await line.receive(Go, Gone, Commit, max_payload_bytes=ENTRY_BYTES)
                match message.header:
                    case Go(deadline_s):
                        # The next leader goes on with the same round, and nobody may wait longer then.
                        round_ = await member.go(bytes(message.payload), min(deadline_s, longest_s))
                        reporting.append(asyncio.create_task(_report(round_, line)))
                    case Gone(seat):
                        member.gone(seat)
                    case Commit():
                        await member.commit(bytes(message.payload), [line.peer])
                        line.post(Done(member.replica.log.height, member.replica.log.head))
                        return
    except TimeoutError:
        raise PeerSilent(f"{line.peer} led a round for too long") from None
    except StreamEnded:
        return  # the leader gave the round up
    finally:
        member.disengage(line.peer, opening.header)  # before anything that a cancellation could end
        if unfinished := [task for task in reporting if not task.done()]:
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)


async def _report(round_: Round | Reentering, line: Line) -> None:
    await round_.collected()
    with contextlib.suppress(ShoalError):  # the leader is lost; `follow` notices by itself
        line.post(Report(round_.id), round_.report())


class Services:
    """Serves a member's methods on the transport."""

    def __init__(self, context: Context, member: Member) -> None:
        self._context = context
        self._member = member
        self._following: set[asyncio.Task[None]] = set()

    def serve(self) -> None:
        """Register; the transport owns the handlers' tasks."""
        transport, name = self._context.transport, self._context.method
        transport.serve(name("round"), self._round, GROUP_ROLES)
        transport.serve(name("contribute"), self._contributions, GROUP_ROLES)
        transport.serve(name("publish"), self._published, GROUP_ROLES)
        self.serve_log()

    def serve_log(self) -> None:
        """Only what is agreed: entries, their parts, and the owner's orders that they name."""
        serve_orders(self._context)
        transport, name = self._context.transport, self._context.method
        transport.serve(name("part"), self._part, GROUP_ROLES, Channel.BULK)
        transport.serve(name("entries"), self._entries, GROUP_ROLES, Channel.BULK)

    async def close(self) -> None:
        """No round any more: leaders hear so at once, though the transport stays for what comes next."""
        context, rounds = self._context, ("round", "contribute", "publish")
        context.transport.withdraw({context.method(name) for name in rounds})
        following = list(self._following)
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)

    async def _round(self, stream: Stream) -> None:
        if (handler := asyncio.current_task()) is not None:
            self._following.add(handler)
            handler.add_done_callback(self._following.discard)
        async with lifeline(stream, LEADER_SILENCE_S, MEMBER_TICK_S) as line:
            await follow(self._context, self._member, line)

    async def _contributions(self, stream: Stream) -> None:
        opening = await stream.receive(Contributing)
        round_ = await self._member.round_named(opening.header.draft)
        peer = stream.remote.peer
        seat = round_.expects_from(peer)
        if seat is None:
            raise Stale(f"{peer} does not contribute to draft {round_.id.hex()[:8]}")
        try:
            async for message in _messages(stream, ContributedPart, round_.most_bytes(published=False)):
                round_.take_contribution(seat, message.header.part, message.payload)
        except ProtocolViolation as error:
            self._context.refuse(peer, f"contribution: {error}")
            raise
        finally:
            round_.end_contributions(seat)

    async def _published(self, stream: Stream) -> None:
        opening = await stream.receive(Publishing)
        round_ = await self._member.round_named(opening.header.draft)
        peer = stream.remote.peer
        seat = round_.draft.seat_of(peer)
        if seat is None:
            raise Stale(f"{peer} has no seat in draft {round_.id.hex()[:8]}")
        try:
            async for message in _messages(stream, PublishedPart, round_.most_bytes(published=True)):
                header = message.header
                await round_.take_published(seat, header.part, header.listed, message.payload)
        except ProtocolViolation as error:
            self._context.refuse(peer, f"published part: {error}")
            raise
        finally:
            round_.end_published(seat)

    async def _part(self, stream: Stream) -> None:
        request = (await stream.receive(PartRequest)).header
        found = self._member.part(request.part, request.digest)
        await stream.send(PublishedPart(request.part, found.listed), found.encoded)

    async def _entries(self, stream: Stream) -> None:
        request = (await stream.receive(EntriesRequest)).header
        log = self._member.replica.log
        for height in range(request.from_height, min(request.to_height, log.height) + 1):
            data = log.entry(height)
            if data is None:
                raise NotHere(f"entry {height} is not kept here any more; take a snapshot")
            await stream.send(EntryItem(height), data)


async def _messages(stream: Stream, kind: type[Any], max_payload_bytes: int) -> AsyncIterator[Message[Any]]:
    """All messages up to END."""
    while True:
        try:
            yield await stream.receive(kind, max_payload_bytes=max_payload_bytes)
        except StreamEnded:
            return
