"""Reshape: a stage's state out of a checkpoint that was cut into other stages.

Parameters keep their bits. Counters are per stage, so where a new stage takes layers of several old ones the
inner optimizer's step count is the least of theirs; it only enters the bias corrections, which matter in the
first steps. Tokens and data positions are the first stage's,
whose log speaks for the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from shoal.protocol.errors import SpecError, StorageError
from shoal.training.checkpoint.manifest import MEAN, MOMENTUM, SQUARE, WEIGHTS, StagePart, slots_of
from shoal.training.checkpoint.read import Checkpoint
from shoal.training.inner import Moments
from shoal.training.model.layout import Slot, StageLayout
from shoal.training.outer.entry import StreamPosition
from shoal.training.spec import RunSpec

_SAME = (
    "layers",
    "width",
    "heads",
    "kv_heads",
    "feedforward",
    "rope_theta",
    "norm_epsilon",
    "qkv_bias",
    "tie_embeddings",
)


@dataclass(frozen=True, slots=True, eq=False)
class StageState:
    """What a stage starts from: anchor and outer momentum [size] fp32 CPU, and what was counted before."""

    weights: torch.Tensor
    momentum: torch.Tensor  # zeros where the checkpoint has none
    moments: Moments | None  # of the inner optimizer
    log_tokens: int
    positions: tuple[StreamPosition, ...]  # samples read of each data stream; of the first stage


def load_stage(checkpoint: Checkpoint, spec: RunSpec, layout: StageLayout) -> StageState:
    """The state of one stage of `spec`. Raises StorageError, and SpecError for a model of another shape."""
    weights, momentum, mean, square = (torch.zeros(layout.size) for _ in range(4))
    targets = {WEIGHTS: weights, MOMENTUM: momentum, MEAN: mean, SQUARE: square}
    steps: list[int] = []
    for slot, part, tensors in _parameters(checkpoint, spec, layout):
        for kind, tensor in tensors.items():
            slot.view(targets[kind]).copy_(tensor)
        steps.append(part.inner_steps if {MEAN, SQUARE} <= set(part.tensors) else 0)
    first = checkpoint.manifest.parts[0]
    log = checkpoint.log_state(first) if layout.first else None
    return StageState(
        weights,
        momentum,
        Moments(min(steps), mean, square) if min(steps) > 0 else None,
        first.log_tokens,
        log.positions if log is not None else (),
    )


def weights_of(
    checkpoint: Checkpoint, spec: RunSpec, layout: StageLayout
) -> Iterator[tuple[Slot, torch.Tensor]]:
    """Each parameter of a stage with its weights, fp32. Raises what `load_stage` raises."""
    for slot, _, tensors in _parameters(checkpoint, spec, layout):
        yield slot, tensors[WEIGHTS]


def _parameters(
    checkpoint: Checkpoint, spec: RunSpec, layout: StageLayout
) -> Iterator[tuple[Slot, StagePart, dict[str, torch.Tensor]]]:
    """One after another from the disk."""
    require_same_model(checkpoint, spec)
    held = {
        slot.name: (part, slot)
        for part in checkpoint.manifest.parts
        for slot in slots_of(checkpoint.spec, part)
    }
    for slot in layout.slots:
        if slot.name not in held:
            raise StorageError(
                f"{checkpoint.path} has no {slot.name}: it holds only some of the stages\n"
                "put the parts of all stages together: shoal checkpoint gather PART..."
            )
        yield slot, held[slot.name][0], checkpoint.tensors(*held[slot.name])


def require_same_model(checkpoint: Checkpoint, spec: RunSpec) -> None:
    """Raises SpecError that names the keys which differ."""
    ours, theirs = spec.model, checkpoint.spec.model
    wrong = [
        f"model.{key} = {getattr(ours, key)}, the checkpoint has {getattr(theirs, key)}"
        for key in _SAME
        if getattr(ours, key) != getattr(theirs, key)
    ]
    if spec.data.vocabulary != checkpoint.spec.data.vocabulary:
        has = checkpoint.spec.data.vocabulary
        wrong.append(f"data.vocabulary = {spec.data.vocabulary}, the checkpoint has {has}")
    if wrong:
        raise SpecError(
            f"the run cannot start from {checkpoint.path}: " + "; ".join(wrong) + "\nset them in run.toml"
        )
