"""Activation memory: a cap that holds, and forwards that are run again instead of kept."""

from __future__ import annotations

import asyncio
import itertools

import pytest
import torch
from pipeline_world import World, batches, small_spec

from shoal.protocol import virtual_time
from shoal.protocol.errors import SpecError
from shoal.training.activation import activation_bytes, held_most
from shoal.training.model.layout import genesis, stage_layout
from shoal.training.model.stage import StageModel
from shoal.training.partition import stage_ranges
from shoal.training.pipeline.compute import Passage, StageCompute
from shoal.training.spec import RunSpec
from shoal.training.weights import Weights


def capped(spec: RunSpec, micro_batches: int) -> RunSpec:
    """Room for so many at each stage, and for what is on the lane."""
    most = max(activation_bytes(spec, layers) for layers in stage_ranges(spec))
    cap = int(1.1 * most * (micro_batches + 1)) + 2 * micro_batches
    return spec.model_copy(update={"limits": spec.limits.model_copy(update={"activation_bytes": cap})})


def test_no_peer_ever_holds_more_than_the_cap() -> None:
    """Two drivers with eight each in flight, and one hop behind them; bytes as autograd keeps them."""

    async def main() -> None:
        spec = capped(small_spec(2, in_flight=8), 3)
        everything = batches(spec, 12)
        async with World(spec, 2) as world:
            world.kill(world.stage(1)[0])
            hop = world.stage(1)[1].hop
            most = {"hop": 0, "driver": 0}
            assert hop is not None

            async def watch() -> None:
                while True:
                    held = hop.jobs.working.total() + hop.undecided + len(hop._applying)
                    most["hop"] = max(most["hop"], held)
                    for peer in world.stage(0):
                        assert peer.driver is not None
                        most["driver"] = max(most["driver"], peer.driver.in_flight)
                    await asyncio.sleep(0.001)

            watching = asyncio.create_task(watch())
            await world.train(everything)
            watching.cancel()
            assert len(world.stage(1)[1].ledger) == len(everything)
            assert most == {"hop": held_most(spec, 1), "driver": held_most(spec, 0)}
            assert held_most(spec, 0) == 3
            assert held_most(spec, 0, stages=2) == 1, "a peer of two stages has half for each"
            for stage, held in enumerate((most["driver"], most["hop"])):
                one = Stage(spec, stage)
                one.forward(everything[0] if stage == 0 else None)
                assert held * one.kept_bytes <= spec.limits.activation_bytes

    virtual_time.run(main)


def test_a_cap_without_room_for_a_micro_batch_is_refused() -> None:
    spec = small_spec(2)
    limits = spec.limits.model_copy(
        update={"activation_bytes": activation_bytes(spec, stage_ranges(spec)[0])}
    )
    with pytest.raises(SpecError, match="activation_bytes"):
        held_most(spec.model_copy(update={"limits": limits}), 0)


class Stage:
    """One replica's compute, without a network."""

    def __init__(self, spec: RunSpec, stage: int) -> None:
        layout = stage_layout(spec, stage_ranges(spec)[stage])
        self.kept_bytes = 0
        self.spec = spec
        self.weights = Weights(spec, layout, genesis(spec, layout), _NoLane(), "cpu")  # type: ignore[arg-type]
        self.compute = StageCompute(spec, StageModel(spec, layout), self.weights, "cpu", lambda: 0.1)
        self.layout = layout

    def forward(self, tokens: torch.Tensor | None) -> Passage:
        """Counts what autograd keeps of it beside inputs and weights. None: random activations come in."""
        spec = self.spec
        rows, length = spec.inner.micro_batch_sequences, spec.model.sequence
        inputs = None if tokens is not None else torch.randn(rows, length, spec.model.width)
        passage = Passage(torch.ones(rows, length + 1, dtype=torch.int64) if tokens is None else tokens)
        passage.inputs = inputs
        storages: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.compute.forward(passage)
        assert passage.version is not None and passage.inputs is not None
        for own in (passage.version.flat, passage.inputs):
            storages.pop(own.untyped_storage().data_ptr(), None)
        self.kept_bytes = sum(storages.values())
        return passage


class _NoLane:
    def post(self, *_: object) -> None:
        return


def test_a_forward_that_is_run_again_keeps_nothing_and_gives_the_same_bits() -> None:
    usual = small_spec(2)
    again = usual.model_copy(update={"inner": usual.inner.model_copy(update={"recompute": True})})
    gradients, kept, answers = [], [], []
    for spec in (usual, again):
        stage = Stage(spec, 0)
        (tokens,) = itertools.islice(batches(spec, 1), 1)
        passage = stage.forward(tokens)
        kept.append(stage.kept_bytes)
        payload = bytes(stage.compute.pack(passage, "float32"))
        form = stage.compute.format
        hidden = payload[form.token_bytes(tokens.shape[0]) :]
        gradient = memoryview(bytearray(hidden))  # any numbers will do
        answers.append(payload)
        stage.compute.backward(passage, gradient, "float32", "float32")
        passage.tape.apply(stage.weights.gradient)
        gradients.append(stage.weights.gradient.clone())
    assert answers[0] == answers[1]
    assert torch.equal(gradients[0], gradients[1])
    assert gradients[0].abs().sum() > 0
    assert kept[0] > activation_bytes(usual, stage_ranges(usual)[0]) / 2
    assert kept[1] == 0
