"""Manifest: what a checkpoint's folder must hold, to the last byte; whatever differs from it is refused.

    000012-whole/
      manifest.json                    this, in canonical JSON; written last
      manifest.blake3                  its digest, which names the checkpoint: `b3sum -c manifest.blake3`
      spec.json                        the run's spec; its BLAKE3 is the run id
      log.0.bin                        the log of each stage up to its head: data positions among it
      layers.0.attention.q.safetensors weights, outer momentum, the inner optimizer's moments

A parameter's file is the same whatever stage held it, so any set of stages reads what any other wrote. One
peer writes the part of its own stage; the parts of all stages make a whole. There is no random state to save:
the order of data follows from the spec's seed and the positions, and nothing else of training draws.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shoal.protocol import limits
from shoal.protocol.errors import StorageError
from shoal.training.model.layout import Slot, stage_layout
from shoal.training.spec import RunSpec

MANIFEST, DIGEST, SPEC = "manifest.json", "manifest.blake3", "spec.json"
MANIFEST_BYTES = 8 * limits.MIB  # a parameter takes about 150 bytes, a stage 400
CHECKPOINTS_FOLDER, START_FOLDER = "checkpoints", "start"  # in a peer's folder of the run
WEIGHTS: Final = "weights"
MOMENTUM: Final = "outer_momentum"
MEAN: Final = "inner_mean"
SQUARE: Final = "inner_square"
_HEADER_BYTES = 4096  # most that safetensors puts before the values of these few tensors

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**53)]
Kind = Literal["weights", "outer_momentum", "inner_mean", "inner_square"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FileEntry(_Frozen):
    """One file and the hash of its bytes."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    size: Count
    blake3: Hash


class StagePart(_Frozen):
    """What one stage was when its parameters were written."""

    stage: Annotated[int, Field(ge=0, lt=limits.STAGES)]
    layers: tuple[Count, Count]  # first, and one past the last
    tensors: Annotated[tuple[Kind, ...], Field(min_length=1, max_length=4)]  # in each of its files
    peer: Annotated[str, Field(max_length=128)] = ""  # whose inner moments these are
    height: Count = 0  # of the stage's log, with its head and the state root there
    head: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = (
        ""  # empty: it comes from outside, without a log
    )
    state_root: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    log_tokens: Count = 0
    inner_steps: Count = 0  # of the optimizer whose moments these are

    @property
    def log_file(self) -> str | None:
        """Where its LogState lies."""
        return f"log.{self.stage}.bin" if self.head else None


class Manifest(_Frozen):
    """See the module."""

    format: Literal["shoal-checkpoint-1"] = "shoal-checkpoint-1"
    run_id: Hash
    run_name: Annotated[str, Field(max_length=32)]
    parts: Annotated[tuple[StagePart, ...], Field(min_length=1, max_length=limits.STAGES)]
    files: Annotated[tuple[FileEntry, ...], Field(max_length=1 << 16)]

    def canonical(self) -> bytes:
        """The bytes that are hashed."""
        return self.model_dump_json(indent=1).encode() + b"\n"

    @property
    def size_bytes(self) -> int:
        """Of all files it names."""
        return sum(entry.size for entry in self.files)

    @property
    def log_tokens(self) -> int:
        """In the log of the first stage, which speaks for all."""
        return self.parts[0].log_tokens

    def entry(self, name: str) -> FileEntry | None:
        """A file by its name."""
        return next((entry for entry in self.files if entry.name == name), None)


def digest_of(canonical: bytes) -> str:
    """What a checkpoint is called."""
    return blake3(canonical).hexdigest()


def parse_manifest(data: bytes, where: str) -> Manifest:
    """A manifest from a disk or a peer; `where` names it in the refusal. Raises StorageError."""
    if len(data) > MANIFEST_BYTES:
        raise StorageError(f"{where} has {len(data)} bytes, {MANIFEST_BYTES} are allowed")
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = ascii(f"{place[:100]}: {first['msg'][:200]}")
        raise StorageError(f"{where} is not a manifest of a checkpoint: {reason}") from None
    names = [entry.name for entry in manifest.files]
    if len(set(names)) != len(names):
        raise StorageError(f"{where} names a file twice")
    return manifest


def require_sound(manifest: Manifest, spec: RunSpec, where: str) -> None:
    """Raises StorageError unless parts are disjoint slices of the spec's model and files are just theirs."""
    layers = -1
    for part in manifest.parts:
        first, stop = part.layers
        if not (max(layers, 0) <= first < stop <= spec.model.layers):
            raise StorageError(
                f"{where}: the layers {first}-{stop - 1} of stage {part.stage} are out of order"
            )
        layers = stop
    stages = [part.stage for part in manifest.parts]
    if stages != sorted(set(stages)):
        raise StorageError(f"{where} names a stage twice")
    expected = {SPEC, *(part.log_file for part in manifest.parts if part.log_file)}
    most = {name: limits.SPEC_BYTES if name == SPEC else MANIFEST_BYTES for name in expected}
    for part in manifest.parts:
        for slot in slots_of(spec, part):
            most[file_of(slot.name)] = _HEADER_BYTES + 4 * slot.count * len(part.tensors)
    for entry in manifest.files:
        if entry.name not in most:
            raise StorageError(f"{where} names {entry.name!a}, which is no part of this model")
        if entry.size > most[entry.name]:
            raise StorageError(f"{where}: {entry.name} with {entry.size} bytes is larger than it can be")
    if missing := sorted(most.keys() - {entry.name for entry in manifest.files}):
        raise StorageError(f"{where} does not name {missing[0]} ({len(missing)} files missing)")


def is_whole(manifest: Manifest, spec: RunSpec) -> bool:
    """Whether the parts cover every layer, so that a run can start from it."""
    covered = [layer for part in manifest.parts for layer in range(*part.layers)]
    return covered == list(range(spec.model.layers))


def slots_of(spec: RunSpec, part: StagePart) -> Sequence[Slot]:
    """The parameters that a part holds."""
    return stage_layout(spec, range(*part.layers)).slots


def files_of(spec: RunSpec, part: StagePart) -> list[str]:
    """The names of a part's files."""
    parameters = [file_of(slot.name) for slot in slots_of(spec, part)]
    return parameters if part.log_file is None else [part.log_file, *parameters]


def file_of(parameter: str) -> str:
    """The file of a parameter."""
    return f"{parameter}.safetensors"


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """The finished checkpoints in a folder, by the number in front of their names. Raises StorageError."""
    try:
        paths = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(f"{folder} cannot be read: {error.strerror or error}") from error
    found = [(re.fullmatch(r"(\d{6,})-[a-z0-9-]+", path.name), path) for path in paths]
    return sorted((int(match[1]), path) for match, path in found if match)
