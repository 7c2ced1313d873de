"""Local weights: two versions at most, steps that do not wait, rebases that keep what was learned."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable

import pytest
import torch
from pipeline_world import small_spec

from shoal.protocol import virtual_time
from shoal.training.inner import Moments
from shoal.training.lane import InlineLane, ThreadLane
from shoal.training.model.layout import genesis, stage_layout
from shoal.training.outer.local import Rebase
from shoal.training.spec import RunSpec
from shoal.training.weights import Weights, learning_rate
from shoal.training.work import Work


def weights(spec: RunSpec, host_optimizer: bool = False) -> Weights:
    layout = stage_layout(spec, range(spec.model.layers))
    return Weights(spec, layout, genesis(spec, layout), InlineLane(), "cpu", host_optimizer=host_optimizer)


def step(local: Weights, seed: int = 1, size: float = 1.0) -> None:
    """One inner step on a random gradient of this norm."""
    direction = torch.randn(local.size, generator=torch.Generator().manual_seed(seed))
    local.gradient.add_(direction * (size / direction.norm()))
    local.pending_tokens += 1
    local.step(0.1)


def test_a_micro_batch_keeps_its_version_while_steps_go_on() -> None:
    local = weights(small_spec(1, mode="stream", inner_tokens=1))
    first = local.take()
    before = first.flat.clone()
    step(local)
    assert torch.equal(first.flat, before)
    second = local.take()
    assert second is not first
    assert not torch.equal(second.flat, before)


def test_with_both_versions_in_use_a_step_is_not_due_until_one_drains() -> None:
    local = weights(small_spec(1, mode="stream", inner_tokens=1))
    first = local.take()
    step(local)
    second = local.take()
    local.pending_tokens = 5
    assert not local.due()
    local.release(first)
    assert local.due()
    local.release(second)
    assert local.due()


def test_flush_mode_steps_only_with_nothing_in_flight() -> None:
    local = weights(small_spec(1, mode="flush", inner_tokens=1))
    version = local.take()
    local.pending_tokens = 5
    assert not local.due()
    local.release(version)
    assert local.due()


def test_a_rebase_keeps_the_steps_made_since() -> None:
    """w becomes new + (w - old), also for versions taken afterwards."""

    async def main() -> None:
        local = weights(small_spec(1, mode="stream", inner_tokens=1))
        sent = await local.sent(slice(None), torch.clone)
        step(local)
        now = await local.sent(slice(None), torch.clone)
        assert (now.inner_step, now.tokens) == (1, 1)
        new = torch.full((8,), 3.0)
        await local.rebase([Rebase(4, sent.weights[4:12], new)])
        after = await local.sent(slice(None), torch.clone)
        assert torch.equal(after.weights[4:12], new + (now.weights[4:12] - sent.weights[4:12]))
        assert torch.equal(after.weights[12:], now.weights[12:])
        assert torch.equal(local.take().flat, after.weights)
        await local.rebase([Rebase(0, after.weights, torch.zeros(local.size))])
        assert torch.equal((await local.sent(slice(None), torch.clone)).weights, torch.zeros(local.size))

    virtual_time.run(main)


@pytest.mark.parametrize("between", ["nothing", "a step", "a rebase"])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_the_short_way_where_nothing_moved_gives_what_the_long_one_gives(
    between: str, alpha: float | None
) -> None:
    async def main() -> None:
        local = weights(small_spec(1, mode="stream", inner_tokens=1))
        sent = await local.sent(slice(None), torch.clone)
        if between == "a step":
            step(local)
        elif between == "a rebase":
            await local.rebase([Rebase(0, sent.weights, sent.weights + 1.0)])
        now = (await local.sent(slice(None), torch.clone)).weights
        new = torch.full((local.size,), 3.0)
        await local.rebase([Rebase(0, sent.weights, new, alpha, sent.moves)])
        after = (await local.sent(slice(None), torch.clone)).weights
        long_way = now - sent.weights + new if alpha is None else alpha * now + (1.0 - alpha) * new
        assert torch.allclose(after, long_way, rtol=0.0, atol=1e-6)

    virtual_time.run(main)


@pytest.mark.parametrize("stages", [1, 4])
def test_gradients_are_clipped_per_stage(stages: int) -> None:
    """At c/√S, so that independent stages together keep to c."""
    spec = small_spec(stages, learning_rate=1.0, clip_norm=2.0)
    local = weights(spec)
    before = local.current.flat.clone()
    step(local, size=100.0)
    assert local.gradient_norm == pytest.approx(100.0, rel=1e-4)
    moved = (local.current.flat - before).norm() / 0.1
    assert float(moved) == pytest.approx(2.0 / math.sqrt(stages), rel=1e-3)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights() -> None:
    local = weights(small_spec(1))
    before = local.current.flat.clone()
    local.gradient[3] = float("nan")
    local.pending_tokens = 4
    local.step(0.1)
    assert not math.isfinite(local.gradient_norm)
    assert torch.equal(local.current.flat, before)
    assert not bool(local.gradient.any())


def test_learning_rate_warms_up_then_falls_along_a_cosine_of_the_logs_tokens() -> None:
    spec = small_spec(
        1,
        learning_rate=1.0,
        warmup_tokens=1000,
        total_tokens=11_000,
        inner_tokens=10,
        final_learning_rate_fraction=0.1,
    )
    ahead = spec.outer.inner_steps * 10
    assert learning_rate(spec, 0) == pytest.approx(ahead / 1000)
    assert learning_rate(spec, 1000 - ahead) == pytest.approx(1.0)
    assert learning_rate(spec, 6000 - ahead) == pytest.approx(0.55)
    assert learning_rate(spec, 11_000) == pytest.approx(0.1)
    assert learning_rate(spec, 10**9) == pytest.approx(0.1)


def test_compute_weights_may_be_bfloat16_while_the_master_is_not() -> None:
    spec = small_spec(1)
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"dtype": "bfloat16"})})
    local = weights(spec)
    assert local.take().flat.dtype is torch.bfloat16
    before = local.gradient.dtype
    assert before is torch.float32


def test_an_optimizer_on_the_host_makes_the_same_steps() -> None:
    """The same bits after steps, a rebase and moments carried over; nothing is left in the gradient."""

    async def offload(function: Callable[[], Moments | None]) -> Moments | None:
        return function()

    async def trajectory(host_optimizer: bool) -> list[torch.Tensor]:
        spec = small_spec(1, mode="stream", inner_tokens=1, optimizer="adamw")
        local, seen = weights(spec, host_optimizer), []
        for seed in range(3):
            step(local, seed)
            assert not local.gradient.any()
            seen.append(local.take().flat.clone())
            local.release(local.current)
        await local.rebase([Rebase(4, seen[-1][4:12], torch.full((8,), 3.0))])
        moments = await local.moments(offload)
        assert moments is not None
        other = weights(spec, host_optimizer)
        await other.restore(moments)
        step(other, 9)
        return [*seen, local.take().flat, moments.mean, moments.square, other.take().flat]

    async def main() -> None:
        for on_host, on_device in zip(await trajectory(True), await trajectory(False), strict=True):
            assert torch.equal(on_host, on_device)

    virtual_time.run(main)


def test_a_checkpoint_cancelled_before_it_hears_that_it_has_begun_stops_no_step() -> None:
    async def main() -> None:
        spec = small_spec(1, inner_tokens=1)
        layout, lane = stage_layout(spec, range(spec.model.layers)), ThreadLane()
        local = Weights(spec, layout, genesis(spec, layout), lane, "cpu")
        local.pending_tokens = 1
        hold, done = threading.Event(), threading.Event()
        lane.post(hold.wait)
        reading = asyncio.create_task(local.moments(asyncio.to_thread))
        await asyncio.sleep(0)
        lane.post(done.set)
        hold.set()
        assert done.wait(10.0), "the loop stands still meanwhile, so the reader has not heard of its turn"
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await lane.run(Work.UPDATE, lambda: None)
        assert local.due()
        await lane.close()

    asyncio.run(main())
