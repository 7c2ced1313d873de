"""Journal: entries and their published parts on disk, one safetensors file each: a peer restarts alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from shoal.protocol.errors import ProtocolViolation
from shoal.training.outer.entry import SKIP, parse
from shoal.training.outer.reduce import Published, publish
from shoal.training.recovery.whole_file import write_whole


def entry_path(directory: Path, height: int) -> Path:
    """Where an entry lies."""
    return directory / f"entry-{height:012d}.safetensors"


def write_entry(directory: Path, height: int, data: bytes, parts: Mapping[int, Published]) -> None:
    """Write one entry whole or not at all. Raises StorageError."""
    tensors = {f"part.{index}": _tensor(part.encoded) for index, part in parts.items()}
    tensors["entry"] = _tensor(data)
    write_whole(entry_path(directory, height), tensors)


def read_entries(directory: Path, from_height: int) -> Iterator[tuple[bytes, dict[int, Published]]]:
    """Entries from a height on, as long as they follow one another and are whole."""
    height = from_height
    while True:
        try:
            with safe_open(entry_path(directory, height), framework="pt") as file:
                data = _bytes(file.get_tensor("entry"))
                entry = parse(data)
                made = entry.source()  # a re-entry lists nobody itself; its parts' digests name those listed
                parts = {
                    part: publish(made.listed_in(part), _bytes(file.get_tensor(f"part.{part}")))
                    for part in range(entry.parts)
                    if entry.digest(part) != SKIP
                }
        except (OSError, SafetensorError, ProtocolViolation):
            return  # there is none, or a damaged one ends what the disk knows: the group has the rest
        yield data, parts
        height += 1


def prune(directory: Path, below: int) -> None:
    """Remove entries below a height."""
    for path in directory.glob("entry-*.safetensors"):
        if path < entry_path(directory, below):
            path.unlink(missing_ok=True)


def _tensor(data: bytes | bytearray | memoryview) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()
