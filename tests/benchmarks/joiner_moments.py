"""What a joiner's optimizer goes on from: `python tests/benchmarks/joiner_moments.py [--seeds 3]`.

One process trains the tiny template for 300 steps of AdamW. From there it goes on over the same batches
with the moments as they are, with none, and with what a joiner takes (`recovery.moments`). Prints the mean
training loss in nats a byte over steps 2-5, 6-20 and 21-40.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from pathlib import Path

import torch

from shoal.training.inner import InnerOptimizer, Moments
from shoal.training.model.layout import genesis, stage_layout
from shoal.training.model.stage import StageModel
from shoal.training.recovery.moments import decode, encode, fill_unknown
from shoal.training.templates import TEMPLATES

SPEC = TEMPLATES["tiny"]
LAYOUT = stage_layout(SPEC, range(SPEC.model.layers))
MODEL = StageModel(SPEC, LAYOUT)
STEPS, MORE = 300, 40
LEARNING_RATE, WARM_UP_STEPS = 3e-3, 50


class Local:
    """One replica without a swarm."""

    def __init__(self, weights: torch.Tensor, moments: Moments | None = None) -> None:
        self.weights = weights.clone()
        self._gradient = torch.zeros_like(weights)
        self.optimizer = InnerOptimizer(SPEC.inner, 1, LAYOUT.decayed, self.weights, self._gradient)
        if moments is not None:
            self.optimizer.restore(moments)

    def step(self, batch: torch.Tensor, learning_rate: float) -> float:
        """Tokens [B, T + 1]; the mean loss before it."""
        inputs, targets = batch[:, :-1], batch[:, 1:]
        flat = self.weights.detach().requires_grad_()
        hidden = MODEL.blocks(flat, MODEL.embed(flat, inputs), None)
        loss = MODEL.loss(flat, hidden, targets, None)
        self._gradient.copy_(torch.autograd.grad(loss, flat)[0])
        self.optimizer.step(targets.numel(), learning_rate)
        return float(loss.detach()) / targets.numel()


def batches(text: torch.Tensor, seed: int, count: int) -> list[torch.Tensor]:
    """Windows drawn from the text."""
    rng, length = torch.Generator().manual_seed(seed), SPEC.model.sequence + 1
    size = (count, SPEC.inner.micro_batch_sequences)
    starts = torch.randint(0, len(text) - length, size, generator=rng)
    return [torch.stack([text[at : at + length] for at in row]) for row in starts.tolist()]


def taken(moments: Moments) -> Moments:
    """What a joiner has of these."""
    square = torch.empty_like(moments.square)
    decode(memoryview(encode(moments.square)), square)
    fill_unknown(square)
    return Moments(moments.steps, torch.zeros_like(square), square)


def standard_library() -> torch.Tensor:
    """Bytes of the asyncio package."""
    files = sorted(Path(asyncio.__file__).parent.glob("*.py"))
    return torch.frombuffer(
        bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8
    ).long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    text = standard_library()
    for seed in range(options.seeds):
        run = Local(genesis(SPEC, LAYOUT))
        for number, batch in enumerate(batches(text, seed, STEPS)):
            run.step(batch, LEARNING_RATE * min(1.0, (number + 1) / WARM_UP_STEPS))
        kept = run.optimizer.moments()
        if kept is None:
            raise SystemExit("no moments after training")
        for name, moments in (("kept", kept), ("none", None), ("taken", taken(kept))):
            joiner = Local(run.weights, moments)
            losses = [joiner.step(batch, LEARNING_RATE) for batch in batches(text, 1000 + seed, MORE)]
            means = (statistics.mean(losses[a:b]) for a, b in ((1, 5), (5, 20), (20, MORE)))
            print(f"seed {seed} {name:6s}", *(f"{mean:.3f}" for mean in means), flush=True)


if __name__ == "__main__":
    main()
