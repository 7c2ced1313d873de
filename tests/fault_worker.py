"""One replica as a process of its own, for the fault tests: real rounds, real sockets, weights made by hand.

`fault_nursery` forks it; how it lives and obeys is in `fault_line`. Everything it does to its weights follows
from the order's seed, so that `fault_ledger` can count after it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from fault_line import LineWorker
from fault_orders import JsonObject, Order, start_of, step_of, tokens_of
from fault_weights import Course, LaneWeights

from shoal.compression.codec import bytes_of
from shoal.dht.beats import Beat, StageBeat
from shoal.protocol.amendments import AmendmentBook, SignedAmendments
from shoal.protocol.wire import decode
from shoal.training.amended import Amended
from shoal.training.neighbours import group_members
from shoal.training.outer.service import Outer
from shoal.training.spec import RunSpec


class Worker(LineWorker):
    """The replica."""

    def __init__(self, order: Order, writer: asyncio.StreamWriter) -> None:
        super().__init__(order, writer)
        self._genesis, self._pattern = start_of(order.seed, order.size)
        self.weights = LaneWeights(self._genesis, self.lane, self._change_of)
        self._told = b""  # the head
        token = self.membership.token
        self._orders = Amended(
            spec := RunSpec.model_validate(order.spec),
            AmendmentBook(token.run_id, token.root_der),  # no heartbeat fills it: who is not told has to ask
        )
        self.outer = Outer(
            spec,
            0,
            me=self.transport.me,
            incarnation=order.incarnation,
            transport=self.transport,
            weights=self.weights,
            genesis=self._genesis,
            peers=lambda: group_members(self.members.view(), order.incarnation, self._beat()),
            suspect=self.members.suspect,
            offload=asyncio.to_thread,
            rng=self._rng,
            event=self._event,
            directory=Path(order.directory) if order.directory else None,
            amended=self._orders,
        )

    def serve(self) -> None:
        self.outer.serve()

    async def take_part(self) -> None:
        await self.outer.recover()
        self.announce("online")
        self.start(self.outer.run())
        self.start(self._tell_heights())

    # -- commands

    async def do_step(self, count: int) -> JsonObject:
        """Make inner steps."""
        for _ in range(count):
            await self.weights.work()
            self._stepped()
        return {"inner_steps": self.weights.inner_steps}

    async def do_spoil(self) -> None:
        """A value of the outer momentum changes, as in broken memory."""
        self.outer.momentum[0] += 1.0

    async def do_order(self, signed: str) -> None:
        """Hear what the owner has ordered."""
        self._orders.adopt(decode(SignedAmendments, bytes.fromhex(signed)))

    async def do_train(self, **course: Any) -> JsonObject:
        """Make the inner steps of a `Course` and tell what it measured."""
        found = await Course(**course).run(self.weights, self._stepped, self._height_and_bytes)
        return {"inner_steps": self.weights.inner_steps, **found}

    async def do_hand_in(self) -> None:
        """Return when the log holds all steps made until now."""
        await self.outer.final_round()

    def _stepped(self) -> None:
        self.outer.stepped()
        self.members.changed_now()

    def _height_and_bytes(self) -> tuple[int, int]:
        return self.outer.height, sum(of_rounds(self._bare.counters().bytes_out).values())

    def _change_of(self, step: int) -> tuple[torch.Tensor, int]:
        order = self.order
        scale = step_of(order.seed, order.number, order.incarnation, step)
        return self._pattern * scale, tokens_of(order.number)

    async def do_status(self) -> JsonObject:
        """Where it stands; tensors by their digests."""
        counters = self._bare.counters()
        return {
            **self._standing(),
            "inner_steps": self.weights.inner_steps,
            "anchor": blake3(bytes_of(self.outer.anchor)).hexdigest(),
            "momentum": blake3(bytes_of(self.outer.momentum)).hexdigest(),
            "bytes_out": of_rounds(counters.bytes_out),
            "bytes_in": of_rounds(counters.bytes_in),
            "outer": self.outer.status(),
            "members": {m.peer: [m.liveness.value, m.reason] for m in self.members.view().members},
        }

    async def do_dump(self, path: str) -> None:
        """Write anchor and weights, [2, size] fp32."""
        await asyncio.to_thread(torch.save, torch.stack([self.outer.anchor, self.weights.weights]), path)

    # -- what it tells

    def _standing(self) -> JsonObject:
        outer = self.outer
        return {"height": outer.height, "head": outer.head.hex(), "state_root": outer.state_root.hex()}

    async def _tell_heights(self) -> None:
        while True:
            self._told = self.outer.head
            self.say(event="height", **self._standing(), at_s=asyncio.get_running_loop().time())
            await self.outer.wait_until(lambda: self.outer.head != self._told)

    def _event(self, kind: str, data: dict[str, object]) -> None:
        said: JsonObject = {"event": kind, "data": data, "at_s": asyncio.get_running_loop().time()}
        if kind == "round":
            self.members.changed_now()
            entry = self.outer.entry(self.outer.height)
            said["entry"] = entry.encode().hex() if entry is not None else ""
        self.say(**said)

    def beat(self) -> Beat:
        return Beat(stages=(self._beat(),))

    def _beat(self) -> StageBeat:
        outer = self.outer
        return StageBeat(
            0,
            height=outer.height,
            head=outer.head,
            state_root=outer.state_root,
            log_tokens=outer.tokens,
            inner_steps=self.weights.inner_steps,
            tokens=self.weights.tokens,
            steps_since_round=outer.steps_since_round,
            tokens_since_round=outer.tokens_since_round,
        )


def of_rounds(counted: Mapping[str, int]) -> dict[str, int]:
    """Bytes by method, of rounds and recovery."""
    return {method: count for method, count in counted.items() if method.startswith("outer.")}
