"""What adopted gradients cost in loss: `python tests/benchmarks/adoption.py [--micro-batches N] [--json]`.

Four stages of two replicas each that drift apart between rounds (outer Nesterov steps), one process, real
compute and bytes. A share of the micro-batches loses a hop that has a hop behind it, when those behind have
answered. `redo`: a replacement and fresh replicas behind it compute everything. `adopt`: the replacement
forwards, and runs its backward with the gradient that the dead one would have got, of the dead one's output.
Both see the same text, chains and deaths from the same weights; held-out loss of the last anchors.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from chain_world import SCORED, Chain, Text, draw

from shoal.training.pipeline.compute import Passage, StageCompute

REPLICAS = 2
STEPS_A_ROUND = 20  # inner steps of a replica, the mean of a group
OUTER_RATE, OUTER_MOMENTUM = 0.7, 0.5
SHARES = (0.05, 0.2, 1.0)
CODEC = "float32"


@dataclass
class Stage:
    """The replicas of one stage and what they have agreed on."""

    replicas: list[StageCompute]
    anchor: torch.Tensor
    momentum: torch.Tensor

    def round(self) -> float:
        """The outer step; returns how far two replicas had drifted apart, relative to the anchor."""
        local = [replica.weights.current.flat.clone() for replica in self.replicas]
        apart = float((local[0] - local[1]).norm() / self.anchor.norm())
        delta = self.anchor - torch.stack(local).mean(0)
        self.momentum = OUTER_MOMENTUM * self.momentum + delta
        self.anchor = self.anchor - OUTER_RATE * (delta + OUTER_MOMENTUM * self.momentum)
        for replica in self.replicas:
            asyncio.run(replica.weights.replace(self.anchor))
        return apart


class Swarm:
    """All replicas, in one process; micro-batches one after the other."""

    def __init__(self, seed: int) -> None:
        self.chains = [Chain.tiny(CODEC, seed) for _ in range(REPLICAS)]
        self.spec = self.chains[0].spec
        self.stages = []
        for replicas in zip(*(chain.stages for chain in self.chains), strict=True):
            anchor = replicas[0].weights.current.flat.clone()
            self.stages.append(Stage([*replicas], anchor, torch.zeros_like(anchor)))
        self.apart: list[float] = []

    def train(self, tokens: torch.Tensor, numbers: list[int], dead: int, spares: list[int]) -> None:
        """One micro-batch through the replicas of these numbers.

        The hop at stage `dead` (0: none) is lost when it is its turn to run its backward. Without `spares`
        its replacement adopts those behind.
        """
        hops = [stage.replicas[n] for stage, n in zip(self.stages, numbers, strict=True)]
        passages = [Passage(tokens)]
        hops[0].forward(passages[0])
        self._forward(hops, passages)
        if dead:
            gradient = self._backward(hops[dead + 1 :], passages[dead + 1 :])
            hops[dead].drop(passages[dead])
            hops[dead] = next(one for one in self.stages[dead].replicas if one is not hops[dead])
            behind = hops[dead + 1 :], passages[dead + 1 :]
            del hops[dead + 1 :], passages[dead:]
            if spares:
                hops += [stage.replicas[n] for stage, n in zip(self.stages, spares, strict=True)][dead + 1 :]
            self._forward(hops, passages)
            self._backward(hops, passages, None if spares else gradient)
            if not spares:
                hops += behind[0]
                passages += behind[1]
        else:
            self._backward(hops, passages)
        for hop, passage in zip(hops, passages, strict=True):
            hop.add(passage)
        for chain in self.chains:
            chain.tokens += passages[0].token_count
        if sum(one.weights.inner_steps for one in self.stages[0].replicas) % (STEPS_A_ROUND * REPLICAS) == 0:
            self.apart.append(statistics.fmean(stage.round() for stage in self.stages))

    def loss(self, text: torch.Tensor) -> float:
        """Of the anchors, nats a token."""
        for stage in self.stages:
            stage.round()
        rng = random.Random(0)
        return self.chains[0].loss([draw(text, self.spec, rng) for _ in range(SCORED)])

    def _forward(self, hops: list[StageCompute], passages: list[Passage]) -> None:
        """The forwards that are missing."""
        while len(passages) < len(hops):
            before, passage = hops[len(passages) - 1], Passage()
            payload = memoryview(bytearray(before.pack(passages[-1], CODEC)))
            sequences = self.spec.inner.micro_batch_sequences
            hops[len(passages)].receive(passage, payload, sequences, CODEC)
            passages.append(passage)

    @staticmethod
    def _backward(
        hops: list[StageCompute], passages: list[Passage], gradient: memoryview | None = None
    ) -> memoryview | None:
        """From the last of these hops to the first; what the first one would answer."""
        for hop, passage in zip(reversed(hops), reversed(passages), strict=True):
            gradient, _ = hop.backward(passage, gradient, CODEC, CODEC)
        return gradient


def trained(seed: int, share: float, adopts: bool, micro_batches: int, text: Text) -> tuple[float, float]:
    """Held-out loss, and how far apart replicas were at rounds."""
    swarm, rng = Swarm(seed), random.Random(seed)
    for _ in range(micro_batches):
        tokens = draw(text.training, swarm.spec, rng)
        numbers, spares = ([rng.randrange(REPLICAS) for _ in swarm.stages] for _ in range(2))
        dead = rng.randrange(1, len(swarm.stages) - 1) if rng.random() < share else 0
        swarm.train(tokens, numbers, dead, [] if adopts else spares)
    return swarm.loss(text.held_out), statistics.fmean(swarm.apart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--micro-batches", type=int, default=800)
    parser.add_argument("--seeds", default="1-5", help="first-last")
    parser.add_argument("--shares", type=float, nargs="*", default=SHARES)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    library = Path(sysconfig.get_path("stdlib"))
    text = Text.of([library, library / "asyncio", library / "email"])
    first, last = map(int, options.seeds.split("-"))
    rows: dict[str, dict[str, float]] = {}
    for share in options.shares:
        found: dict[bool, list[float]] = {True: [], False: []}
        apart = []
        for seed in range(first, last + 1):
            for adopts in (False, True):
                loss, distance = trained(seed, share, adopts, options.micro_batches, text)
                found[adopts].append(loss)
                apart.append(distance)
            if not options.json:
                print(f"share {share}, seed {seed}: redo {found[False][-1]:.4f}, adopt {found[True][-1]:.4f}")
        ratios = [one / other - 1 for one, other in zip(found[True], found[False], strict=True)]
        rows[f"{share:g}"] = {
            "redo": statistics.median(found[False]),
            "adopt": statistics.median(found[True]),
            "to_redo": statistics.fmean(ratios),
            "to_redo_error": statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else 0.0,
            "apart": statistics.fmean(apart),
        }
    print(json.dumps(rows, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
