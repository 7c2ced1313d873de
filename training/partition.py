"""Which layers each stage holds. A pure policy: the trainer, the planner and the plan call `stage_ranges`.

A pipeline runs at the rate of its slowest stage, so the largest cost of a stage is minimised; among the cuts
that reach it, the one with the least sum of squares, which evens out the others. Costs are floating-point
operations per token, or what was measured. Embedding and head belong to the first and the last block, so a
large vocabulary moves layers away from the end it weighs on; every stage keeps one block at least.
Equal specs give equal cuts on every machine: sums of integers below 2**53, and no libm.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shoal.protocol.errors import SpecError
from shoal.training.spec import RunSpec


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """Cost of each block, and what comes on top at either end, in one unit."""

    blocks: tuple[float, ...]
    first_extra: float  # embedding
    last_extra: float  # final norm and head


def layer_costs(spec: RunSpec) -> LayerCosts:
    """Floating-point operations of a forward pass per token (backward is twice that everywhere).

    Two per weight of a matrix; attention scores and values 4·T·width, half of it masked (Kaplan et al.,
    arXiv 2001.08361, table 1). The embedding is a copy of a row.
    """
    model = spec.model
    key_width = model.kv_heads * (model.width // model.heads)
    attention = 2 * model.width * (2 * model.width + 2 * key_width) + 2 * model.sequence * model.width
    block = float(attention + 6 * model.width * model.feedforward)
    head = float(2 * model.width * spec.data.vocabulary)
    return LayerCosts((block,) * model.layers, float(model.width), head)


def stage_ranges(spec: RunSpec) -> tuple[range, ...]:
    """The layers of each stage: as the spec says, else balanced by `layer_costs`."""
    if starts := spec.stages.first_layers:
        return tuple(itertools.starmap(range, itertools.pairwise((*starts, spec.model.layers))))
    costs = layer_costs(spec)
    return partition(costs.blocks, costs.first_extra, costs.last_extra, spec.stages.count)


def stage_costs(costs: LayerCosts, ranges: Sequence[range]) -> tuple[float, ...]:
    """The cost of each stage under a cut."""
    sums = [sum(costs.blocks[layers.start : layers.stop]) for layers in ranges]
    sums[0] += costs.first_extra
    sums[-1] += costs.last_extra
    return tuple(sums)


def spec_costs(spec: RunSpec) -> tuple[float, ...]:
    """The cost of each stage of a run."""
    return stage_costs(layer_costs(spec), stage_ranges(spec))


def partition(costs: Sequence[float], first_extra: float, last_extra: float, count: int) -> tuple[range, ...]:
    """Cut the layers into `count` contiguous, non-empty stages, the slowest as fast as can be.

    Among equals the least sum of squares, then the earliest start of the last stage, and so on forward.
    O(count · layers²).
    Raises SpecError when there are fewer layers than stages or a cost is negative or not finite.
    """
    layers = len(costs)
    if not 1 <= count <= layers:
        raise SpecError(f"{layers} layers cannot be cut into {count} stages; change stages.count")
    blocks = np.array(costs, dtype=np.float64)
    blocks[0] += first_extra
    blocks[-1] += last_extra
    if not (np.isfinite(blocks).all() and min(*costs, first_extra, last_extra) >= 0):
        raise SpecError("costs of layers must be finite and not negative; measure them again")
    until = np.concatenate(([0.0], np.cumsum(blocks)))
    stage = until[None, :] - until[:, None]  # [from, to] cost of the layers from..to-1
    stage[np.tril_indices(layers + 1)] = math.inf  # a stage has a layer
    slowest, _ = _cheapest(stage, count, np.maximum)
    balanced = np.where(stage <= slowest, stage, math.inf) ** 2
    _, starts = _cheapest(balanced, count, np.add)
    return tuple(itertools.starmap(range, itertools.pairwise((*starts, layers))))


def _cheapest(stage: np.ndarray, count: int, combine: np.ufunc) -> tuple[float, list[int]]:
    """The least combined cost of `count` stages, and where each starts. stage [layers + 1, layers + 1]."""
    best = stage[0]  # [to]: the first stages end at `to`
    choices = []
    for _ in range(count - 1):
        totals = combine(best[:, None], stage)
        choices.append(totals.argmin(axis=0))
        best = totals.min(axis=0)
    end = stage.shape[0] - 1
    value = float(best[end])
    starts = []
    for choice in reversed(choices):
        end = int(choice[end])
        starts.append(end)
    return value, [0, *reversed(starts)]
