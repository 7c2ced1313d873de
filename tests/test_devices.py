"""Several devices in one peer: what they compute together is what one device computes; losing one ends them.

Real processes and gloo, two CPU "devices". Sums over rows are taken in another order than on one device, so
float32 results agree to rounding, not to the bit: 24 bits of mantissa and sums of some hundred terms leave
about 1e-6 of a value.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from pipeline_world import batches, small_spec
from swarm_world import Swarm, swarm_spec, write_corpus
from torch.distributed.tensor import DTensor
from trainer_world import TrainerWorld, round_spec

from shoal.node import devices
from shoal.node.cli.peer import peer_options
from shoal.node.devices import Children, several
from shoal.node.hardware import choose_devices
from shoal.protocol import virtual_time
from shoal.protocol.errors import DeviceLost, MessageInvalid, SpecError, UsageError
from shoal.training.devices.weights import ShardWeights
from shoal.training.lane import InlineLane
from shoal.training.model.layout import genesis, stage_layout
from shoal.training.model.stage import StageModel
from shoal.training.outer.local import Rebase
from shoal.training.partition import stage_ranges
from shoal.training.pipeline.compute import Passage, StageCompute
from shoal.training.spec import RunSpec
from shoal.training.trainer import Trainer
from shoal.training.weights import Weights

RATE = 0.01
RANK = "shoal.node.rank_process"
ANSWER_S = 5.0  # more than a step of these small models takes on a machine that does other things too


class Bench:
    """Children that live for the module, on a loop of their own."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()

    async def start(self) -> None:
        self.children = await Children(("cpu", "cpu"), ANSWER_S).__aenter__()

    def one(self, spec: RunSpec, stage: int, rate: float = RATE) -> StageCompute:
        layout = stage_layout(spec, stage_ranges(spec)[stage])
        weights = Weights(spec, layout, genesis(spec, layout), InlineLane(), "cpu")
        return StageCompute(spec, StageModel(spec, layout), weights, "cpu", lambda: rate)

    def two(self, spec: RunSpec, stage: int, rate: float = RATE) -> StageCompute:
        initial = genesis(spec, stage_layout(spec, stage_ranges(spec)[stage]))
        gang = self.children.gang
        return gang.replica(spec, stage, initial, InlineLane(), lambda: rate, host_optimizer=False)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    bench = Bench()
    with bench.runner as runner:
        runner.run(bench.start())
        yield bench
        runner.run(bench.children.__aexit__())


def local(compute: StageCompute) -> torch.Tensor:
    """The whole master, as rounds see it."""
    weights = compute.weights
    return weights._copy(slice(0, weights.size), torch.clone).weights


def spec_of(dtype: str = "float32", **inner: object) -> RunSpec:
    """Three rows a micro-batch, which two devices do not share evenly; four micro-batches an inner step."""
    settings = {"micro_batch_sequences": 3, "inner_tokens": 4 * 48, "mode": "stream", **inner}
    spec = small_spec(3, **settings)
    return spec.model_copy(update={"model": spec.model.model_copy(update={"dtype": dtype})})


def through(stages: list[StageCompute], tokens: torch.Tensor) -> tuple[list[Passage], float, torch.Tensor]:
    """A micro-batch forward and back, not committed; its loss, and what stage 0 heard."""
    passages, codec = [Passage(tokens)], "float32"
    stages[0].forward(passages[0])
    for before, stage in pairwise(stages):
        payload = memoryview(bytearray(before.pack(passages[-1], codec)))
        passages.append(Passage())
        stage.receive(passages[-1], payload, tokens.shape[0], codec)
    gradient, loss = None, 0.0
    heard = memoryview(b"")
    for stage, passage in zip(reversed(stages), reversed(passages), strict=True):
        heard = heard if gradient is None else gradient
        gradient, more = stage.backward(passage, gradient, codec, codec)
        loss += more
    return passages, loss, torch.frombuffer(bytearray(heard), dtype=torch.float32)


