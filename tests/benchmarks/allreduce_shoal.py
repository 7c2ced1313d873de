"""The Shoal worker of the all-reduce benchmark: the real Outer on the gRPC transport, mutual TLS and all.

Run by `allreduce.py` and `slow_link.py`, one process a peer. A round is measured from the moment when a round
is due at everybody until local weights have moved: PREPARE, GO, contributions, means, reports, COMMIT, outer
step and rebase. What the state root takes after that is told by itself: training does not wait for it. The
outer step is plain (rate 1, no momentum), so the anchor moves by the mean.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import random
import struct
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import uvloop
from allreduce_harness import System, serve

from shoal.compression import kernels
from shoal.protocol.admission import JoinToken, Membership
from shoal.protocol.allocator import keep_freed_memory
from shoal.protocol.contacts import ContactBook
from shoal.protocol.grpc_transport import GrpcTransport
from shoal.protocol.identity import Contact, PeerId, PeerKey
from shoal.training.outer.entry import Entry, seats_in
from shoal.training.outer.local import MemoryWeights, Rebase, Sent, Take
from shoal.training.outer.service import GroupMember, Outer
from shoal.training.spec import RunSpec

CODECS = {"fp32": "float32"}  # the spec's names where ours differ
TOKENS = 1000  # a step, at every peer: equal weights
_OFFLOAD_THREADS = 2  # as the daemon has
_BEAT = struct.Struct("<Q32s32s")  # height, head, state root
_SETTLE_S = 0.05  # between looks whether the last round's streams are closed
_ROUND_LIMIT_S = 60.0


def spec_of(config: dict[str, Any]) -> RunSpec:
    """One inner step a round, deadlines out of the way, memory in its steady state after four rounds."""
    codec = CODECS.get(config["codec"], config["codec"])
    outer: dict[str, object] = {
        "inner_steps": 1,
        "learning_rate": 1.0,
        "momentum": 0.0,
        "nesterov": False,
        "round_deadline_s": 40.0,
        "snapshot_every": 1,
        "payload_budget_bytes": 64 << 20,
    }
    outer |= {"part_bytes": config["part_kib"] << 10} if config.get("part_kib") else {}
    compression = {"contribution": codec, "published": codec, "warmup_rounds": 0}
    return RunSpec.model_validate({"outer": outer, "compression": compression})


class Board:
    """The peers' last beats, in a file that all map: membership without traffic on the wire."""

    def __init__(self, path: Path, peers: int) -> None:
        with path.open("a+b") as file:
            file.truncate(peers * _BEAT.size)
            self._memory = mmap.mmap(file.fileno(), peers * _BEAT.size)

    def write(self, rank: int, outer: Outer) -> None:
        """Where this peer is."""
        _BEAT.pack_into(self._memory, rank * _BEAT.size, outer.height, outer.head, outer.state_root)

    def read(self, rank: int) -> tuple[int, bytes, bytes]:
        """Where another one is: height, head, state root."""
        height, head, root = _BEAT.unpack_from(self._memory, rank * _BEAT.size)
        return int(height), bytes(head), bytes(root)


class Weights(MemoryWeights):
    """Used by a thread of their own, as by a compute lane; note when a round moved them."""

    def __init__(self, initial: torch.Tensor) -> None:
        super().__init__(initial)
        self.moved_s = 0.0
        self._lane = ThreadPoolExecutor(1, thread_name_prefix="lane")

    async def sent(self, span: slice, take: Take) -> Sent:
        return await asyncio.get_running_loop().run_in_executor(self._lane, self.sent_now, span, take)

    async def rebase(self, changes: Sequence[Rebase]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._lane, self.rebase_now, changes)
        self.moved_s = time.monotonic()


def least_listed(entry: Entry) -> int:
    """Contributions in the part that has fewest; a part that is skipped has none."""
    return min(len(seats_in(entry.listed_in(part))) for part in range(entry.parts))


