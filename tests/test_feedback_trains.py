"""One bit a weight trains a real model, because of the feedback: without it the same run is worse."""

from __future__ import annotations

import argparse
import asyncio
import inspect
import typing

import torch
from outer_world import Node, World, round_spec

from shoal.protocol.virtual_time import run
from shoal.training.inner import InnerOptimizer
from shoal.training.model.layout import genesis, stage_layout
from shoal.training.model.stage import StageModel
from shoal.training.spec import RunSpec

torch.set_num_threads(1)
STEPS, BATCH, REPLICAS = 240, 8, 2
TEXT = torch.tensor(list((inspect.getsource(argparse) + inspect.getsource(typing)).encode()))


def spec_of(family: str, *, feedback: bool) -> RunSpec:
    return round_spec(
        model={"layers": 2, "width": 32, "heads": 2, "kv_heads": 2, "feedforward": 64, "sequence": 32},
        stages={"count": 1},
        inner={"learning_rate": 5e-3},
        outer={"inner_steps": 4, "learning_rate": 1.0, "momentum": 0.0},
        compression={
            "contribution": family,
            "published": family,
            "warmup_rounds": 4,
            "feedback": feedback,
        },
    )


class Learner:
    """A replica's inner steps: AdamW on its own stretch of the text."""

    def __init__(self, spec: RunSpec, node: Node, number: int) -> None:
        self._node = node
        layout = stage_layout(spec, range(spec.model.layers))
        self._model = StageModel(spec, layout)
        self._gradient = torch.zeros(layout.size)
        self._spec = spec
        weights = node.weights.weights
        self._optimizer = InnerOptimizer(spec.inner, 1, layout.decayed, weights, self._gradient)
        share = len(TEXT) * 9 // 10 // REPLICAS
        self._text = TEXT[number * share : (number + 1) * share]
        self._generator = torch.Generator().manual_seed(number)

    def loss(self, weights: torch.Tensor, text: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Nats a byte of a random batch."""
        length = self._spec.model.sequence
        starts = torch.randint(0, len(text) - length - 1, (BATCH,), generator=generator)
        tokens = torch.stack([text[start : start + length + 1] for start in starts.tolist()])
        hidden = self._model.blocks(weights, self._model.embed(weights, tokens[:, :-1]), None)
        return self._model.loss(weights, hidden, tokens[:, 1:], None) / (BATCH * length)

    def step(self) -> None:
        weights = self._node.weights.weights.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(weights, self._text, self._generator), weights)
        self._gradient.add_(gradient)
        self._optimizer.step(1, self._spec.inner.learning_rate)
        self._node.weights.inner_steps += 1
        self._node.weights.tokens += BATCH * self._spec.model.sequence
        self._node.outer.stepped()

    @torch.no_grad()
    def held_out(self) -> float:
        """Of the agreed weights, on text that nobody trains on."""
        generator = torch.Generator().manual_seed(99)
        text, anchor = TEXT[len(TEXT) * 9 // 10 :], self._node.outer.anchor
        return float(torch.stack([self.loss(anchor, text, generator) for _ in range(20)]).mean())


def trained(family: str, *, feedback: bool = True) -> float:
    """Held-out nats a byte after STEPS inner steps of each replica."""
    spec = spec_of(family, feedback=feedback)
    layout = stage_layout(spec, range(spec.model.layers))

    async def main() -> float:
        async with World(REPLICAS, spec, genesis=genesis(spec, layout)) as world:
            learners = [Learner(spec, node, number) for number, node in enumerate(world.nodes)]
            for _ in range(STEPS):
                for learner in learners:
                    learner.step()
                await asyncio.sleep(0.1)
            assert world.equal()
            due = STEPS * spec.outer.fragments // spec.outer.inner_steps
            assert world.nodes[0].outer.height >= due - 4
            return learners[0].held_out()

    return run(main)


def test_one_bit_with_feedback_trains_and_without_it_is_worse() -> None:
    full, fed_back, lossy = trained("float32"), trained("onebit"), trained("onebit", feedback=False)
    print(f"held-out nats a byte: float32 {full:.3f}, onebit {fed_back:.3f}, without feedback {lossy:.3f}")
    assert fed_back < full + 0.08
    assert lossy > fed_back + 0.08