def train(stages: list[StageCompute], spec: RunSpec) -> list[float]:
    """Nine micro-batches, commits two behind, so that versions overlap; an outer entry after the fifth."""
    losses, held = [], []
    for number, tokens in enumerate(batches(spec, 9)):
        passages, loss, _ = through(stages, tokens)
        losses.append(loss)
        held.append(passages)
        while len(held) > (0 if number == 8 else 2):
            for stage, passage in zip(stages, held.pop(0), strict=True):
                stage.add(passage)
        if number == 4:
            for stage in stages:
                old = local(stage)
                part = slice(7, stage.weights.size - 5)  # of a fragment: no span begins or ends here
                stage.weights._rebase([Rebase(7, old[part], old[part] * 0.5)])
    return losses


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_two_devices_train_as_one_does(bench: Bench, optimizer: str) -> None:
    spec = spec_of(optimizer=optimizer, clip_norm=0.5, weight_decay=0.1, recompute=True)
    alone = [bench.one(spec, stage) for stage in range(3)]
    shared = [bench.two(spec, stage) for stage in range(3)]
    torch.testing.assert_close(train(shared, spec), train(alone, spec), rtol=1e-6, atol=0.0)
    for one, two in zip(alone, shared, strict=True):
        assert one.weights.inner_steps == two.weights.inner_steps == 2
        assert two.weights.gradient_norm == pytest.approx(one.weights.gradient_norm, rel=1e-5)
        moved = (local(one) - genesis(spec, one.model.layout)).abs().max()
        assert moved > 0.01
        # AdamW divides by the root of a gradient's square: of one near zero it shows the rounding
        most = 1e-6 if optimizer == "sgd" else RATE * 1e-2
        assert (local(one) - local(two)).abs().max() < most


def test_gradients_of_activations_and_weights_are_those_of_one_device(bench: Bench) -> None:
    for dtype, most in (("float32", 2e-6), ("bfloat16", 2**-6)):
        spec = spec_of(dtype, optimizer="sgd", inner_tokens=48)  # SGD's step is the gradient, here times 48e3
        (tokens,) = batches(spec, 1)
        alone = [bench.one(spec, stage, 48e3) for stage in range(3)]
        shared = [bench.two(spec, stage, 48e3) for stage in range(3)]
        one, two = through(alone, tokens), through(shared, tokens)
        assert two[1] == pytest.approx(one[1], rel=most)
        assert (one[2] - two[2]).abs().max() <= most * one[2].abs().max()
        for at, (first, second) in enumerate(zip(alone, shared, strict=True)):
            before = local(second)
            assert torch.equal(before, genesis(spec, second.model.layout))
            assert first.add(one[0][at])
            assert second.add(two[0][at])
            step = local(first) - before
            assert (local(second) - before - step).abs().max() <= most * step.abs().max()


def test_a_micro_batch_too_small_for_the_devices_is_refused_and_ends_nobody(bench: Bench) -> None:
    """One row of whoever may send micro-batches would leave a device without any."""
    spec = spec_of()
    two = bench.two(spec, 1)
    for sequences in (1, 3):
        tokens = batches(spec, 1)[0][:sequences]
        hidden = torch.ones(sequences, tokens.shape[1] - 1, spec.model.width)
        payload = memoryview(bytearray(two.format.pack(tokens, hidden, "float32")))
        passage = Passage()
        if sequences == 1:
            with pytest.raises(MessageInvalid, match="1 sequences have no row for each of 2 devices"):
                two.receive(passage, payload, sequences, "float32")
        else:
            two.receive(passage, payload, sequences, "float32")
            assert passage.output is not None
            two.drop(passage)


def test_each_device_holds_its_share_and_what_is_dropped_is_forgotten(bench: Bench) -> None:
    spec = spec_of(optimizer="adamw", inner_tokens=48)
    two = bench.two(spec, 1)
    weights, layout = two.weights, two.model.layout
    assert isinstance(weights, ShardWeights)
    payload = bench.one(spec, 0)
    dropped, kept = Passage(batches(spec, 1)[0]), Passage(batches(spec, 1)[0])
    for passage in (dropped, kept):
        first = Passage(passage.tokens)
        payload.forward(first)
        assert first.output is not None
        passage.inputs = first.output.detach()
        two.forward(passage)
    two.drop(dropped)
    gradient = two.format.pack_hidden(torch.ones(3, 16, 32), "float32")
    two.backward(kept, gradient, "float32", "float32")
    assert two.add(kept)
    del dropped, passage
    assert "forget" in {do for _, do, _ in bench.children.gang._over}, "the others hear of it in time"
    half = layout.size // 2 + len(weights._shards.spans)
    moments = weights._optimizer.moments()
    assert moments is not None
    held = [weights._gradient, weights._master, moments.mean, moments.square]
    held += [torch.cat([p.to_local() for p in version.flat.parameters()]) for version in weights._versions]
    assert all(part.numel() <= half for part in held)
    parameters = [p for version in weights._versions for p in version.flat.parameters()]
    assert all(isinstance(parameter, DTensor) for parameter in parameters), "no layer is gathered any more"
    whole = weights.read_moments()
    assert whole is not None
    assert whole.mean.numel() == layout.size
    weights.restore_moments(whole, whole.steps)
    again = weights.read_moments()
    assert again is not None
    assert torch.equal(again.square, whole.square)
    assert again.steps == whole.steps == 1


