"""Reading a checkpoint: nothing of it is used before its hash fits, and what does not fit is named.

`open_checkpoint` looks at the manifest and at names and sizes; `Checkpoint.tensors` hashes a file as it reads
it; `verify` reads everything. Blocking, like all that touches the disk here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from blake3 import blake3
from pydantic import ValidationError

from shoal.protocol import limits, wire
from shoal.protocol.errors import ProtocolViolation, StorageError
from shoal.training.checkpoint.manifest import (
    DIGEST,
    MANIFEST,
    MANIFEST_BYTES,
    SPEC,
    SQUARE,
    FileEntry,
    Manifest,
    StagePart,
    digest_of,
    file_of,
    is_whole,
    parse_manifest,
    require_sound,
    slots_of,
)
from shoal.training.model.layout import Slot
from shoal.training.outer.log import LOG_STATE_BYTES, LogState
from shoal.training.spec import RunSpec

Progress = Callable[[int, int], None]  # bytes done, of all


def silent(done: int, total: int) -> None:
    """Nobody looks."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One on disk, its manifest checked."""

    path: Path
    digest: str
    manifest: Manifest
    spec: RunSpec

    @property
    def whole(self) -> bool:
        """Whether it has every layer."""
        return is_whole(self.manifest, self.spec)

    def manifest_bytes(self) -> bytes:
        """As they were written. Raises StorageError."""
        data = _bytes(self.path / MANIFEST, MANIFEST_BYTES)
        if digest_of(data) != self.digest:
            raise _refused(self.path / MANIFEST, "it has changed since it was opened")
        return data

    def read(self, name: str) -> bytes:
        """A file, whole and as it was written. Raises StorageError."""
        entry = self.manifest.entry(name)
        if entry is None:
            raise StorageError(f"{self.path} has no {name}")
        data = _bytes(self.path / name, entry.size)
        if len(data) != entry.size:
            raise _refused(self.path / name, f"{len(data)} bytes, {entry.size} were written")
        if blake3(data).hexdigest() != entry.blake3:
            raise _refused(self.path / name, "its content is not what was written (BLAKE3 differs)")
        return data

    def tensors(self, part: StagePart, slot: Slot) -> dict[str, torch.Tensor]:
        """A parameter's tensors by kind, of the slot's shape, fp32, finite. Raises StorageError."""
        path = self.path / file_of(slot.name)
        data = self.read(path.name)
        try:
            found = safetensors.torch.load(data)
        except Exception as error:  # the library has a KeyError, too, for what it cannot read
            raise _refused(path, f"not safetensors: {error}") from None
        if sorted(found) != sorted(part.tensors):
            raise _refused(path, f"it holds {', '.join(sorted(found))[:200]}, not {', '.join(part.tensors)}")
        for kind, tensor in found.items():
            if tensor.dtype is not torch.float32 or tuple(tensor.shape) != slot.shape:
                raise _refused(path, f"{kind} is {tensor.dtype} {tuple(tensor.shape)}, not fp32 {slot.shape}")
            if not bool(tensor.isfinite().all()):
                raise _refused(path, f"{kind} has values that are not finite")
            if kind == SQUARE and bool((tensor < 0).any()):
                raise _refused(path, f"{kind} has values below zero, which no square has")
        return found

    def log_state(self, part: StagePart) -> LogState | None:
        """The stage's log up to its head; None for what comes from outside. Raises StorageError."""
        if part.log_file is None:
            return None
        path = self.path / part.log_file
        try:
            state = wire.decode(LogState, self.read(path.name), LOG_STATE_BYTES)
        except ProtocolViolation as error:
            raise _refused(path, str(error)) from None
        if (state.stage, state.height, state.head.hex()) != (part.stage, part.height, part.head):
            raise _refused(path, "it is of another stage or height")
        return state


def open_checkpoint(path: Path, partly: bool = False) -> Checkpoint:
    """Check manifest, names and sizes. Raises StorageError, which names what is missing or altered.

    `partly`: files may still be missing, as where a peer fetches those of its stage.
    """
    try:
        return _opened(path, partly)
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from error


def _opened(path: Path, partly: bool) -> Checkpoint:
    """As `open_checkpoint`; raises OSError, too."""
    if not path.is_dir():
        raise StorageError(f"there is no checkpoint {path}\nsee what there is: shoal checkpoint list")
    if not (path / MANIFEST).exists():
        raise _refused(path / MANIFEST, "it is missing, so the writing never ended, or this is no checkpoint")
    data = _bytes(path / MANIFEST, MANIFEST_BYTES)
    digest = digest_of(data)
    if not (path / DIGEST).exists() or _bytes(path / DIGEST, 256).split()[:1] != [digest.encode()]:
        raise _refused(path / MANIFEST, f"its content does not fit {DIGEST}")
    manifest = parse_manifest(data, str(path / MANIFEST))
    spec = _spec(path / SPEC, manifest)
    require_sound(manifest, spec, str(path / MANIFEST))
    if manifest.run_name != spec.run.name:  # it is shown to people
        raise _refused(path / MANIFEST, f"its run has another name in {SPEC}")
    _require_files(path, manifest.files, partly)
    return Checkpoint(path, digest, manifest, spec)


def verify(checkpoint: Checkpoint, progress: Progress = silent) -> None:
    """Read everything and check it. Raises StorageError, which names the file."""
    done = 0
    total = checkpoint.manifest.size_bytes
    for part in checkpoint.manifest.parts:
        checkpoint.log_state(part)
        for slot in slots_of(checkpoint.spec, part):
            checkpoint.tensors(part, slot)
            entry = checkpoint.manifest.entry(file_of(slot.name))
            done += entry.size if entry else 0
            progress(done, total)
    checkpoint.read(SPEC)
    progress(total, total)


def _spec(path: Path, manifest: Manifest) -> RunSpec:
    """Of this version or an older one, whose missing keys take their defaults."""
    if not path.exists():
        raise _refused(path, "it is missing")
    data = _bytes(path, limits.SPEC_BYTES)
    if blake3(data).hexdigest() != manifest.run_id:
        raise _refused(path, "its content is not what was written (BLAKE3 differs)")
    try:
        return RunSpec.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise _refused(path, f"not a spec that this version knows ({error.error_count()} faults)") from None


def _require_files(path: Path, files: Sequence[FileEntry], partly: bool) -> None:
    sizes = {entry.name: entry.size for entry in files}
    found = {entry.name: entry for entry in path.iterdir()}
    for name, size in sizes.items():
        if name not in found:
            if partly:
                continue
            raise _refused(path / name, "it is missing")
        if found[name].is_symlink() or not found[name].is_file():
            raise _refused(path / name, "it is no plain file")
        if (has := found[name].stat().st_size) != size:
            raise _refused(path / name, f"{has} bytes, {size} were written")
    if not partly and (extra := sorted(found.keys() - sizes.keys() - {MANIFEST, DIGEST})):
        raise _refused(path / extra[0], "it was not written with the checkpoint; move it elsewhere")


def _bytes(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from error
    except MemoryError:
        raise _refused(path, "it is larger than this machine's memory") from None
    if len(data) > most:
        raise _refused(path, f"more than {most} bytes")
    return data


def _refused(path: Path, reason: str) -> StorageError:
    return StorageError(
        f"the checkpoint {path.parent} is refused: {path.name}: {reason}\n"
        "use another one (shoal checkpoint list), or copy it again from where it is whole"
    )
