"""A snapshot's chunks, their hashes, and its file.

The file is safetensors: tensors `anchor` and `momentum`, and in the metadata the LogState and the state root.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from blake3 import blake3
from safetensors import SafetensorError, safe_open

from shoal.compression.codec import bytes_of
from shoal.protocol import wire
from shoal.protocol.errors import ProtocolViolation, StorageError
from shoal.training.outer.log import LOG_STATE_BYTES, LogState
from shoal.training.outer.parts import Fragment
from shoal.training.outer.snapshot import Snapshot, snapshot_of
from shoal.training.recovery.whole_file import write_whole

CHUNK_VALUES = 1 << 18  # 1 MiB of fp32


def chunk(snapshot: Snapshot, index: int) -> memoryview:
    """The bytes of a chunk: those of the anchor first, then those of the momentum."""
    which, start, count = chunk_values(snapshot.anchor.numel(), index)
    tensor = (snapshot.anchor, snapshot.momentum)[which]
    return bytes_of(tensor[start : start + count])


def chunk_hashes(snapshot: Snapshot) -> bytes:
    """32 bytes for each chunk, in order."""
    count = 2 * chunks_of(snapshot.anchor.numel())
    return b"".join(blake3(chunk(snapshot, index)).digest() for index in range(count))


def chunks_of(size: int) -> int:
    """Chunks of one tensor of `size` values."""
    return -(-size // CHUNK_VALUES)


def chunk_values(size: int, index: int) -> tuple[int, int, int]:
    """(tensor 0 or 1, first value, values) of a chunk."""
    each = chunks_of(size)
    start = index % each * CHUNK_VALUES
    return index // each, start, min(CHUNK_VALUES, size - start)


def save(snapshot: Snapshot, path: Path) -> None:
    """Write the file whole or not at all. Raises StorageError."""
    facts = {
        "log_state": wire.encode(snapshot.state, LOG_STATE_BYTES).hex(),
        "state_root": snapshot.state_root.hex(),
    }
    write_whole(path, {"anchor": snapshot.anchor, "momentum": snapshot.momentum}, facts, flush=True)


def load(path: Path, size: int, fragments: Sequence[Fragment]) -> Snapshot:
    """Read a file and check it against its own state root. Raises StorageError for a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            anchor, momentum = file.get_tensor("anchor"), file.get_tensor("momentum")
            state = wire.decode(LogState, bytes.fromhex(metadata["log_state"]), LOG_STATE_BYTES)
            root = bytes.fromhex(metadata["state_root"])
    except (OSError, SafetensorError, KeyError, ValueError, ProtocolViolation) as error:
        raise StorageError(f"snapshot {path} cannot be read: {error}") from error
    for tensor in (anchor, momentum):
        if tensor.dtype is not torch.float32 or tuple(tensor.shape) != (size,):
            raise StorageError(
                f"snapshot {path}: {tensor.dtype} {tuple(tensor.shape)}, fp32 [{size}] expected"
            )
    snapshot = snapshot_of(state, anchor, momentum, fragments)
    if snapshot.state_root != root:
        raise StorageError(f"snapshot {path}: the state root does not match its content")
    return snapshot


def is_kept(path: Path, state_root: bytes) -> bool:
    """Whether the file says that it has this state; `load` finds out whether that is so."""
    try:
        with safe_open(path, framework="pt") as file:
            return bool((file.metadata() or {}).get("state_root") == state_root.hex())
    except (OSError, SafetensorError):
        return False
