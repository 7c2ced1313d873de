"""What a stage has of its guardians: they keep an entry before a lone replica commits it, and bring the stage
back when all its replicas are gone. Belongs to one replica's `Outer`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from shoal.protocol.errors import MessageInvalid
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Channel, call
from shoal.training.outer.ask_around import ask_around, reasons
from shoal.training.outer.claims import Claims
from shoal.training.outer.context import Context
from shoal.training.outer.entry import Entry, entry_hash
from shoal.training.outer.messages import Keep, Kept
from shoal.training.outer.policy import GroupMember

State = tuple[int, bytes, bytes]  # height, head, state root
KEEP_S = 3.0  # for a guardian to have an entry; then the replica goes on alone, and tells


class Guarded:
    """See the module. `guardians()`: those of the stage that are alive, with the state each one tells."""

    def __init__(self, context: Context, guardians: Callable[[], Sequence[GroupMember]]) -> None:
        self._context = context
        self._guardians = guardians
        self._claims = Claims()
        self._followed_at = -1  # the height from which some were followed last
        self.alone = 0  # entries that no guardian had before COMMIT, though there was one

    async def secure(self, entry: Entry, data: bytes) -> bool:
        """Of an entry with one member: returns when a guardian has it, there is none, or none answers.

        False where there was nobody to wait for.
        """
        guardians = [guardian.peer for guardian in self._guardians()]
        if len(entry.present()) > 1 or not guardians:
            return False
        why = f"no answer within {KEEP_S:g} s"
        try:
            async with asyncio.timeout(KEEP_S):
                found, failures = await ask_around(
                    self._context, guardians, lambda guardian: self._hand_over(guardian, data)
                )
            if found is not None:
                return True
            why = reasons(failures)
        except TimeoutError:
            pass
        self.alone += 1
        self._context.event("guardian-silent", {"height": entry.height, "why": why})
        return True

    async def _hand_over(self, guardian: PeerId, data: bytes) -> Kept:
        reply = await call(
            self._context.transport,
            guardian,
            self._context.method("keep"),
            Keep(),
            Kept,
            timeout_s=KEEP_S,
            payload=data,
            channel=Channel.BULK,
        )
        if reply.header.head != entry_hash(data):
            raise MessageInvalid(f"{guardian} keeps another entry than the one it was given")
        return reply.header

    def states(self) -> dict[State, list[GroupMember]]:
        """What guardians tell, and who tells it, the lowest first: each is verified and goes on from the one
        before, so a lie about a high one costs nothing but the attempt."""
        found: dict[State, list[GroupMember]] = {}
        for guardian in self._guardians():
            if not self._context.refused[guardian.peer]:
                state = guardian.height, guardian.head, guardian.state_root
                found.setdefault(state, []).append(guardian)
        return dict(sorted(found.items()))

    def beyond(self, height: int, now_s: float) -> list[GroupMember]:
        """Those that tell of entries beyond a log that is about to go on: whoever committed them may be gone,
        and who came meanwhile not have heard of them. Once at a height, for who tells of them may lie."""
        if self._followed_at == height:
            return []
        aside = self._claims.aside(now_s)
        states = self.states().items()
        told = [guardian for (at, _, _), guardians in states if at > height for guardian in guardians]
        return [guardian for guardian in told if guardian.peer not in aside]

    def followed(self, guardians: Sequence[GroupMember], height: int, reached: bool, now_s: float) -> None:
        """What these told of was sought, from that height on."""
        peers, self._followed_at = [guardian.peer for guardian in guardians], height
        if reached:
            self._claims.kept(peers)
        else:
            self._claims.failed(peers, 2 * len(peers) + 1, now_s)

    def status(self) -> list[dict[str, object]]:
        """Each guardian and how far its copy is."""
        return [{"peer": guardian.peer, "height": guardian.height} for guardian in self._guardians()]
