"""Merge: a whole checkpoint from parts that lie on disks, as when the swarm is gone and its disks are not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shoal.protocol.errors import UsageError
from shoal.training.checkpoint.manifest import SPEC, StagePart, files_of
from shoal.training.checkpoint.read import Checkpoint, Progress, open_checkpoint, silent, verify
from shoal.training.checkpoint.write import Writer

_Held = tuple[Checkpoint, StagePart]


def merge(paths: Sequence[Path], folder: Path, progress: Progress = silent) -> Checkpoint:
    """Put parts of one run together, of each stage the highest; they are verified, and stay as they are.

    Raises UsageError that says what is missing or does not go together, StorageError.
    """
    chosen = _choose([open_checkpoint(path) for path in paths])
    used = list({checkpoint.path: checkpoint for checkpoint, _ in chosen}.values())
    total, done = sum(checkpoint.manifest.size_bytes for checkpoint in used), 0
    for checkpoint in used:
        before = done
        verify(checkpoint, lambda read, _, before=before: progress(before + read, total))  # type: ignore[misc]
        done += checkpoint.manifest.size_bytes
    with Writer(folder, "whole") as writer:
        for checkpoint, part in chosen:
            for name in files_of(checkpoint.spec, part):
                entry = checkpoint.manifest.entry(name)
                if entry is not None:
                    writer.take_over(entry, checkpoint.path / name)
        writer.finish(used[0].spec, [part for _, part in chosen], used[0].read(SPEC))
    return open_checkpoint(writer.path)


def _choose(found: Sequence[Checkpoint]) -> list[_Held]:
    runs = {checkpoint.manifest.run_id: checkpoint for checkpoint in found}
    if len(runs) != 1:
        told = ", ".join(f"{run_id[:8]} ({c.path.name})" for run_id, c in runs.items()) or "none"
        raise UsageError(f"parts of one run go together; these are of {told}")
    highest: dict[int, _Held] = {}
    for checkpoint in found:
        for part in checkpoint.manifest.parts:
            known = highest.get(part.stage)
            if known is None or known[1].height < part.height:
                highest[part.stage] = (checkpoint, part)
    spec = found[0].spec
    covered = {layer for _, part in highest.values() for layer in range(*part.layers)}
    if absent := sorted(set(range(spec.model.layers)) - covered):
        raise UsageError(
            f"no part has layer {absent[0]} (stages found: {sorted(highest)} of {spec.stages.count})\n"
            "copy the part of the missing stage from a peer that held it"
        )
    return [highest[stage] for stage in sorted(highest)]
