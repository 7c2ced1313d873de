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

    def status(self) -> list[dict[str, object]]:
        """Each guardian and how far its copy is."""
        return [{"peer": guardian.peer, "height": guardian.height} for guardian in self._guardians()]
