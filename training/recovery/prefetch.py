"""Pre-copy: a stage's newest snapshot on the own disk before this peer becomes one of its replicas.

`tenure` calls it while the peer still serves another stage. Recovery then finds the snapshot as after a
restart and fetches the tail only; what is wrong with it shows there, as on any disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shoal.protocol.faults import define
from shoal.protocol.faulty_transport import point
from shoal.protocol.identity import PeerId
from shoal.training.outer.context import Context
from shoal.training.recovery.download import download, newest_offer
from shoal.training.recovery.snapshot import is_kept
from shoal.training.recovery.snapshots import snapshot_path, stage_directory, store

_STORING, _STORED = define("copy.storing"), define("copy.stored")


async def prefetch(context: Context, donors: Sequence[PeerId], directory: Path) -> int:
    """The height of what is on disk then; 0: the stage has no snapshot yet. Raises NotHere, StorageError."""
    if not donors:
        return 0  # an empty stage: its guardians or its disks bring it back
    offer, donors = await newest_offer(context, donors)
    height, folder = offer.manifest.height, stage_directory(context, directory)
    path, root = snapshot_path(folder, height), offer.manifest.state_root
    if height and not await context.offload(is_kept, path, root):
        snapshot = await download(context, offer, donors)
        await point(context.transport, _STORING)
        await context.offload(store, folder, snapshot, height)
        await point(context.transport, _STORED)
    return height
