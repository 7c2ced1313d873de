"""Snapshot: a stage's agreed state at one height. Genesis is the snapshot of height 0."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shoal.training.outer.log import LogState, genesis_state
from shoal.training.outer.reduce import state_root


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


def genesis_snapshot(run_id: bytes, stage: int, anchor: torch.Tensor) -> Snapshot:
    """The state before the first entry: the spec's initial weights, no momentum."""
    momentum = torch.zeros_like(anchor)
    return Snapshot(genesis_state(run_id, stage), anchor, momentum, state_root(anchor, momentum))
