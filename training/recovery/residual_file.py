"""Residuals on disk: what rounding left out of this peer's contributions outlives its process.

One file a fragment, written after each entry that lists this process. A later process takes it up only if
the log holds nothing after it, neither of the old process nor of one in between, which took it up itself and
may not have come to write its own: else it has gone with a contribution already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from shoal.training.outer.parts import Fragment
from shoal.training.recovery.whole_file import write_whole

Last = Sequence[tuple[int, int]]  # (incarnation, step) of this peer's last in the log, by fragment


def save_residuals(
    directory: Path, fragment: Fragment, kept: Mapping[int, torch.Tensor], incarnation: int, step: int
) -> None:
    """e of a fragment's parts after the entry that lists steps up to `step`. Raises StorageError."""
    tensors = {str(part.index): kept[part.index] for part in fragment.parts if part.index in kept}
    facts = {"incarnation": str(incarnation), "step": str(step)}
    write_whole(_path(directory, fragment.index), tensors, facts)


def load_residuals(directory: Path, fragments: Sequence[Fragment], last: Last) -> dict[int, torch.Tensor]:
    """e by part index, of fragments whose file is there, whole and up to date."""
    found: dict[int, torch.Tensor] = {}
    for fragment in fragments:
        try:
            with safe_open(_path(directory, fragment.index), framework="pt") as file:
                facts = file.metadata() or {}
                if last[fragment.index] != (int(facts["incarnation"]), int(facts["step"])):
                    continue
                for part in fragment.parts:
                    if str(part.index) in file.keys():  # noqa: SIM118  (safetensors' handle is no mapping)
                        tensor = file.get_tensor(str(part.index))
                        if tensor.dtype is torch.float32 and tuple(tensor.shape) == (part.count,):
                            found[part.index] = tensor
        except (OSError, SafetensorError, KeyError, ValueError):
            continue
    return {part: tensor for part, tensor in found.items() if bool(tensor.isfinite().all())}


def _path(directory: Path, fragment: int) -> Path:
    return directory / f"residual-{fragment:02d}.safetensors"
