"""The checkpoints on this machine, for people: found, named, described. Blocking; for the command line."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from shoal.node.paths import checkpoint_folders
from shoal.protocol.errors import ShoalError, StorageError, UsageError
from shoal.training.checkpoint.manifest import MANIFEST, numbered
from shoal.training.checkpoint.read import Checkpoint, open_checkpoint


@dataclass(frozen=True, slots=True)
class Found:
    """One folder: a checkpoint, or why it is none."""

    path: Path
    checkpoint: Checkpoint | None
    fault: str
    written_unix_s: float

    def to_json(self) -> dict[str, object]:
        """Keys are stable."""
        about = describe(self.checkpoint) if self.checkpoint is not None else {}
        return {
            "path": str(self.path),
            "state": "damaged" if self.fault else "good",
            "fault": self.fault,
            "written_unix_s": self.written_unix_s,
            **about,
        }


def describe(checkpoint: Checkpoint) -> dict[str, object]:
    """What a checkpoint is, JSON-able."""
    manifest = checkpoint.manifest
    return {
        "path": str(checkpoint.path),
        "digest": checkpoint.digest,
        "run": manifest.run_name,
        "run_id": manifest.run_id,
        "whole": checkpoint.whole,
        "stages": [part.stage for part in manifest.parts],
        "stage_count": checkpoint.spec.stages.count,
        "heights": [part.height for part in manifest.parts],
        "log_tokens": manifest.log_tokens,
        "files": len(manifest.files),
        "bytes": manifest.size_bytes,
    }


def all_found(root: Path) -> list[Found]:
    """Everything under a data folder, the oldest first; names and sizes are looked at, not contents."""
    found: list[Found] = []
    for folder in checkpoint_folders(root):
        try:
            found += [_look(path) for _, path in numbered(folder)]
        except StorageError as error:
            found.append(Found(folder, None, str(error), 0.0))
    return sorted(found, key=lambda one: (one.written_unix_s, one.path))


def choose(root: Path, wanted: str | None) -> Checkpoint:
    """The checkpoint at a path, or of a name or the start of a digest; without either the newest whole one.

    Raises UsageError for none or several, StorageError for a damaged one.
    """
    if wanted is not None and os.path.isdir(wanted):
        return open_checkpoint(Path(wanted))
    found = all_found(root)
    if wanted is None:
        whole = [one.checkpoint for one in found if one.checkpoint is not None and one.checkpoint.whole]
        if not whole:
            raise UsageError(
                f"no whole checkpoint lies under {root}\n"
                "make one with `shoal checkpoint now`, or put parts together with `shoal checkpoint gather`"
            )
        return whole[-1]
    named = [one for one in found if _is_called(one, wanted)]
    digests = {one.checkpoint.digest if one.checkpoint else str(one.path) for one in named}
    if len(digests) != 1:
        which = "more than one checkpoint is" if named else "no checkpoint is a folder, name or digest"
        raise UsageError(f"{which} {wanted!r}\nsee what there is: shoal checkpoint list")
    return open_checkpoint(named[0].path)


def parts_of_one_run(root: Path) -> list[Path]:
    """The parts under a data folder of the one run that has any. Raises UsageError."""
    parts = [one.checkpoint for one in all_found(root) if one.checkpoint and not one.checkpoint.whole]
    runs = {part.manifest.run_id: part.manifest.run_name for part in parts}
    if len(runs) != 1:
        told = ", ".join(f"{name} ({run_id[:8]})" for run_id, name in runs.items())
        raise UsageError(
            f"under {root} lie parts of {told or 'no run'}\nname the parts: shoal checkpoint gather PART..."
        )
    return [part.path for part in parts]


def _look(path: Path) -> Found:
    try:
        written = (path / MANIFEST).stat().st_mtime
    except OSError:
        written = 0.0
    try:
        return Found(path, open_checkpoint(path), "", written)
    except ShoalError as error:
        return Found(path, None, str(error).partition("\n")[0], written)


def _is_called(one: Found, wanted: str) -> bool:
    digest = one.checkpoint.digest if one.checkpoint is not None else ""
    return one.path.name == wanted or (len(wanted) >= 6 and digest.startswith(wanted))
