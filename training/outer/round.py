"""Round: one draft's data plane at one member: contribute, reduce the own parts, publish, collect.

Started by GO. Who is asked for what follows from the draft alone, so no message but the data is needed. A
round never fails: what does not arrive is not held, and what is not held everywhere is skipped by COMMIT.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence

import torch

from shoal.compression.codec import Buffer, CodecError
from shoal.protocol.errors import MessageInvalid, ShoalError
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Channel
from shoal.training.outer.apply import OuterStep
from shoal.training.outer.change import Change
from shoal.training.outer.codecs import RoundCodecs
from shoal.training.outer.context import Context
from shoal.training.outer.contribution import Contribution
from shoal.training.outer.entry import SKIP, Contributor, Entry, draft_id, seats_in
from shoal.training.outer.messages import ContributedPart, Contributing, PublishedPart, Publishing
from shoal.training.outer.owners import Owner
from shoal.training.outer.parts import Fragment, Part
from shoal.training.outer.phases import Phases
from shoal.training.outer.policy import closes_at, is_half, owners
from shoal.training.outer.reduce import Mean, Published, checked, weighted_mean
from shoal.training.outer.report import report
from shoal.training.outer.residuals import Residuals

log = logging.getLogger(__name__)


def draw_owners(context: Context, draft: Entry, fragment: Fragment) -> list[int]:
    """The seat that owns each part: the same at every member."""
    present = draft.present()
    seats = [draft.roster[seat] for seat in present]
    drawn = owners(
        context.run_id,
        context.stage,
        [part.index for part in fragment.parts],
        [seat.peer for seat in seats],
        [seat.uplink for seat in seats],
    )
    return [present[index] for index in drawn]


def delivered(draft: Entry, owner_of: Sequence[int], held: Sequence[bool]) -> dict[Owner, bool]:
    """The owners of a draft's parts, and whether any of theirs came to be held."""
    found: dict[Owner, bool] = {}
    for place, here in zip(owner_of, held, strict=True):
        seat = draft.roster[place]
        owner = Owner(PeerId(seat.peer), seat.incarnation)
        found[owner] = found.get(owner, False) or here
    return found


