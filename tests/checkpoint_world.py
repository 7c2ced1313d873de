"""Checkpoints of a model whose every value is known: a function of its parameter's name and kind."""

from __future__ import annotations

from pathlib import Path

import torch
from pipeline_world import small_spec

from shoal.training.checkpoint.keeper import add_log, add_slot, stage_part
from shoal.training.checkpoint.manifest import MEAN, MOMENTUM, SQUARE, WEIGHTS
from shoal.training.checkpoint.read import Checkpoint, open_checkpoint
from shoal.training.checkpoint.write import Writer
from shoal.training.inner import Moments
from shoal.training.model.layout import StageLayout, stage_layout
from shoal.training.outer.entry import StreamPosition
from shoal.training.outer.log import LogState
from shoal.training.outer.parts import cut
from shoal.training.outer.snapshot import Snapshot, snapshot_of
from shoal.training.partition import stage_ranges
from shoal.training.spec import RunSpec

POSITIONS = (StreamPosition(7, 1234), StreamPosition(2**60, 5))
TOKENS = 123_456
STEPS = 321
KINDS = (WEIGHTS, MOMENTUM, MEAN, SQUARE)


def spec_of(stages: int, **model: object) -> RunSpec:
    """A small model of four layers, so that it can be cut into one, two or four stages."""
    values = small_spec(stages).model_dump()
    values["model"] |= {"layers": 4, **model}
    values["inner"] |= {"optimizer": "adamw"}
    return RunSpec.model_validate(values)


def layouts(spec: RunSpec) -> list[StageLayout]:
    return [stage_layout(spec, layers) for layers in stage_ranges(spec)]


def known(layout: StageLayout, kind: str) -> torch.Tensor:
    """The values of a kind [size]: other bits for every parameter, the same in any stage."""
    flat = torch.empty(layout.size)
    for slot in layout.slots:
        seed = sum(ord(letter) * 31**place for place, letter in enumerate(f"{kind}/{slot.name}")) % 2**63
        values = torch.randn(slot.shape, generator=torch.Generator().manual_seed(seed))
        slot.view(flat).copy_(values.square() if kind == SQUARE else values)
    return flat


def state_of(spec: RunSpec, stage: int, layout: StageLayout, height: int) -> tuple[Snapshot, Moments]:
    """A stage in the middle of a run."""
    fragments = cut(layout.size, spec.outer.part_bytes, spec.compression.block, spec.outer.fragments)
    positions = POSITIONS if layout.first else ()
    tokens = TOKENS * len(fragments)
    log = LogState(stage, height, bytes([stage + 1]) * 32, tokens, (), (), positions)
    snapshot = snapshot_of(log, known(layout, WEIGHTS), known(layout, MOMENTUM), fragments)
    return snapshot, Moments(STEPS, known(layout, MEAN), known(layout, SQUARE))


def write_stages(
    folder: Path, spec: RunSpec, kind: str = "whole", stages: range | None = None, height: int = 8
) -> Checkpoint:
    """A checkpoint of some stages, all of them if not said otherwise."""
    writer, parts = Writer(folder, kind), []
    every = layouts(spec)
    for stage in stages if stages is not None else range(len(every)):
        layout = every[stage]
        snapshot, moments = state_of(spec, stage, layout, height=height + stage)
        add_log(writer, snapshot)
        for slot in layout.slots:
            add_slot(writer, slot, snapshot, moments)
        parts.append(stage_part(spec, "somebody", layout, snapshot, moments))
    writer.finish(spec, parts)
    return open_checkpoint(writer.path)
