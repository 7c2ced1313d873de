"""Pre-copy: a stage's newest snapshot on the own disk before this peer becomes one of its replicas.

`tenure` calls it while the peer still serves another stage. Recovery then finds the snapshot as after a
restart and fetches the tail only; what is wrong with it shows there, as on any disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shoal.protocol.errors import NotHere
from shoal.protocol.faults import define
from shoal.protocol.faulty_transport import point
from shoal.protocol.identity import PeerId
from shoal.training.outer.ask_around import ask_around, reasons
from shoal.training.outer.context import Context
from shoal.training.recovery.download import ask_manifest, download
from shoal.training.recovery.snapshots import stage_directory, store

_STORING, _STORED = define("copy.storing"), define("copy.stored")


async def prefetch(context: Context, donors: Sequence[PeerId], directory: Path) -> int:
    """The height of what is on disk then; 0: the stage has no snapshot yet. Raises NotHere, StorageError."""
    if not donors:
        return 0  # an empty stage: its guardians or its disks bring it back
    offer, failures = await ask_around(context, donors, lambda donor: ask_manifest(context, donor, 0))
    if offer is None:
        raise NotHere(f"a snapshot of stage {context.stage}: {reasons(failures)}")
    height = offer.manifest.height
    if height:
        snapshot = await download(context, offer, donors)
        await point(context.transport, _STORING)
        await context.offload(store, stage_directory(context, directory), snapshot, height)
        await point(context.transport, _STORED)
    return height
