"""The devices of one peer as one of its processes sees them: who it is, and what the ranks pass around.

Rank 0 is the peer itself, the others are its children (`node.devices`). Tensors go by `torch.distributed`:
gloo among CPUs, NCCL among GPUs, over the loopback interface alone. Rows of a micro-batch are dealt out in
order; where they do not divide, the first ranks have one more, and since losses and gradients are sums over
tokens nothing has to be weighted.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shoal.protocol.errors import SpecError
from shoal.training.spec import RunSpec

ANSWER_S = 60.0  # a device that has not done its part of a collective by then is lost
_START_S = 120.0  # for an import of torch by each of them


@dataclass(frozen=True, slots=True)
class Ranks:
    """One process's place among `count`. All methods are collective: every rank calls them in one order."""

    rank: int
    count: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def first(self) -> bool:
        return self.rank == 0

    def use(self) -> None:
        """Make the device this thread's own: CUDA and what builds on it ask for the current one."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def rows(self, batch: int) -> list[int]:
        """How many rows of a micro-batch each rank has."""
        whole, rest = divmod(batch, self.count)
        return [whole + (rank < rest) for rank in range(self.count)]

    def spread(self, whole: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """This rank's rows of rank 0's tensor [B, ...] of this shape and type."""
        rows = self.rows(shape[0])
        if whole is None:
            mine = torch.empty(rows[self.rank], *shape[1:], dtype=dtype, device=self.device)
            dist.recv(mine, 0)
            return mine
        pieces = torch.split(whole.to(self.device, dtype), rows)
        for rank, piece in enumerate(pieces[1:], start=1):
            dist.send(piece.contiguous(), rank)
        return pieces[0]

    def collect(self, mine: torch.Tensor, batch: int) -> torch.Tensor | None:
        """On rank 0 everybody's rows [batch, ...]; None elsewhere."""
        if not self.first:
            dist.send(mine.contiguous(), 0)
            return None
        pieces = [mine]
        for rank, rows in enumerate(self.rows(batch)[1:], start=1):
            pieces.append(mine.new_empty(rows, *mine.shape[1:]))
            dist.recv(pieces[-1], rank)
        return torch.cat(pieces)

    def total(self, mine: float) -> float:
        """The sum over all ranks, the same bits on each; NaN if one of them has it."""
        found = torch.tensor([mine], dtype=torch.float64, device=self.device)
        dist.all_reduce(found)
        return float(found)


def join(rank: int, devices: tuple[str, ...], meeting: Path, answer_s: float) -> Ranks:
    """Meet the other ranks by a file of a folder that only this user can read. Waits for all of them.

    `answer_s`: how long a rank may keep the others waiting afterwards.
    """
    loopback = next(
        (name for name, at in psutil.net_if_addrs().items() if any(a.address == "127.0.0.1" for a in at)),
        "lo",
    )
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback
    device = torch.device(devices[rank])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    count = len(devices)
    store = dist.FileStore(str(meeting), count)  # type: ignore[attr-defined]
    store.set(str(rank), "here")
    store.wait([str(other) for other in range(count)], timedelta(seconds=_START_S))
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        store=store,
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=answer_s),
    )
    return Ranks(rank, count, device, init_device_mesh(device.type, (count,)))


def part() -> None:
    """The end of `join`."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check_rows(spec: RunSpec, devices: int) -> None:
    """Raises SpecError if a device would have nothing to do."""
    if not spec.trains:
        raise SpecError(f"{devices} devices share the work of training, and this run only serves; name one")
    if spec.inner.micro_batch_sequences < devices:
        raise SpecError(
            f"inner.micro_batch_sequences = {spec.inner.micro_batch_sequences} has no row for each of "
            f"{devices} devices; name fewer --devices, or run a peer on each device"
        )
