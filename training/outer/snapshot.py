"""Snapshot: a stage's agreed state at one height. Genesis is the snapshot of height 0."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shoal.training.outer.log import LogState, genesis_state, state_root
from shoal.training.outer.reduce import tensors_digest


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


def snapshot_of(state: LogState, anchor: torch.Tensor, momentum: torch.Tensor) -> Snapshot:
    """With the state root that follows from the rest; hashes both tensors."""
    return Snapshot(state, anchor, momentum, state_root(tensors_digest(anchor, momentum), state))


def genesis_snapshot(run_id: bytes, stage: int, anchor: torch.Tensor) -> Snapshot:
    """The state before the first entry: the spec's initial weights, no momentum."""
    momentum = torch.zeros_like(anchor)
    return snapshot_of(genesis_state(run_id, stage), anchor, momentum)