class Round:
    """What one member does and holds between GO and COMMIT."""

    def __init__(
        self,
        context: Context,
        data: bytes,
        draft: Entry,
        fragment: Fragment,
        codecs: RoundCodecs,
        contribution: Contribution | None,
        residuals: Residuals,
        owner_of: list[int],
        step: OuterStep,
        deadline_s: float,
        phases: Phases,
    ) -> None:
        self.draft = draft
        self.data = data
        self.id = draft_id(data)
        self.contribution = contribution
        self.step = step
        self.held: dict[int, Published] = {}
        self.bytes_out = 0
        self._context = context
        self._parts = fragment.parts  # counted from 0 here and on the wire
        self._codecs = codecs
        self._residuals = residuals
        self.opened_s = asyncio.get_running_loop().time()
        self._deadline_s = deadline_s
        self._phases = phases
        self._mine = draft.seat_of(context.me, context.incarnation)
        self._rows = {row.seat: row for row in draft.contributors}
        self._owner_of = owner_of
        self._to_reduce = {part for part, owner in enumerate(self._owner_of) if owner == self._mine}
        residuals.keep_published(self._parts, {self._parts[part].index for part in self._to_reduce})
        self._remainders: dict[int, torch.Tensor | None] = {}  # of the parts published here
        self._received: defaultdict[int, dict[int, Buffer]] = defaultdict(dict)  # part -> seat -> encoded
        self._gone: set[int] = set()  # seats that take no part any more
        self._awaiting: set[int] = set()  # owners to whom this member's contribution is on its way
        self._sent_all: set[int] = set()  # contributors from whom nothing more will come
        self._published_all: set[int] = set()  # owners from whom nothing more will come
        self._quorum_s: float | None = None
        self._change = Change()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin; `close` ends it."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop whatever is still under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.step.close()

    def mark_gone(self, seat: int) -> None:
        """The leader says that a seat is not there any more."""
        self._gone.add(seat)
        self._change.notify()

    async def collected(self) -> None:
        """Returns when every part is held that can still come, or at twice the deadline."""
        limit_s = self.opened_s + 2 * self._deadline_s
        self._phases.begin("collect")
        await self._change.until(lambda: not self._awaited_parts(), lambda: limit_s)
        self._phases.end("collect")
        self._phases.begin("decide")

    def report(self) -> bytes:
        """For the leader: what is held."""
        return report(self.held, len(self._parts), self.draft.bitmap_bytes)

    def delivered(self, entry: Entry) -> dict[Owner, bool]:
        """The owners in this round, and whether any of their parts are in its entry; none for another's."""
        if (entry.roster, entry.fragment) != (self.draft.roster, self.draft.fragment):
            return {}
        held = [entry.digest(part) != SKIP for part in range(entry.parts)]
        return delivered(self.draft, self._owner_of, held)

    def remainders(self, entry: Entry) -> dict[int, torch.Tensor | None]:
        """What the means published here left out, by part index, as far as an entry commits them."""
        return {
            self._parts[part].index: remainder
            for part, remainder in self._remainders.items()
            if self.held[part].digest == entry.digest(part)
        }

    # -- what arrives

    def most_bytes(self, *, published: bool) -> int:
        """Of one part's payload."""
        codec_of = self._codecs.published if published else self._codecs.contribution
        return max(codec_of(number).encoded_bytes(part.count) for number, part in enumerate(self._parts))

    def _part(self, part: int) -> Part:
        if part >= len(self._parts):
            raise MessageInvalid(f"part {part} of {len(self._parts)}")
        return self._parts[part]

    def expects_from(self, peer: str) -> int | None:
        """The seat of a peer that contributes to this round."""
        seat = self.draft.seat_of(peer)
        return seat if seat in self._rows else None

    def take_contribution(self, seat: int, part: int, data: Buffer) -> None:
        """One contributed part; what is late is left out. Its bytes are checked when they are summed.

        Raises MessageInvalid for a part or a size that cannot be.
        """
        count, codec = self._part(part).count, self._codecs.contribution(part)
        most, size = codec.encoded_bytes(count), memoryview(data).nbytes
        if size > most or (codec.exact and size != most):
            raise MessageInvalid(f"part {part}: {size} bytes, {most} expected")
        if part in self._to_reduce and seat not in self._received[part] and seat not in self._sent_all:
            self._received[part][seat] = data
            self._change.notify()

    def end_contributions(self, seat: int) -> None:
        """The seat's stream is over, in whatever way."""
        self._sent_all.add(seat)
        self._change.notify()

    async def take_published(self, seat: int, part: int, listed: bytes, data: Buffer) -> None:
        """One published part from its owner. Raises MessageInvalid for bytes no encoder makes, and for a
        bitmap that no entry may have: all would refuse the entry that this part is in.
        """
        count, seats = self._part(part).count, seats_in(listed)
        if len(listed) != self.draft.bitmap_bytes or not seats or not seats <= self._rows.keys():
            raise MessageInvalid(f"part {part} lists {sorted(seats)[:8]}, in {len(listed)} bytes")
        if self._owner_of[part] != seat or part in self.held:
            return
        published = await self._context.offload(
            checked, self._codecs.published(part), part, listed, data, count
        )
        self._hold(part, published)

    def _hold(self, part: int, published: Published) -> None:
        if part not in self.held:
            self.held[part] = published
            self.step.begin(part, published)
            self._change.notify()

    def end_published(self, seat: int) -> None:
        """The owner's stream is over, in whatever way."""
        self._published_all.add(seat)
        self._change.notify()

    # -- what goes out

    async def _run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                if self._mine in self._rows:
                    self._awaiting = set(self._owner_of) - {self._mine}
                    for owner in sorted(set(self._owner_of)):
                        tasks.create_task(self._contribute(owner))
                if self._to_reduce:
                    for seat in self.draft.present():
                        if seat != self._mine:
                            tasks.create_task(self._publish(seat))
                    tasks.create_task(self._reduce())
        except* Exception as errors:  # a bug of ours: its streams broke, so nobody waits for this peer
            log.error("the work of a round failed", exc_info=errors)
            why = "; ".join(repr(error) for error in errors.exceptions)
            self._context.event("round-failed", {"height": self.draft.height, "why": why})
            self._to_reduce.clear()
            self._change.notify()

    async def _contribute(self, owner: int) -> None:
        """Send the owner its parts; nothing but END when this peer has nothing that the draft could list."""
        self._phases.begin("send")
        if owner == self._mine:
            async for part, data in self._encoded(owner):
                self._received[part][owner] = data
                self._change.notify()
            self.end_contributions(owner)
            return
        peer = self.draft.roster[owner].peer
        method = self._context.method("contribute")
        await self._meet(peer)
        try:
            async with self._context.transport.open(peer, method, Channel.BULK) as stream:
                await stream.send(Contributing(self.id))
                async for part, data in self._encoded(owner):
                    await stream.send(ContributedPart(part), data)
                    self.bytes_out += memoryview(data).nbytes
        except ShoalError as error:  # not listed then: the delta stays in the local weights
            self._context.event("contribution-cut", {"owner": peer, "why": str(error)})
        self._awaiting.discard(owner)
        self._change.notify()
        self._phases.end("send")

    async def _encoded(self, owner: int) -> AsyncIterator[tuple[int, Buffer]]:
        """The parts that a seat owns, as this peer contributes to them: each once it is encoded."""
        if (mine := self.contribution) is None:
            return
        for part in mine.order:
            if self._owner_of[part] == owner:
                data = await mine.encoded(self._parts[part])
                if data is not None:
                    yield part, data

    def _encoded_all(self) -> bool:
        return self.contribution is None or self.contribution.ended

    async def _reduce(self) -> None:
        """Close each part when all who still can have contributed, or the rest at the deadline or grace."""
        self._phases.begin("reduce")
        while self._to_reduce:
            await self._change.until(lambda: bool(self._closable()), self._closes_at)
            for part in self._closable() or sorted(self._to_reduce):
                await self._close_part(part)
        self._phases.end("reduce")

    def _closable(self) -> list[int]:
        awaited = self._rows.keys() - self._gone - self._sent_all
        self._note_quorum(awaited)
        return [part for part in sorted(self._to_reduce) if awaited <= self._received[part].keys()]

    def _note_quorum(self, awaited: set[int]) -> None:
        """When half of the others' weight is in; the own contribution crosses no link."""
        others = {seat: row.tokens for seat, row in self._rows.items() if seat != self._mine}
        complete = others.keys() - awaited
        complete |= {seat for seat in others if all(seat in self._received[part] for part in self._to_reduce)}
        if self._quorum_s is None and complete and is_half(others, complete):
            self._quorum_s = asyncio.get_running_loop().time()

    def _closes_at(self) -> float:
        return closes_at(self.opened_s, self._quorum_s, self._deadline_s)

    async def _close_part(self, part: int) -> None:
        contributions: list[tuple[Contributor, Buffer]] = [
            (self._rows[seat], data) for seat, data in sorted(self._received[part].items())
        ]
        section = self._context.spec.compression
        try:
            mean: Mean = await self._context.offload(
                weighted_mean,
                self._codecs.contribution(part),
                self._codecs.published(part),
                contributions,
                self._parts[part].count,
                len(self.draft.roster),
                self._residuals.published(self._parts[part]),
                section.feedback_decay if section.feedback else None,
            )
        except (CodecError, MemoryError, RuntimeError) as error:  # the last is torch's for no memory
            # Or it is too large to publish: skipped by all, and nothing is lost.
            self._context.event("part-not-published", {"part": part, "why": str(error)})
            mean = Mean(None, {})
        for seat, reason in mean.refused.items():
            self._context.refuse(self.draft.roster[seat].peer, f"contribution to part {part}: {reason}")
        self._to_reduce.discard(part)
        self._received.pop(part, None)
        if mean.published is not None:
            self._remainders[part] = mean.remainder
            self._hold(part, mean.published)
        self._change.notify()

    async def _publish(self, seat: int) -> None:
        """Send every part of mine to one member as soon as it is closed, and the contribution is there.

        On a slow link that goes first: what its owner makes of it has to come back, too. Where it waits for
        this peer's encoder instead, and parts are closed without it, the link is free, and so are the others.
        """
        remaining = set(self._to_reduce)
        peer = self.draft.roster[seat].peer
        limit_s = self.opened_s + self._deadline_s

        def may_send() -> bool:
            late = not remaining <= self._to_reduce and not self._encoded_all()
            return late or seat not in self._awaiting or seat in self._gone

        await self._change.until(may_send, lambda: limit_s)
        await self._meet(peer)
        try:
            async with self._context.transport.open(
                peer, self._context.method("publish"), Channel.BULK
            ) as stream:
                await stream.send(Publishing(self.id))
                while remaining and seat not in self._gone:
                    await self._change.until(
                        lambda: seat in self._gone or not remaining <= self._to_reduce, lambda: None
                    )
                    ready = sorted(remaining - self._to_reduce)
                    for part in ready:
                        published = self.held.get(part)
                        if published is not None:
                            await stream.send(PublishedPart(part, published.listed), published.encoded)
                            self.bytes_out += memoryview(published.encoded).nbytes
                    remaining.difference_update(ready)
        except ShoalError as error:  # that member fetches by digest, or misses the round and catches up
            self._context.event("publication-cut", {"member": peer, "why": str(error)})

    async def _meet(self, peer: PeerId) -> None:
        """The leader named it; of a large swarm not everybody knows everybody."""
        await self._context.meet(peer, (self._context.me, self.draft.leader, peer))

    def _awaited_parts(self) -> list[int]:
        return [
            part
            for part, owner in enumerate(self._owner_of)
            if part not in self.held
            and (part in self._to_reduce if owner == self._mine else self._may_publish(owner))
        ]

    def _may_publish(self, owner: int) -> bool:
        return owner not in self._gone and owner not in self._published_all
