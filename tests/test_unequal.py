"""Unequal replicas: each gets work by its speed, and together they do what they can. In virtual time."""

from __future__ import annotations

import asyncio

import torch
from pipeline_world import World, batches, small_spec

from shoal.protocol import virtual_time

FAST_S, SLOW_S = 0.3, 1.2  # lane time of a micro-batch
WARM_UP_S, MEASURED_S = 30.0, 90.0


def test_each_replica_works_by_its_speed_and_none_idles() -> None:
    """Three stages of two replicas, one of them four times slower."""

    async def main() -> None:
        spec = small_spec(3, mode="stream", in_flight=12)
        (tokens,) = batches(spec, 1)

        async def next_batch() -> torch.Tensor:
            return tokens

        async with World(spec, 2, service_s=lambda stage, number: (FAST_S, SLOW_S)[number]) as world:
            driving = [asyncio.create_task(driver.run(next_batch)) for driver in world.drivers()]
            await asyncio.sleep(WARM_UP_S)
            before = [len(peer.ledger) for peer in world.peers]
            await asyncio.sleep(MEASURED_S)
            done = [len(peer.ledger) - count for peer, count in zip(world.peers, before, strict=True)]
            for task in driving:
                task.cancel()
            await asyncio.gather(*driving, return_exceptions=True)
        fast_share = SLOW_S / (FAST_S + SLOW_S)
        for stage in range(3):
            fast, slow = done[2 * stage : 2 * stage + 2]
            rate = (fast + slow) / MEASURED_S
            share = fast / (fast + slow)
            print(f"stage {stage}: {rate:.2f} a second, {share:.3f} by the fast one")
            assert rate >= 0.9 * (1 / FAST_S + 1 / SLOW_S)
            assert abs(share - fast_share) <= 0.15 * fast_share
            assert abs((1 - share) - (1 - fast_share)) <= 0.15 * (1 - fast_share)

    virtual_time.run(main)
