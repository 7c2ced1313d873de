"""Replica: the agreed state of a stage at one peer: anchors, outer momentum, log, and recent payloads.

One method changes it, `apply`, in height order. Tensors are never changed in place once they are here, so
readers (serving, snapshots, donors) keep what they took.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from shoal.compression.codec import Buffer
from shoal.protocol.errors import NotHere
from shoal.training.outer.context import Context
from shoal.training.outer.entry import SKIP, Entry, parse
from shoal.training.outer.local import LocalWeights, Rebase, Sent
from shoal.training.outer.log import Log, state_root
from shoal.training.outer.payloads import Payloads
from shoal.training.outer.reduce import Applied, Published, apply_entry
from shoal.training.outer.snapshot import Snapshot


class Replica:
    """The replicated state machine of one stage."""

    def __init__(self, context: Context, snapshot: Snapshot) -> None:
        self._context = context
        self.anchor = snapshot.anchor
        self.momentum = snapshot.momentum
        self.state_root = snapshot.state_root
        self.log = Log(snapshot.state, len(context.parts))
        self.payloads = Payloads(context.spec.outer.payload_budget_bytes)
        self.applied: list[Callable[[Entry, bytes, Mapping[int, Published]], None]] = []

    async def apply(
        self, data: bytes, published: Mapping[int, Published], local: LocalWeights, sent: Sent | None
    ) -> Entry:
        """Take the next entry in: outer step, rebase of local weights, log. All or nothing.

        `sent` is the copy that this process contributed at that height, if it did. Raises Stale or
        MessageInvalid from the log's rules, NotHere for a part that is missing.
        """
        entry = parse(data)
        self.log.check(entry)
        encoded: dict[int, Buffer] = {}
        for part in self._context.parts:
            digest = entry.digest(part.index)
            if digest == SKIP:
                continue
            found = published.get(part.index)
            if found is None or found.digest != digest:
                raise NotHere(f"entry {entry.height}: part {part.index} ({digest.hex()[:8]}) is not here")
            encoded[part.index] = found.encoded
        seat = entry.seat_of(self._context.me, self._context.incarnation)
        row = entry.row_of(seat) if seat is not None else None
        mine = sent if row is not None and sent is not None and sent.inner_step == row.to_step else None
        context = self._context
        result: Applied = await context.offload(
            apply_entry,
            context.strategy,
            context.published,
            context.parts,
            entry,
            encoded,
            self.anchor,
            self.momentum,
            seat,
            mine,
        )
        await local.rebase(result.changes)
        self.log.append(data)
        self.anchor, self.momentum = result.anchor, result.momentum
        self.state_root = state_root(result.digest, self.log.state())
        kept = {part: published[part] for part in encoded}
        self.payloads.keep(entry.height, kept)
        for callback in self.applied:
            callback(entry, data, kept)
        return entry

    async def adopt(
        self, other: Replica, local: LocalWeights, sent: Sent | None = None, listed: Iterable[int] = ()
    ) -> None:
        """Jump to another, verified state: w ← w + (new − a), with s for a in parts that list this peer."""
        listed = set(listed)
        changes = []
        for part in self._context.parts:
            base = sent.weights if sent is not None and part.index in listed else self.anchor
            changes.append(Rebase(part.start, base[part.span], other.anchor[part.span]))
        await local.rebase(changes)
        self.anchor, self.momentum, self.state_root = other.anchor, other.momentum, other.state_root
        self.log, self.payloads = other.log, other.payloads

    def prune(self, snapshot_height: int) -> None:
        """Let go of what is older than the last snapshot and over budget."""
        self.payloads.prune(snapshot_height)
        self.log.prune(snapshot_height)