def test_a_peer_of_two_devices_agrees_with_its_group_to_the_bit(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_of, gangs = Trainer._compute, iter((None, bench.children.gang))

    def compute(self: Trainer, initial: torch.Tensor) -> StageCompute:
        self._gang = next(gangs)
        return compute_of(self, initial)

    monkeypatch.setattr(Trainer, "_compute", compute)

    async def main() -> None:
        async with TrainerWorld(round_spec(1, optimizer="adamw", learning_rate=0.003)) as world:
            for number in range(2):
                await world.add(number, 0)
            for height in range(1, 3):
                await world.heights(height)
            one, two = (replica.trainer for replica in world.replicas.values())
            assert isinstance(two.weights, ShardWeights)
            assert not isinstance(one.weights, ShardWeights)
            while one.outer.head != two.outer.head:
                await asyncio.sleep(0.1)
            assert one.outer.state_root == two.outer.state_root
            assert torch.equal(one.outer.anchor, two.outer.anchor)
            assert torch.equal(one.outer.momentum, two.outer.momentum)
            assert min(one.weights.inner_steps, two.weights.inner_steps) >= 2

    virtual_time.run(main)


def test_devices_are_refused_by_name() -> None:
    async def begin() -> None:
        async with several(small_spec(1, micro_batch_sequences=2), ("cpu", "cpu", "cpu")):
            pass

    with pytest.raises(SpecError, match=r"inner.micro_batch_sequences = 2 .* 3 devices"):
        asyncio.run(begin())
    rest = (None, None, None, "", None, False, "127.0.0.1", 0, 0, None, 0.1, 0.0, None, None)
    with pytest.raises(UsageError, match="--device names one device"):
        peer_options("cpu", *rest, devices="cpu,cpu")
    with pytest.raises(UsageError, match="xpu"):
        choose_devices(("cpu", "xpu:7"), None, 1)


def test_a_device_that_stands_still_ends_the_peer_in_time(bench: Bench) -> None:
    spec = spec_of()
    two = bench.two(spec, 0)
    (process,) = bench.children.processes
    os.kill(process.pid, signal.SIGSTOP)

    async def story() -> None:
        watching = asyncio.create_task(bench.children.watch())
        with pytest.raises(DeviceLost, match=r"2 devices .* 'forward'"):
            await asyncio.to_thread(two.forward, Passage(batches(spec, 1)[0]))
        with pytest.raises(DeviceLost, match="'forward'"):
            await watching
        assert await process.wait() == -signal.SIGKILL

    bench.runner.run(story())


def test_a_peer_that_loses_a_device_ends_by_its_name(tmp_path: Path) -> None:
    async def story() -> None:
        async with Swarm(tmp_path / "swarm", swarm_spec(write_corpus(tmp_path / "corpus.txt"), 1)) as swarm:
            swarm.options = ("--devices", "cpu,cpu", "--threads", "2", "--pace", "0.3")
            await swarm.start(1)
            (peer,) = swarm.peers
            (child,) = [p for p in psutil.Process(peer.pid).children() if RANK in p.cmdline()]
            child.kill()
            assert await peer.ended(60) == DeviceLost.exit_code
            assert "device cpu (rank 1) of this peer ended with signal 9" in peer.last_words()

    asyncio.run(story())


def test_a_device_whose_process_dies_at_once_is_lost_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was to do could not be written any more: a BrokenPipeError, and no word of the device."""
    begin = asyncio.create_subprocess_exec

    async def stillborn(*_: str, **settings: Any) -> asyncio.subprocess.Process:
        process = await begin(sys.executable, "-c", "raise SystemExit(3)", stdin=settings["stdin"])
        await process.wait()
        return process

    over = threading.Event()
    monkeypatch.setattr(asyncio, "create_subprocess_exec", stillborn)
    monkeypatch.setattr(devices, "join", lambda *_: over.wait())

    async def main() -> None:
        async with Children(("cpu", "cpu"), answer_s=5.0):
            pass

    with pytest.raises(ExceptionGroup) as found:
        asyncio.run(main())
    over.set()
    (lost,) = found.value.exceptions
    assert isinstance(lost, DeviceLost)
    assert "device cpu (rank 1) of this peer ended with exit code 3" in str(lost)
