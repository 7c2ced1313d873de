"""Files of a stage's folder, written whole or not at all: beside the others until they have all their bytes.

`snapshot`, `journal` and `residual_file` write with it. What a process that was killed had half written lies
in a folder of its own, under whatever name the library gave it: whoever next uses the stage's folder removes
it. (safetensors 0.8 writes to a name of its own beside the one that it is told.)
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from shoal.protocol.errors import StorageError

UNFINISHED = "unfinished"
MEND = "free space there, see that it can be written, or name another --data-dir"


def write_whole(
    path: Path, tensors: dict[str, torch.Tensor], facts: Mapping[str, str] | None = None, flush: bool = False
) -> None:
    """A safetensors file with `facts` as its metadata. `flush`: on disk when this returns.

    Raises StorageError.
    """
    unfinished = path.parent / UNFINISHED / path.name
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, unfinished, dict(facts) if facts else None)
        if flush:
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):  # of a full disk every byte counts
            unfinished.unlink(missing_ok=True)
        raise StorageError(f"{path}: {error}; {MEND}") from error


def sweep(directory: Path) -> None:
    """Remove what was half written in a stage's folder; nobody else writes there now. Raises OSError."""
    for path in (directory / UNFINISHED).glob("*"):
        path.unlink(missing_ok=True)
