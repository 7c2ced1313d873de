"""What the all-reduce benchmark compares with: Gloo's all_reduce, and hivemind's AllReduceRunner.

Run by `allreduce.py`, one process a peer; hivemind's in an environment of its own. Both are measured with
their group already formed: Gloo's pairs are connected, hivemind's matchmaking has been done and is not
counted, and its runner has cut its parts and registered its handlers. Neither checks a digest; Gloo does
not encrypt.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import sys
import time
from typing import Any

import torch
from allreduce_harness import System, serve

PART_BYTES = 512 * 1024  # hivemind's own default (averaging/partition.py, DEFAULT_PART_SIZE_BYTES)


class Gloo(System):
    """torch.distributed.all_reduce in fp32."""

    _values = torch.empty(0)

    async def hello(self) -> object:
        return None

    async def meet(self, hellos: list[Any]) -> None:
        import torch.distributed as distributed

        store = f"file://{self.config['folder']}/gloo-{self.peers}"
        await asyncio.to_thread(
            distributed.init_process_group, "gloo", store, rank=self.rank, world_size=self.peers
        )
        self._distributed = distributed

    async def prepare(self, values: torch.Tensor, sign: float) -> None:
        self._values = torch.mul(values, sign, out=self._values)

    async def reduce(self) -> tuple[float, dict[str, float]]:
        self._distributed.all_reduce(self._values)
        self._values.div_(self.peers)
        return time.monotonic(), {}

    def mean(self) -> torch.Tensor:
        return self._values

    async def close(self) -> dict[str, float]:
        self._distributed.destroy_process_group()
        return {}


class Hivemind(System):
    """One AllReduceRunner a round on one P2P daemon a peer, equal shares; deltas are added as they come."""

    _values = torch.empty(0)

    async def hello(self) -> object:
        from hivemind.p2p import P2P

        self._p2p = await P2P.create(host_maddrs=["/ip4/127.0.0.1/tcp/0"])
        addresses = await self._p2p.get_visible_maddrs()
        return [str(address) for address in addresses]

    async def meet(self, hellos: list[Any]) -> None:
        from hivemind.p2p import PeerID
        from hivemind.utils.multiaddr import Multiaddr

        self._round = 0
        self._peer_ids = [PeerID.from_base58(hello[0].rpartition("/p2p/")[2]) for hello in hellos]
        for peer, hello in zip(self._peer_ids, hellos, strict=True):
            if peer != self._p2p.peer_id:
                await self._p2p._client.connect(peer, [Multiaddr(h.rpartition("/p2p/")[0]) for h in hello])

    async def prepare(self, values: torch.Tensor, sign: float) -> None:
        from hivemind.averaging.allreduce import AllReduceRunner
        from hivemind.compression import NoCompression, Uniform8BitQuantization

        self._values = torch.mul(values, sign, out=self._values)
        self._round += 1
        self._runner = AllReduceRunner(
            p2p=self._p2p,
            servicer_type=AllReduceRunner,
            prefix=f"round-{self._round}",
            group_id=b"benchmark",
            tensors=[self._values],
            ordered_peer_ids=self._peer_ids,
            peer_fractions=(1.0 / self.peers,) * self.peers,
            part_size_bytes=PART_BYTES,
            compression=NoCompression() if self.codec == "fp32" else Uniform8BitQuantization(),
        )
        await self._runner.add_p2p_handlers(self._p2p, namespace=f"round-{self._round}")

    async def reduce(self) -> tuple[float, dict[str, float]]:
        async for delta in self._runner:
            self._values.add_(delta)
        return time.monotonic(), {}

    def mean(self) -> torch.Tensor:
        return self._values

    async def close(self) -> dict[str, float]:
        await self._p2p.shutdown()
        return {}


def keep_freed_memory() -> None:
    """What Shoal does for itself (`protocol/allocator.py`), for the others too."""
    if sys.platform.startswith("linux"):
        library = ctypes.CDLL(None)
        library.mallopt(-3, 32 << 20)
        library.mallopt(-1, 256 << 20)


async def run() -> None:
    config = json.loads(sys.stdin.readline())
    await serve({"gloo": Gloo, "hivemind": Hivemind}[config["system"]](config))


if __name__ == "__main__":
    keep_freed_memory()
    torch.set_num_threads(1)
    try:
        import uvloop
    except ImportError:
        asyncio.run(run())
    else:
        uvloop.run(run())
