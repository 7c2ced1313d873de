"""Weights in int8: close to the true ones, a quarter of their memory, and sessions that know their form."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from held_weights import dense
from serving_world import PROMPT, World, reference, serving_spec

from shoal.protocol.virtual_time import run
from shoal.training.model.int8 import Int8Weights, int8_bytes
from shoal.training.model.layout import genesis, stage_layout
from shoal.training.model.stage import StageModel
from shoal.training.partition import stage_ranges
from shoal.training.serving.form import Form, load_held
from shoal.training.serving.versions import Versions
from shoal.training.spec import RunSpec

torch.set_num_threads(1)
INT8: dict[str, Any] = {"serving_weights": "int8"}
TOKENS = 32


def spec_of(**model: object) -> RunSpec:
    return RunSpec.model_validate({"model": model, "stages": {"count": 1}})


def int8_of(spec: RunSpec, flat: torch.Tensor, dtype: torch.dtype = torch.float32) -> Int8Weights:
    layout = stage_layout(spec, range(spec.model.layers))
    return Int8Weights(layout, ((slot, slot.view(flat)) for slot in layout.slots), dtype, "cpu")


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_a_product_is_that_with_the_matrix_it_stands_for(dtype: torch.dtype, near: float, rows: int) -> None:
    spec = spec_of(layers=1, width=96, heads=4, kv_heads=2, feedforward=1500)  # more than one slice
    layout = stage_layout(spec, range(1))
    held = int8_of(spec, genesis(spec, layout), dtype)
    flat = dense(held, layout).float()
    generator = torch.Generator().manual_seed(rows)
    for slot in layout.slots:
        if len(slot.shape) == 2:
            inputs = torch.randn(rows, slot.shape[1], generator=generator).to(dtype)
            expected = inputs.float() @ slot.view(flat).t()
            found = held.linear(inputs, slot.start, slot.shape[0])
            assert found.dtype is dtype
            torch.testing.assert_close(
                found.float(), expected, rtol=0.0, atol=near * float(expected.abs().max())
            )


def test_a_weight_is_off_by_half_a_step_of_its_row_at_most() -> None:
    spec = spec_of()
    layout = stage_layout(spec, range(spec.model.layers))
    flat = torch.randn(layout.size, generator=torch.Generator().manual_seed(1))
    flat[: spec.model.width] = 0.0  # a row that no text has trained
    found = dense(int8_of(spec, flat), layout)
    for slot in layout.slots:
        mine, true = slot.view(found), slot.view(flat)
        if slot.start >= layout.decayed:
            assert torch.equal(mine, true)
        else:
            step = true.abs().amax(dim=1, keepdim=True) / 127
            assert bool(((mine - true).abs() <= 0.501 * step).all())


def trained(spec: RunSpec, text: torch.Tensor, steps: int) -> torch.Tensor:
    """The flat weights of a model that has learnt to write bytes a little."""
    layout = stage_layout(spec, range(spec.model.layers))
    model, flat = StageModel(spec, layout), genesis(spec, layout).requires_grad_()
    optimizer = torch.optim.AdamW([flat], lr=3e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = batch(spec, text, generator)
        optimizer.zero_grad()
        hidden = model.blocks(flat, model.embed(flat, rows[:, :-1]), None)
        torch.autograd.backward(model.loss(flat, hidden, rows[:, 1:], None) / rows[:, 1:].numel())
        optimizer.step()
    return flat.detach()


def batch(spec: RunSpec, text: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(0, len(text) - spec.model.sequence - 1, (16,), generator=generator)
    return torch.stack([text[start : start + spec.model.sequence + 1] for start in starts])


def test_a_trained_model_writes_nearly_the_same_in_a_quarter_of_the_memory() -> None:
    spec = spec_of(layers=2, width=64, heads=4, kv_heads=2, feedforward=192, sequence=64)
    sources = sorted(Path(torch.__file__).parent.glob("nn/modules/*.py"))[:12]
    text = torch.tensor(list(b"".join(path.read_bytes() for path in sources)))
    cut = len(text) * 9 // 10
    flat = trained(spec, text[:cut], steps=150)
    layout = stage_layout(spec, range(spec.model.layers))
    model, held = StageModel(spec, layout), int8_of(spec, flat)
    rows = batch(spec, text[cut:], torch.Generator().manual_seed(2))
    losses, likeliest = [], []
    for weights in (flat, held):
        hidden = model.blocks(weights, model.embed(weights, rows[:, :-1]), None)
        losses.append(float(model.loss(weights, hidden, rows[:, 1:], None)) / rows[:, 1:].numel())
        likeliest.append(model.logits(weights, hidden, None).argmax(dim=-1))
    agree = float((likeliest[0] == likeliest[1]).float().mean())
    print(f"loss {losses[0]:.4f} and {losses[1]:.4f} in int8, {agree:.2%} of the likeliest tokens the same")
    assert losses[0] < 2.9  # it has learnt something: 5.5 at first
    assert abs(losses[1] - losses[0]) < 0.01
    assert agree > 0.97
    versions = Versions(Form(layout))
    versions.publish(b"v", flat)
    before = versions.nbytes
    versions.get(b"").weights(torch.float32, "cpu")
    assert versions.nbytes == int8_bytes(layout, torch.float32) < 0.28 * before


@pytest.mark.parametrize("form", ["dtype", "int8"])
def test_parameter_by_parameter_is_what_the_whole_vector_gives(form: str) -> None:
    spec = serving_spec(2, serving_weights=form, qkv_bias=True)
    for layers in stage_ranges(spec):
        layout = stage_layout(spec, layers)
        flat = genesis(spec, layout)
        one = load_held(spec, layout, ((slot, slot.view(flat)) for slot in layout.slots), "cpu")
        other = Form.of(spec, layout).held([flat[:100], flat[100:]], torch.float32, "cpu")
        assert torch.equal(dense(one, layout), dense(other, layout))


@pytest.mark.parametrize("stage", range(3))
def test_a_server_of_int8_killed_at_any_token_changes_nothing(stage: int) -> None:
    async def text(at: int) -> list[int]:
        async with World(serving_spec(3, **INT8), 2) as world, world.generation(count=TOKENS) as generation:
            world.watched = generation
            found: list[int] = []
            async for token in generation:
                found.append(token)
                if len(found) == at:
                    world.kill(world.used(stage))
            assert generation.figures.restarted == 0
            return found

    undisturbed = run(functools.partial(text, 0))
    for at in range(1, TOKENS, 6):
        assert run(functools.partial(text, at), limit_s=60) == undisturbed, f"killed at token {at}"


def test_a_session_goes_on_in_another_form_only_by_beginning_again() -> None:
    async def main() -> None:
        async with World(serving_spec(2), 2) as world:
            last = world.peers[3]  # of stage 1, and of its own mind about the form
            layout = stage_layout(world.spec, stage_ranges(world.spec)[1])
            last.versions._kept.clear()
            last.versions._form = Form(layout)
            last.versions.publish(b"v1".ljust(32), world.weights[1])
            world.hidden = {last.name}
            text: list[int] = []
            async with world.generation(count=TOKENS) as generation:
                async for token in generation:
                    text.append(token)
                    if len(text) == 10:
                        assert last.computed == 0
                        world.hidden = set()
                        world.kill(world.peers[2])
            assert text[:10] == reference(world, PROMPT, 10)
            assert generation.figures.restarted == 1  # told to whoever asks for checks: `Written.restarted`
            assert generation.written().restarted
            held = last.versions.get(b"").weights(torch.float32, "cpu")
            assert isinstance(held, Int8Weights)
            world.weights[1] = dense(held, layout)
            assert text[10:] == reference(world, PROMPT + text[:10], TOKENS - 10)

    run(main, limit_s=60)
