"""Snapshot: a stage's agreed state at one height. Genesis is the snapshot of height 0."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.training.outer.apply import part_state, tensors_digest
from shoal.training.outer.entry import StreamPosition
from shoal.training.outer.log import LogState, genesis_state, state_root
from shoal.training.outer.parts import Fragment


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Anchors and outer momentum [size] fp32 CPU, never changed in place, and what their log left behind."""

    state: LogState
    anchor: torch.Tensor
    momentum: torch.Tensor
    state_root: bytes

    @property
    def height(self) -> int:
        return self.state.height


def snapshot_of(
    state: LogState, anchor: torch.Tensor, momentum: torch.Tensor, fragments: Sequence[Fragment]
) -> Snapshot:
    """With the state root that follows from the rest; hashes both tensors."""
    parts = (part for fragment in fragments for part in fragment.parts)
    digests = [part_state(anchor[part.span], momentum[part.span]) for part in parts]
    return Snapshot(state, anchor, momentum, state_root(tensors_digest(digests), state))


@dataclass(frozen=True, slots=True, eq=False)
class Inherited:
    """What a run that starts from a checkpoint brings to its genesis besides weights."""

    momentum: torch.Tensor  # [size] fp32 CPU
    log_tokens: int
    positions: tuple[StreamPosition, ...]


def genesis_snapshot(
    run_id: bytes,
    stage: int,
    anchor: torch.Tensor,
    fragments: Sequence[Fragment],
    inherited: Inherited | None = None,
) -> Snapshot:
    """The state before the first entry: initial weights without momentum, or what a checkpoint has."""
    state, momentum = genesis_state(run_id, stage), torch.zeros_like(anchor)
    if inherited is not None:
        counted = inherited.log_tokens * len(fragments)  # each fragment's entries count all tokens
        state = dataclasses.replace(state, tokens=counted, positions=inherited.positions)
        momentum = inherited.momentum
    return snapshot_of(state, anchor, momentum, fragments)
