"""What a peer finds out before it knows anybody: what its machine is; and what torch needs is imported.

Both take a thread for a second or more, so the daemon begins before it looks for the swarm, and the worker
waits for it once there is a stage to hold.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from shoal.node.hardware import Device, choose_devices, warm_up
from shoal.node.options import PeerOptions


@contextlib.asynccontextmanager
async def preparing(options: PeerOptions) -> AsyncIterator[asyncio.Task[Device] | None]:
    """The device, once all is ready for it; awaited, it raises as `choose_devices`. None: no training."""
    if not options.train:
        yield None
        return
    task = asyncio.create_task(_prepare(options), name="prepare the device")
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _prepare(options: PeerOptions) -> Device:
    device = await asyncio.to_thread(
        choose_devices, options.devices, options.memory_bytes, options.threads, options.host_optimizer
    )
    await asyncio.to_thread(warm_up)
    return device
