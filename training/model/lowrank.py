"""Low-rank adapters beside frozen weights (LoRA, arXiv 2106.09685, eq. 3): y = W·x + (alpha / rank)·B·A·x.

Whoever tunes holds A and B and sends those of a stage along with each request; so it does with a soft prompt
(arXiv 2104.08691): vectors in front of the embedded tokens. The base stays as it is for everybody else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as functional

from shoal.training.model.layout import StageLayout
from shoal.training.model.split import Tape

TARGETS = (
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.o",
    "feedforward.gate",
    "feedforward.up",
    "feedforward.down",
)
PROMPT = "prompt"


@dataclass(frozen=True, slots=True)
class AdapterForm:
    """Which matrices are adapted, and how far. Both sides derive the tensors' shapes from it."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("attention.q", "attention.v")  # of TARGETS
    prompt: int = 0  # positions of the soft prompt

    def shapes(self, layout: StageLayout) -> dict[str, tuple[int, int]]:
        """Of a stage's tensors, by name: `layers.0.attention.q.a` [rank, in], `….b` [out, rank]."""
        found: dict[str, tuple[int, int]] = {}
        if layout.first and self.prompt:
            found[PROMPT] = (self.prompt, layout.slots[0].shape[1])
        for slot in layout.slots if self.rank else ():
            if slot.name.partition(".")[2].partition(".")[2] in self.targets:
                found[f"{slot.name}.a"] = (self.rank, slot.shape[1])
                found[f"{slot.name}.b"] = (slot.shape[0], self.rank)
        return found

    def count(self, layout: StageLayout) -> int:
        """Values of a stage's tensors."""
        return sum(math.prod(shape) for shape in self.shapes(layout).values())

    def first_values(self, layout: StageLayout, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """A drawn as `nn.Linear` draws it, B zero (as PEFT does): at first the adapter changes nothing."""
        found = {}
        for name, shape in self.shapes(layout).items():
            bound = 1.0 / math.sqrt(shape[1])
            drawn = torch.rand(shape, generator=generator).mul_(2 * bound).sub_(bound)
            found[name] = torch.zeros(shape) if name.endswith(".b") else drawn
        return found


class LowRank(Tape):
    """Stands where a `Tape` stands in a stage's forward: the base gets no gradient, the adapter does."""

    def __init__(self, form: AdapterForm, layout: StageLayout, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._scale = form.alpha / form.rank if form.rank else 0.0
        self._adapted = [
            (slot.start, slot.shape[0], tensors[f"{slot.name}.a"], tensors[f"{slot.name}.b"])
            for slot in layout.slots
            if f"{slot.name}.a" in tensors
        ]

    def linear(self, inputs: torch.Tensor, weight: torch.Tensor, start: int) -> torch.Tensor:
        """The base's product, and each adapter's in its rows: several matrices may lie in `weight`."""
        return self.beside(functional.linear(inputs, weight), inputs, start, weight.numel())

    def beside(self, product: torch.Tensor, inputs: torch.Tensor, start: int, count: int) -> torch.Tensor:
        """The same where the base's product is known."""
        result = product
        for at, rows, a, b in self._adapted:
            if start <= at < start + count:
                first = (at - start) // inputs.shape[-1]
                added = functional.linear(functional.linear(inputs, a), b) * self._scale
                before, mine, after = torch.tensor_split(result, (first, first + rows), dim=-1)
                result = torch.cat((before, mine + added, after), dim=-1)
        return result

    def scale(self, inputs: torch.Tensor, factor: torch.Tensor, start: int) -> torch.Tensor:
        return inputs * factor

    def shift(self, inputs: torch.Tensor, bias: torch.Tensor, start: int) -> torch.Tensor:
        return inputs + bias
