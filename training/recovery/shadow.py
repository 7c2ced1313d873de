"""Shadow: a replica's state built beside the one that is used, from a snapshot and the entries after it.

Whoever jumps to another head builds one, and whoever doubts its own state; nothing of it is anybody's until
its head and root are what they have to be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from shoal.protocol.identity import PeerId
from shoal.training.outer.context import Context
from shoal.training.outer.entry import parse
from shoal.training.outer.fetch import fetch_parts
from shoal.training.outer.local import Rebase, Sent, Take
from shoal.training.outer.reduce import Published
from shoal.training.outer.replica import Replica
from shoal.training.outer.snapshot import Snapshot


async def replay(
    context: Context,
    snapshot: Snapshot,
    chain: Iterable[bytes],
    donors: Sequence[PeerId],
    held: Callable[[int], Mapping[int, Published]] = lambda height: {},
) -> Replica:
    """The snapshot with entries applied; parts that are not `held` (at a height) come from the donors.

    Raises NotHere, and Stale or MessageInvalid from the log's rules.
    """
    shadow, unused = Replica(context, snapshot), Nowhere(context.size)
    for data in chain:
        entry = parse(data)
        parts = await fetch_parts(context, entry, dict(held(entry.height)), donors)
        await shadow.apply(data, parts, unused, None)
    return shadow


class Nowhere:
    """Local weights of a shadow, or of a guardian's copy: there are none."""

    inner_steps = 0
    tokens = 0

    def __init__(self, size: int) -> None:
        self.size = size

    async def sent(self, span: slice, take: Take) -> Sent:
        return Sent(torch.empty(0), 0, 0)

    async def rebase(self, changes: Sequence[Rebase]) -> None:
        return None
