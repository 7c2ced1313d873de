"""What a rank computes of a replica: its rows of each micro-batch, with its shards of the weights.

`RankReplica` is the same on all ranks. `ShardedCompute` is rank 0's face to the pipeline, a `StageCompute`
that deals rows out and puts answers together; `Gang` has the other ranks do what it does.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from shoal.protocol.errors import MessageInvalid
from shoal.training.devices.ranks import Ranks
from shoal.training.devices.shards import Shards
from shoal.training.devices.stage import ShardedModel
from shoal.training.devices.weights import Command, ShardWeights
from shoal.training.lane import InlineLane, Lane
from shoal.training.model.layout import stage_layout
from shoal.training.model.split import Tape
from shoal.training.partition import stage_ranges
from shoal.training.pipeline.compute import Passage, StageCompute
from shoal.training.spec import RunSpec


class RankReplica:
    """One rank's share. Every method is collective."""

    def __init__(
        self,
        spec: RunSpec,
        stage: int,
        ranks: Ranks,
        initial: torch.Tensor | None,
        lane: Lane,
        command: Command,
        host_optimizer: bool,
    ) -> None:
        """`initial`: rank 0's whole weights."""
        self.layout = stage_layout(spec, stage_ranges(spec)[stage])
        self.ranks = ranks
        shards = Shards(self.layout, ranks)
        own = shards.dealt(initial)
        self.weights = ShardWeights(
            spec, self.layout, own, lane, shards, command, host_optimizer=host_optimizer
        )
        self.compute = StageCompute(
            spec, ShardedModel(spec, self.layout), self.weights, str(ranks.device), lambda: 0.0
        )
        self._width, self._dtype = spec.model.width, getattr(torch, spec.model.dtype)

    def forward(
        self, batch: int, columns: int, tokens: torch.Tensor | None, inputs: torch.Tensor | None
    ) -> tuple[Passage, torch.Tensor | None]:
        """A micro-batch of tokens [batch, columns], rank 0's; its output there, unless that is the loss."""
        passage = Passage(self.ranks.spread(tokens, (batch, columns), torch.int64))
        if not self.layout.first:
            passage.inputs = self.ranks.spread(inputs, (batch, columns - 1, self._width), self._dtype)
        self.compute.forward(passage)
        if self.layout.last or passage.output is None:
            return passage, None
        return passage, self.ranks.collect(passage.output.detach(), batch)

    def backward(
        self, passage: Passage, batch: int, gradient: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, float]:
        """`StageCompute.input_gradient`, put together on rank 0 where somebody upstream wants it."""
        length = passage.tokens.shape[1] - 1
        mine = None
        if not self.layout.last:
            mine = self.ranks.spread(gradient, (batch, length, self._width), self._dtype)
        found, loss = self.compute.input_gradient(passage, mine)
        total = self.ranks.total(loss)
        return (None if self.layout.first else self.ranks.collect(found, batch)), total


def _nobody(*_: object) -> AbstractContextManager[None]:
    """A child commands none."""
    return nullcontext()


class Follower:
    """A child's replicas, and the commands it knows."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._replicas: dict[int, RankReplica] = {}
        self._passages: dict[tuple[int, int], Passage] = {}

    def obey(self, number: int, do: str, arguments: list[Any]) -> None:
        """Do what rank 0 does now with one of its replicas."""
        if do == "open":
            values, stage, host_optimizer = arguments
            spec = RunSpec.model_validate(values)
            self._replicas[number] = RankReplica(
                spec, stage, self._ranks, None, InlineLane(), _nobody, host_optimizer
            )
            return
        if do == "close":
            self._replicas.pop(number, None)
            self._passages = {key: kept for key, kept in self._passages.items() if key[0] != number}
            return
        if do == "forget":
            self._passages.pop((number, arguments[0]), None)
            return
        replica = self._replicas[number]
        weights = replica.weights
        match do:
            case "forward":
                micro_batch, batch, columns = arguments
                self._passages[number, micro_batch], _ = replica.forward(batch, columns, None, None)
            case "backward":
                micro_batch, batch = arguments
                replica.backward(self._passages[number, micro_batch], batch, None)
            case "add":
                weights.add(self._passages.pop((number, arguments[0])).tape)
            case "drop":
                replica.compute.drop(self._passages[number, arguments[0]])
            case "step":
                weights.pending_tokens, learning_rate = arguments
                weights.step(learning_rate)
            case "read":
                weights.read(arguments[0], arguments[1], None)
            case "rebase":
                weights.rebase_within(arguments[0], arguments[1], None)
            case "moved":
                weights.moved()
            case "moments":
                weights.read_moments()
            case "restore":
                weights.restore_moments(None, *arguments)
            case _:
                raise ValueError(f"rank 0 says {do!r}")


class _Spread(Tape):
    """Stands on rank 0 for what all ranks keep of a micro-batch."""

    def __init__(self, number: int, mine: Passage) -> None:
        super().__init__()
        self.number, self.mine = number, mine


class ShardedCompute(StageCompute):
    """See the module."""

    def __init__(
        self,
        spec: RunSpec,
        replica: RankReplica,
        command: Command,
        forget: Callable[[int], None],
        learning_rate: Callable[[], float],
    ) -> None:
        """`forget` a micro-batch: called, from whatever thread, when nobody holds it any more."""
        super().__init__(spec, replica.compute.model, replica.weights, "cpu", learning_rate)
        self._replica = replica
        self._command, self._forget = command, forget
        self._numbers = itertools.count()

    def receive(self, passage: Passage, payload: memoryview, sequences: int, codec: str) -> None:
        """As for one device; raises MessageInvalid, too, for fewer sequences than there are devices."""
        count = self._replica.ranks.count
        if sequences < count:  # a rank without rows would fail, and the peer with it
            raise MessageInvalid(f"{sequences} sequences have no row for each of {count} devices here")
        super().receive(passage, payload, sequences, codec)

    def forward(self, passage: Passage) -> None:
        number, (batch, columns) = next(self._numbers), passage.tokens.shape
        with self._command("forward", number, batch, columns):
            mine, output = self._replica.forward(batch, columns, passage.tokens, passage.inputs)
        passage.tape = _Spread(number, mine)
        weakref.finalize(passage.tape, self._forget, number)
        passage.inputs = torch.empty(0)  # each rank has its rows
        passage.output = torch.empty(0) if output is None else output

    def input_gradient(
        self, passage: Passage, output_gradient: torch.Tensor | None
    ) -> tuple[torch.Tensor, float]:
        spread = _spread(passage)
        batch = passage.tokens.shape[0]
        with self._command("backward", spread.number, batch):
            found, loss = self._replica.backward(spread.mine, batch, output_gradient)
        passage.inputs = passage.output = None
        return (torch.empty(0) if found is None else found), loss

    def add(self, passage: Passage) -> bool:
        spread = _spread(passage)
        with self._command("add", spread.number):
            self.weights.add(spread.mine.tape)
        return self.count(passage)

    def drop(self, passage: Passage) -> None:
        passage.inputs = passage.output = None
        if isinstance(passage.tape, _Spread) and passage.tape.mine.version is not None:
            with self._command("drop", passage.tape.number):
                self._replica.compute.drop(passage.tape.mine)


def _spread(passage: Passage) -> _Spread:
    if not isinstance(passage.tape, _Spread):
        raise RuntimeError("backward of a passage without a forward")
    return passage.tape