class Shoal(System):
    """One replica. Once the parent has released all, each knows that all have made their step."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        membership = Membership(JoinToken.parse(config["token"]), PeerKey.generate(), time.time)
        self._membership = membership
        self._contacts = ContactBook()
        self._transport = GrpcTransport(
            membership, self._contacts, config["host"], upload_bytes_per_s=config.get("upload")
        )
        self._genesis = torch.zeros(config["mib"] * (1 << 20) // 4)
        self._weights = Weights(self._genesis)
        self._board = Board(Path(config["folder"]) / "beats", self.peers)
        self._change = torch.empty(0)
        self._names: list[PeerId] = []
        self._due = False
        self._before = self._genesis
        self._applied = asyncio.Event()
        self._ended_s = self._round_s = self._root_s = 0.0
        self._contributors = 0
        self._pool = ThreadPoolExecutor(_OFFLOAD_THREADS, thread_name_prefix="offload")
        self._outer = Outer(
            spec_of(config),
            0,
            me=self._transport.me,
            incarnation=1,
            transport=self._transport,
            weights=self._weights,
            genesis=self._genesis,
            peers=self._group,
            suspect=lambda peer, reason: print(f"suspect {peer}: {reason}", file=sys.stderr),
            offload=self._offload,
            rng=random.Random(self._transport.me),
            event=self._event,
        )
        self._running: asyncio.Task[None] | None = None

    async def hello(self) -> object:
        self._board.write(self.rank, self._outer)
        self._outer.serve()
        await self._transport.start()
        return [self._transport.me, self._transport.port, [der.hex() for der in self._membership.chain]]

    async def meet(self, hellos: list[Any]) -> None:
        hosts = self.config["hosts"]
        for host, (peer, port, chain) in zip(hosts, hellos, strict=True):
            self._names.append(PeerId(peer))
            ders = tuple(bytes.fromhex(der) for der in chain)
            self._contacts.learn(Contact(PeerId(peer), (f"{host}:{port}",), ders))
        await self._outer.recover()
        self._running = asyncio.create_task(self._outer.run())

    async def prepare(self, values: torch.Tensor, sign: float) -> None:
        await asyncio.sleep(_SETTLE_S)
        while (counters := self._transport.counters()).streams_in or counters.streams_out:
            await asyncio.sleep(_SETTLE_S)  # the leader still waits for somebody's DONE
        self._due = False
        self._before = self._outer.anchor
        self._applied.clear()
        self._change = await asyncio.to_thread(torch.mul, values, sign, out=self._change)
        self._weights.step(self._change, TOKENS)

    async def reduce(self) -> tuple[float, dict[str, float]]:
        self._due = True
        self._outer.stepped()
        applied = asyncio.create_task(self._applied.wait())
        waited = {applied, self._running} if self._running is not None else {applied}
        await asyncio.wait(waited, timeout=_ROUND_LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
        if not applied.done():
            raise SystemExit(f"rank {self.rank}: no round in {_ROUND_LIMIT_S:.0f} s; {self._outer.status()}")
        figures = {"round_s": self._round_s, "root_s": self._root_s}
        return self._ended_s, {**figures, "lost": self.peers - self._contributors}

    def mean(self) -> torch.Tensor:
        return self._outer.anchor - self._before

    async def close(self) -> dict[str, float]:
        counters = self._transport.counters()
        figures = {"transport_bytes_out": float(sum(counters.bytes_out.values()))}
        figures["rounds_failed"] = float(str(self._outer.status()["failed"]))
        figures["parts_skipped"] = float(str(self._outer.status()["skipped_parts"]))
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        await self._transport.close()
        self._pool.shutdown()
        return figures

    def _group(self) -> Sequence[GroupMember]:
        members = []
        for rank, peer in enumerate(self._names):
            height, head, root = self._board.read(rank)
            steps = int(self._due and height == self._outer.height)
            members.append(
                GroupMember(
                    peer=peer,
                    incarnation=1,
                    height=height,
                    head=head,
                    state_root=root,
                    steps_since_round=steps,
                    tokens_since_round=TOKENS * steps,
                )
            )
        return members

    def _event(self, kind: str, data: dict[str, object]) -> None:
        if kind == "round":
            self._due = False
            self._board.write(self.rank, self._outer)
            self._ended_s, self._round_s = self._weights.moved_s, float(str(data["seconds"]))
            self._root_s = time.monotonic() - self._ended_s
            entry = self._outer.entry(self._outer.height)
            self._contributors = least_listed(entry) if entry is not None else 0
            self._applied.set()
        elif kind != "round-open":
            print(f"{kind}: {data}", file=sys.stderr, flush=True)

    async def _offload(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)


async def run() -> None:
    await serve(Shoal(json.loads(sys.stdin.readline())))


if __name__ == "__main__":
    keep_freed_memory()
    torch.set_num_threads(1)
    kernels.warm()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
