"""What peers say to each other about checkpoints: take one now, show its manifest, hand over a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from shoal.dht.directory import StageIndex
from shoal.protocol import limits
from shoal.protocol.wire import Count, Digest, Length, wire_message

CHUNK_BYTES = 1 * limits.MIB


@wire_message
@dataclass(frozen=True, slots=True)
class TakeCheckpoint:
    """Write the stage as it is now, unless that is on disk already; answered by CheckpointManifest."""

    stage: StageIndex


@wire_message
@dataclass(frozen=True, slots=True)
class StillWriting:
    """Sent every second until the checkpoint is on disk."""


@wire_message
@dataclass(frozen=True, slots=True)
class ManifestOf:
    """Asks for a checkpoint's manifest; answered by CheckpointManifest."""

    digest: Digest


@wire_message
@dataclass(frozen=True, slots=True)
class NewestOf:
    """Asks which checkpoint of this run has a stage at the greatest height."""

    run_id: Digest
    stage: StageIndex
    below: Count = 0  # that height, for what is there could not be used; 0: whatever there is


@wire_message
@dataclass(frozen=True, slots=True)
class Newest:
    """That one, and the height that it has."""

    digest: Digest
    height: Count


@wire_message
@dataclass(frozen=True, slots=True)
class CheckpointManifest:
    """The payload is the manifest, whose BLAKE3 is the digest."""

    digest: Digest


@wire_message
@dataclass(frozen=True, slots=True)
class FileOf:
    """Asks for a file that the manifest names; answered by FileChunks up to its size."""

    digest: Digest
    name: Annotated[str, Length(1, 128)]


@wire_message
@dataclass(frozen=True, slots=True)
class FileChunk:
    """The payload is the next CHUNK_BYTES of the file, fewer at its end."""

    offset: Count
